"""Diversity of pictures of one prompt, which mode collapse lessens, beside that of true pictures of which the prompt says the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import ScenePrompts
from ldm.data.scenes.spec import Specs, draw_specs

AT_FIRST = 1024  # scenes that are drawn in search of some that have the facts


def spread(images: NDArray[np.uint8]) -> float:
    """Mean |difference|, of values in [0,1], of two of the pictures (P,K,H,W,3) of one prompt, over pairs and prompts."""
    prompts, many = images.shape[:2]
    values = images.reshape(prompts, many, -1).astype(np.float32) / 255
    first, second = np.triu_indices(many, 1)
    return float(np.mean([np.abs(own[first] - own[second]).mean() for own in values]))


def alike(asked: ScenePrompts, tier: str, many: int, size: int) -> NDArray[np.uint8]:
    """True pictures (P,K,size,size,3) of scenes of one object that have the facts of each prompt, and vary in what it leaves open."""
    return np.stack([to_bytes(render(_scenes(asked.specs.take(slice(i, i + 1)), tier, many, i), size)) for i in range(len(asked))])


def _scenes(wanted: Specs, tier: str, many: int, seed: int) -> Specs:
    only, tried = ((int(wanted.colour[0, 0]), int(wanted.shape[0, 0])),), AT_FIRST
    while True:
        drawn = draw_specs(tier, "train", seed, np.arange(tried), only=only)
        same = [getattr(drawn, name)[:, 0] == getattr(wanted, name)[0, 0] for name in ("size", "cell", "fill")]
        same += [getattr(drawn, name) == getattr(wanted, name)[0] for name in ("tone", "texture")]
        rows = np.flatnonzero(np.logical_and.reduce(same))
        if len(rows) >= many:
            return drawn.take(rows[:many])
        tried *= 4
