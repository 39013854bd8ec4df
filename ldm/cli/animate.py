"""The verb that makes films: on the way from one prompt or seed to another, or a short clip drawn anew as one."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.command import call
from ldm.cli.sampling_options import MAX_SEED, device_for, known, model_for, name_of, size_given, tell
from ldm.config.errors import UserError
from ldm.families.draws import PRECISIONS, Draws, Wanted
from ldm.sampling.prompt_files import Asked
from ldm.sampling.recipe import NAMES, Recipe, save_picture, writable

if TYPE_CHECKING:
    from torch import Tensor


Option = typer.Option
CELLS = 2


def main(words: Sequence[str]) -> int:
    """`ldm animate PROMPT --to PROMPT`: the exit code."""
    return call(animate, words, "ldm animate")


def animate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    to: Annotated[str | None, Option(help="What the film ends with; default: the same prompt.")] = None,
    to_seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help="And with which seed's noise; default: the same.")] = None,
    frames: Annotated[int, Option(min=2, max=512, help="How many.")] = 24,
    loop: Annotated[bool, Option("--loop", help="And back again.")] = False,
    clip: Annotated[Path | None, Option(help="Instead: a short film to draw anew; a folder of frames, or an animated file.")] = None,
    strength: Annotated[float | None, Option(min=0, max=1, help="How much of it; default: 0.75, with SOURCE 1.")] = None,
    source: Annotated[str | None, Option(help="What CLIP shows: start from the noise it comes from.")] = None,
    cells: Annotated[int, Option(min=1, max=8, help="Frames beside and above each other when drawn; 1: each alone.")] = CELLS,
    model: Annotated[str, Option(help="A folder or file of a model; default: the newest of runs/*.")] = "",
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Of the first frame.")] = 0,
    steps: Annotated[int | None, Option(min=1, max=1000, help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, Option(min=0, max=1000, help="Default: the model's; with SOURCE 1.")] = None,
    sampler: Annotated[str, Option(help=f"{' '.join(NAMES)}; default: ddim, which adds no noise.")] = "ddim",
    precision: Annotated[str, Option(help="fp32 bf16 fp16; default: the model's.")] = "",
    negative: Annotated[str, Option(help="What to stay away from.")] = "",
    size: Annotated[str, Option(help="WIDTHxHEIGHT in px; default: the model's.")] = "",
    rate: Annotated[float, Option(min=0.1, max=100, help="Frames a second.")] = 8.0,
    lora: Annotated[list[str] | None, Option(help="FILE[:WEIGHT] of a LoRA; as often as wanted.")] = None,
    embedding: Annotated[list[str] | None, Option(help="A file of a word that textual inversion learned; as often as wanted.")] = None,
    out: Annotated[Path, Option(help="The film: .webp, .png or .gif; never replaces a file.")] = Path("film.webp"),
    pictures: Annotated[Path | None, Option(help="A folder for the single frames, too.")] = None,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is.")] = "",
) -> int:
    """Make a film. Without CLIP, text and noise move from one prompt and seed to others."""
    if out.exists():
        raise UserError(f"out: {out} is there already; choose another name")
    if clip is None and to is None and to_seed is None:
        raise UserError("to: where does the film go? Give --to PROMPT, --to-seed NUMBER, or --clip FRAMES to draw a film anew")
    if clip is not None and (to is not None or to_seed is not None):
        raise UserError("clip: not together with --to or --to-seed")
    if clip is None and (strength is not None or source is not None):
        raise UserError("strength and source belong to --clip")
    known("sampler", sampler, tuple(NAMES))
    known("precision", precision, PRECISIONS)
    folder = model_for(model)

    from ldm.sampling import jobs
    from ldm.sampling.adapters import with_adapters
    from ldm.sampling.animation import check_suffix, save_clip

    check_suffix(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    family, added = with_adapters(folder, device_for(device), lora or [], embedding or [], {}, tell)
    scale = 1.0 if source is not None and guidance is None else guidance
    wanted = Wanted(steps=steps, guidance=scale, sampler=sampler, precision=precision)
    rest: dict[str, Any] = {"model": name_of(folder), "model_hash": family.content_hash, "notation": True, **added}
    common = jobs.Common(seed=seed, wanted=wanted, negative=_clean(negative), size=size_given(size, {}), rest=rest)
    (base,) = jobs.recipes(family, [Asked(prompt=_clean(prompt))], common)
    started = time.monotonic()
    if clip is None:
        recipes = way(base, frames, "" if to is None else _clean(to), to_seed, loop)
        from ldm.cli.grid import draw_cells

        drawn: Sequence[Any] = draw_cells(family, recipes, note=tell)
        base = replace(recipes[0], to=_clean(to or ""))
    else:
        usual = 0.75 if source is None else 1.0
        base = replace(base, strength=usual if strength is None else strength, invert=source is not None, source=_clean(source or ""))
        anew, base = draw_clip(family, clip, base, cells)
        drawn, recipes = list(anew), []
    save_clip(out, [frame.numpy() for frame in drawn], rate, base)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        _save_frames(pictures, drawn, recipes or [base] * len(drawn))
    print(f"{len(drawn)} frames of {folder} in {time.monotonic() - started:.1f} s: {out}", file=sys.stderr)
    return 0


def way(base: Recipe, frames: int, to: str, to_seed: int | None, loop: bool = False) -> list[Recipe]:
    """A recipe for every frame on the way from a recipe's prompt and seed to others; the pace is even.

    Args:
        to: a prompt; empty: the same.
        to_seed: None: the same.
        loop: the second half goes back, so that the film may begin anew without a jump.
    """
    last = frames / 2 if loop else frames - 1
    shares = [k / last if k <= last else (frames - k) / last for k in range(frames)]
    found = []
    for share in shares:
        frame = base if to_seed is None else replace(base, variation=share, variation_seed=to_seed)
        found.append(replace(frame, to=to, share=share) if to else frame)
    return found


def draw_clip(family: Draws, clip: Path, recipe: Recipe, cells: int) -> tuple[Tensor, Recipe]:
    """The frames (F,H,W,3) of a clip drawn anew as one, and the recipe with its hash; all frames begin with the same noise."""
    import torch

    from ldm.families.draws import VideoEdit
    from ldm.sampling.animation import read_clip
    from ldm.text.prompt_syntax import read

    values, said = read_clip(clip, (recipe.height, recipe.width))
    source = read(recipe.source) if recipe.invert else None
    anew = VideoEdit(
        prompt=read(recipe.prompt), negative=read(recipe.negative), source=source, seed=recipe.seed, strength=recipe.strength, cells=cells
    )
    return family.restyle(torch.tensor(values), anew, family.settings(recipe.wanted()), tell), replace(recipe, init=said)


def _save_frames(folder: Path, frames: Sequence[Any], recipes: Sequence[Recipe]) -> None:
    from ldm.sampling.picture_files import free, save

    number = free(folder)
    for frame, recipe in zip(frames, recipes, strict=True):
        number, _ = save(folder, number, recipe.seed, partial(save_picture, pixels=frame.numpy(), recipe=recipe))


def _clean(text: str) -> str:
    return writable(text).replace("\0", " ")
