"""Benchmarks of a picture of each family, at the sizes of the built-in configurations: what one pass, codes and diffusion cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ldm.cli.benchmarks.codes import PIXELS, family_of
from ldm.cli.benchmarks.models import CAPTIONS, QUICKSTART, build_family, build_text
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.data.views import kind_of
from ldm.families.draws import Draws, Wanted
from ldm.families.pix2pix import Pix2Pix, Pix2PixFamily
from ldm.families.text_gan import TextGAN, TextGANFamily
from ldm.formats.latent_codec import LatentCodec, Statistics
from ldm.models.style_generator import StyleGeneratorConfig
from ldm.models.translation import UNetGeneratorConfig

MANY = 8


def each(setup: Setup) -> Iterator[Case]:
    """B25."""
    yield _case(f"diffusion in latents, 20 steps with guidance, {PIXELS} px", _diffusion(setup), PIXELS, Wanted(steps=20, guidance=2.5))
    yield _case(f"codes in masked order, 8 steps with guidance, {PIXELS} px", family_of(setup, MANY), PIXELS)
    yield _case(f"codes in causal order, 16 of them with guidance, {PIXELS} px", family_of(setup, MANY, "causal"), PIXELS)
    yield _case(f"text-to-image GAN in latents, {PIXELS} px", _gan(setup), PIXELS)
    translator = Pix2Pix(view="grey", generator=UNetGeneratorConfig(channels=4 if setup.tiny else 32, downs=6))
    picture = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    family = Pix2PixFamily(translator, kind_of({}, "grey"), 64).to(setup.device)
    yield _case("pix2pix, 64 px", family, 64, edits=family.edits(picture))


def _diffusion(setup: Setup) -> Draws:
    return build_family(QUICKSTART, setup.device, chunk=MANY)


def _gan(setup: Setup) -> Draws:
    torch.manual_seed(0)
    codec = LatentCodec(QUICKSTART.autoencoder.build(), Statistics((0.0,) * 8, (1.0,) * 8, 0, 0))
    config = TextGAN(generator=StyleGeneratorConfig(channels=(8 if setup.tiny else 128,), blocks=4, tells="words"))
    family = TextGANFamily(config, codec, build_text(QUICKSTART), PIXELS)
    for module in (family, *family.frozen()):
        module.to(setup.device)
    return family


def _case(name: str, family: Any, side: int, wanted: Wanted | None = None, edits: tuple[Any, ...] = ()) -> Case:
    family.eval()
    prompts = [CAPTIONS[i % len(CAPTIONS)] if not edits else "" for i in range(MANY)]

    def draw(rows: list[int]) -> np.ndarray:
        made = family.sample([prompts[i] for i in rows], rows, wanted or Wanted(), size=(side, side), edits=edits)
        return np.asarray(made).astype(int)

    def check() -> float:
        return float(abs(draw(list(range(MANY)))[3] - draw([3])[0]).max())

    ours: Callable[[], Any] = lambda: draw(list(range(MANY)))  # noqa: E731
    return Case(
        name=f"{name}, {MANY} at a time, fp32",
        kind="record",
        ours=ours,
        theirs=None,
        check=check,
        tolerance=0.0,
        error="difference of a picture to the same one drawn alone, in levels of 255",
        per_call=MANY,
    )
