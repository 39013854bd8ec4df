"""Aspect-ratio buckets: shapes of nearly equal area, and which of them each picture fits best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def shapes(resolution: int, step: int = 64, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) px in multiples of `step`, of at most resolution² pixels and as many as fit, widest last.

    As NovelAI's aspect-ratio bucketing (2022): for every side the longest other side that keeps the area.
    """
    found: set[tuple[int, int]] = set()
    for side in range(step, int(resolution * max_aspect**0.5) + step, step):
        other = resolution * resolution // side // step * step
        if other >= step and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found or {(resolution, resolution)}, key=lambda s: s[1] / s[0])


def assign(sizes: NDArray[np.int32], choices: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Which shape's aspect ratio is nearest, by its logarithm, to each of the sizes (N,2) height, width."""
    aspect = np.log(sizes[:, 1] / sizes[:, 0])
    offered = np.log([width / height for height, width in choices])
    return np.asarray(np.abs(aspect[:, None] - offered[None]).argmin(1))


def cut_away(sizes: NDArray[np.int32], choices: Sequence[tuple[int, int]], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of each picture (N,) that lies outside its bucket after the resize that covers it."""
    aspect = sizes[:, 1] / sizes[:, 0]
    offered = np.array([width / height for height, width in choices])[chosen]
    return np.asarray(1 - np.minimum(aspect / offered, offered / aspect))
