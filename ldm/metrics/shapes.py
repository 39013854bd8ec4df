"""Shape quality of scenes' pictures: how far a drawn object covers the ideal shape of its place and size (intersection over union)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.checker import Reading, coverage
from ldm.data.scenes.geometry import distance

FINE = 4  # points along a pixel at which outlines are compared
REACH = 0.9  # half of the window about an object, in its sides: the widest shape reaches 0.76
WORST = 5.0  # percentile that stands for the worst


def overlaps(images: NDArray, reading: Reading) -> NDArray[np.float64]:
    """Of each object that was read, its overlap with the ideal shape, (M,) in [0,1].

    The drawn outline is where the object's colour covers half a pixel, between pixels as bilinear interpolation has it. The
    ideal one has the read shape; its place and size are those that overlap most.

    Args:
        images: (N,H,W,3), uint8 or floating point in [0,1].
        reading: what `checker.read` says of them.
    """
    found = np.zeros(len(reading.image))
    for number, alpha in coverage(images, reading):
        drawn = _finer(alpha) > 0.5
        start = np.array([reading.x[number], reading.y[number], reading.side[number]]) * len(drawn)  # in fine points
        rows, columns = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
        if not len(rows):
            continue
        # The window holds both outlines: nothing else of the picture counts.
        reach = REACH * start[2]
        top, left = (max(0, int(min(line[0], at - reach))) for line, at in ((rows, start[1]), (columns, start[0])))
        window = drawn[top : int(max(rows[-1], start[1] + reach)) + 2, left : int(max(columns[-1], start[0] + reach)) + 2]
        found[number] = _best(window, int(reading.shape[number]), start - (left, top, 0))
    return found


def summary(overlap: NDArray[np.float64]) -> Mapping[str, float]:
    """Median and 5th percentile over objects; nothing where none was read."""
    if not len(overlap):
        return {}
    return {"iou": round(float(np.median(overlap)), 4), "iou_worst": round(float(np.percentile(overlap, WORST)), 4)}


def _best(drawn: NDArray[np.bool_], shape: int, pose: NDArray[np.float64]) -> float:
    """The greatest overlap near a pose (x, y, side), by steps along each number that halve from a pixel down to half a fine point."""
    best, step = _overlap(drawn, shape, pose), float(FINE)
    while step > 0.4:
        better = True
        while better:
            better = False
            for axis in range(3):
                for sign in (1, -1):
                    other = pose.copy()
                    other[axis] += sign * step
                    if (found := _overlap(drawn, shape, other)) > best:
                        best, pose, better = found, other, True
        step /= 2
    return best


def _overlap(drawn: NDArray[np.bool_], shape: int, pose: NDArray[np.float64]) -> float:
    height, width = drawn.shape
    dx, dy = np.broadcast_arrays(np.arange(width)[None, :] + 0.5 - pose[0], np.arange(height)[:, None] + 0.5 - pose[1])
    ideal = distance(shape, dx, dy, np.full(drawn.shape, pose[2])) < 0
    return float((drawn & ideal).sum() / max((drawn | ideal).sum(), 1))


def _finer(alpha: NDArray[np.floating]) -> NDArray[np.float64]:
    """(h,w) at FINE points along each pixel, bilinear between the middles of pixels."""
    at = (np.arange(FINE * len(alpha)) + 0.5) / FINE - 0.5
    low = np.clip(np.floor(at).astype(int), 0, len(alpha) - 1)
    high, share = np.clip(low + 1, 0, len(alpha) - 1), np.clip(at - low, 0, 1)
    rows = alpha[low] * (1 - share)[:, None] + alpha[high] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, high] * share
