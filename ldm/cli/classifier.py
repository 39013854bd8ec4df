"""The classifier verb: trains a small classifier of noisy latents, for classifier guidance by `ldm sample --classifier`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.config.options import Given

Option = typer.Option


def main(words: Sequence[str]) -> int:
    """`ldm classifier CACHE ...`: the exit code."""
    return call(classifier, words, "ldm classifier")


def classifier(
    cache: Annotated[Path, typer.Argument(help="A latent cache that ldm data encode made with this model."), Given.CACHE],
    model: Annotated[str, Option(help="The model that will be guided: its autoencoder and its noise."), Given.MODEL],
    words: Annotated[str, Option(help="What to tell apart: words of captions with commas, such as red,green,blue.")],
    out: Annotated[Path, Option(help="The file to write (.safetensors).")],
    images: Annotated[int, Option(min=1, help="So many are seen.")] = 200_000,
    batch: Annotated[int, Option(min=1, help="Of a step.")] = 128,
    rate: Annotated[float, Option(min=0, help="Learning rate at the start.")] = 1e-3,
    seed: Annotated[int, Option(min=0, help="Of order, noise and first weights.")] = 0,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is."), Given.DEVICE] = "",
) -> int:
    """Learn which words captions say of noisy latents. Then: ldm sample "a green ring" --classifier FILE --classifier-scale 2."""
    known = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not known:
        raise UserError(f"words: got {words!r}; words of captions with commas are needed, such as red,green,blue")
    from ldm.cli.models import device_for, model_for
    from ldm.families.draws import GuideTraining
    from ldm.families.registry import open_finished

    family = open_finished(model_for(model), device_for(device))
    started, shown = time.monotonic(), 0.0

    def tell(seen: int, loss: float) -> None:
        nonlocal shown
        if (now := time.monotonic()) - shown > 10:
            shown = now
            print(f"{seen:,} of {images:,} images, loss {loss:.3f}", file=sys.stderr)

    guide = family.learn_guide(cache, GuideTraining(words=known, images=images, batch=batch, rate=rate, seed=seed), tell)
    out.parent.mkdir(parents=True, exist_ok=True)
    guide.save(out)
    print(f"{out}: tells {', '.join(known)} apart in noisy latents of {model}, after {time.monotonic() - started:.0f} s")
    return 0
