"""What the adherence metric says of images whose quality is known: perfect, re-lit, shuffled, noisy, blurred and wrong in one way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.captions import stated
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.spec import TIERS, Specs
from ldm.metrics.adherence import score

Images = NDArray[np.floating]


def yardsticks(specs: Specs, tier: str, seed: int = 0) -> dict[str, dict[str, float]]:
    """The mean of every metric over the images of each kind, by kind.

    Args:
        specs: scenes of the tier; certified ones score exactly 1 when perfect.
        seed: of the noise and of the shuffling.
    """
    targets = stated(specs, tier)
    out = {}
    for name, images, rows in _kinds(specs, tier, np.random.default_rng(seed)):
        wanted = targets if rows is None else [targets[i] for i in rows]
        if wanted:
            scores = score(to_bytes(np.clip(images, 0, 1)), wanted)
            out[name] = {key: float(np.nanmean(v)) for key, v in scores.items() if not np.isnan(v).all()}
    return out


def _kinds(specs: Specs, tier: str, rng: np.random.Generator) -> Iterator[tuple[str, Images, NDArray[np.int64] | None]]:
    """Kinds of images, and which scenes they are graded against (all: None)."""
    pixels, n = TIERS[tier].pixels, len(specs)
    perfect = render(specs, pixels)
    yield "perfect", perfect, None
    yield "relit", render(specs.relit(int(rng.integers(2**31))), pixels), None
    yield "shuffled", np.roll(perfect, 1, axis=0), None
    for deviation in (0.05, 0.10):
        yield f"noise {deviation:.2f}", perfect + deviation * rng.standard_normal(perfect.shape, np.float32), None
    for deviation in (0.5, 0.8):
        yield f"blur {deviation}", blurred(perfect, deviation * pixels / 32), None
    yield "ghost", (perfect + np.roll(perfect, 1, axis=0)) / 2, None
    yield "uniform noise", rng.random(perfect.shape, np.float32), None
    yield "mean image", np.broadcast_to(perfect.mean(0), perfect.shape), None
    yield "blobs", blobs(n, pixels, rng), None
    several = np.flatnonzero(specs.count >= 2)
    if len(several):
        yield "mirrored", perfect[:, :, :, ::-1], None
        some = specs.take(several)
        there = np.arange(some.shape.shape[1]) < some.count[:, None]
        missing = np.where(np.arange(there.shape[1]) < some.count[:, None] - 1, some.shape, -1)
        turned, changed = _turned(some)
        yield "colours rotated", render(replace(some, colour=turned).take(changed), pixels), several[changed]
        yield "last missing", render(replace(some, shape=missing), pixels), several


def _turned(specs: Specs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each group's colour passed on to the next group, (N,K), and the scenes where this leaves no object its colour."""
    colour = specs.colour.copy()
    for i, (row, shapes, count) in enumerate(zip(specs.colour.tolist(), specs.shape.tolist(), specs.count.tolist(), strict=True)):
        groups = list(dict.fromkeys(zip(row[:count], shapes[:count], strict=True)))
        passed = {group: groups[(j + 1) % len(groups)][0] for j, group in enumerate(groups)}
        colour[i, :count] = [passed[group] for group in zip(row[:count], shapes[:count], strict=True)]
    return colour, np.flatnonzero(((colour != specs.colour) | (specs.colour < 0)).all(1))


def blurred(images: Images, deviation_px: float) -> Images:
    """Gaussian blur of (N,3,H,W)."""
    from scipy import ndimage

    return ndimage.gaussian_filter(images, (0, 0, deviation_px, deviation_px), mode="nearest")


def blobs(n: int, pixels: int, rng: np.random.Generator) -> Images:
    """Smooth fields of random colour with the contrast of scenes, (N,3,H,W) in [0,1]."""
    field = blurred(rng.standard_normal((n, 3, pixels, pixels), np.float32), 3 * pixels / 32)
    return np.clip(0.5 + 0.3 * field / field.std(), 0, 1)
