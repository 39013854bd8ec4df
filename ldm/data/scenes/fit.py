"""Which shape a component of pixels is: all six are laid over it at several scales and offsets, with other objects' pixels left out."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.geometry import HALF_HEIGHT, HALF_WIDTH, TRIANGLE, distance
from ldm.data.scenes.spec import SIDE

RANGE = (SIDE[0] / 1.18, SIDE[-1] * 1.18)  # of an object's side: the size classes' borders lie 18 % off
LEAST_SEEN = 0.65  # share of a shape that must be visible
WINDOW = 1.15  # half the width of the canonical window, in sides of the object
BELOW = TRIANGLE * np.sqrt(3) / 12  # a triangle's centroid below the centre of its box

Array = NDArray[np.floating]


@cache
def _bank(grid: int, fine: bool) -> tuple[Array, NDArray[np.float64]]:
    """Templates of all shapes in the canonical window, centroid in the middle: (6,T,grid*grid), and their (T,3) scale and offset."""
    scales = (0.88, 0.94, 1.0, 1.06, 1.12) if fine else (1.0,)
    offsets = (-0.08, 0.0, 0.08) if fine else (0.0,)
    moves = np.array([(s, dx, dy) for s in scales for dx in offsets for dy in offsets])
    ticks = ((np.arange(grid) + 0.5) / grid * 2 - 1) * WINDOW
    column, row = np.meshgrid(ticks, ticks)
    bank = np.empty((6, len(moves), grid * grid), np.float32)
    pixel = 2 * WINDOW / grid
    for shape in range(6):
        for i, (scale, dx, dy) in enumerate(moves):
            below = scale * BELOW if shape == 2 else 0.0
            far = distance(shape, column - dx, row - dy + below, np.full(column.shape, scale))
            bank[shape, i] = np.clip(0.5 - far / pixel, 0, 1).reshape(-1)
    return bank, moves


def _window(
    alpha: Array, ignore: NDArray[np.bool_], item: NDArray[np.int64], x: NDArray, y: NDArray, side: NDArray, grid: int
) -> tuple[Array, Array]:
    """Canonical views (W, grid*grid) of components `item` about (x, y) [px]: the mask, and the weights that leave out other objects."""
    size = alpha.shape[-1]
    ticks = (((np.arange(grid) + 0.5) / grid * 2 - 1) * WINDOW).astype(np.float32)
    columns = x.astype(np.float32)[:, None] + ticks * side.astype(np.float32)[:, None] - np.float32(0.5)
    rows = y.astype(np.float32)[:, None] + ticks * side.astype(np.float32)[:, None] - np.float32(0.5)
    x0, y0 = np.floor(columns), np.floor(rows)
    fx, fy = (columns - x0)[:, None, :], (rows - y0)[:, :, None]
    xi, yi = x0.astype(np.int64), y0.astype(np.int64)
    left, right = (np.clip(v, 0, size - 1)[:, None, :] for v in (xi, xi + 1))
    up, down = (np.clip(v, 0, size - 1)[:, :, None] * size for v in (yi, yi + 1))
    base = (item * size * size)[:, None, None]
    flat = alpha.reshape(-1)
    top = flat[base + up + left] * (1 - fx) + flat[base + up + right] * fx
    bottom = flat[base + down + left] * (1 - fx) + flat[base + down + right] * fx
    mask = (top * (1 - fy) + bottom * fy > 0.5).astype(np.float32)
    near_x, near_y = np.rint(columns).astype(np.int64), np.rint(rows).astype(np.int64)
    inside = ((near_x >= 0) & (near_x < size))[:, None, :] & ((near_y >= 0) & (near_y < size))[:, :, None]
    at = base + np.clip(near_y, 0, size - 1)[:, :, None] * size + np.clip(near_x, 0, size - 1)[:, None, :]
    weight = (inside & ~ignore.reshape(-1)[at]).astype(np.float32)
    return (mask * weight).reshape(-1, grid * grid), weight.reshape(-1, grid * grid)


def _overlap(mask: Array, weight: Array, templates: Array) -> Array:
    """Intersection over union of W masks with T templates, (W,T); less where most of the template would be hidden."""
    both, drawn = mask @ templates.T, weight @ templates.T
    return _union(mask, both, drawn, templates.sum(1))


def _union(mask: Array, both: Array, drawn: Array, whole: Array) -> Array:
    area = mask.sum(1).reshape(-1, *[1] * (both.ndim - 1))
    return both / np.maximum(area + drawn - both, 1e-6) * np.minimum(1, drawn / (LEAST_SEEN * whole))


def fit(
    alpha: Array, ignore: NDArray[np.bool_], near: NDArray[np.bool_], other: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Each component's best shape, the centre of its box, its side (units of the image) and the fit's intersection over union."""
    m, size = len(alpha), alpha.shape[-1]
    centre = np.arange(size) + 0.5
    mass = np.maximum(alpha.sum((1, 2)), 1e-6)
    x, y = (alpha.sum(1) @ centre) / mass, (alpha.sum(2) @ centre) / mass
    best = np.zeros((m, 6))
    pose = np.zeros((m, 6, 3))  # centroid and side, px
    _refine(alpha, ignore, np.arange(m), None, x, y, np.sqrt(mass), best, pose)
    touching = np.flatnonzero((near & other).any((1, 2)))
    if len(touching):
        item, shape, x, y, side = _anchored(alpha, ignore, touching)
        _refine(alpha, ignore, item, shape, x, y, side, best, pose)
    shape = best.argmax(1)
    rows = np.arange(m)
    x, y, side = pose[rows, shape].T
    return shape, x / size, (y - np.where(shape == 2, BELOW * side, 0)) / size, side / size, best[rows, shape]


def _refine(
    alpha: Array,
    ignore: NDArray[np.bool_],
    item: NDArray,
    shape: NDArray | None,
    x: NDArray,
    y: NDArray,
    side: NDArray,
    best: NDArray,
    pose: NDArray,
) -> None:
    """Compare views with the fine bank (of all shapes, or of `shape`) and keep what beats `best` (m,6)."""
    bank, moves = _bank(32, True)
    mask, weight = _window(alpha, ignore, item, x, y, side, 32)
    for kind in range(6):
        rows = np.arange(len(item)) if shape is None else np.flatnonzero(shape == kind)
        if not len(rows):
            continue
        fits = _overlap(mask[rows], weight[rows], bank[kind])
        choice = fits.argmax(1)
        iou = fits[np.arange(len(rows)), choice]
        scale, dx, dy = moves[choice].T
        won = iou > best[item[rows], kind]
        best[item[rows[won]], kind] = iou[won]
        found = np.stack([x[rows] + dx * side[rows], y[rows] + dy * side[rows], scale * side[rows]], 1)
        pose[item[rows[won]], kind] = found[won]


def _anchored(alpha: Array, ignore: NDArray[np.bool_], item: NDArray[np.int64]) -> tuple[NDArray, ...]:
    """For components that others may hide in part: each shape's best pose among those that touch the visible box at two sides or more."""
    size = alpha.shape[-1]
    solid = np.asarray(alpha[item] > 0.5)
    across, down = np.asarray(solid.any(axis=1)), np.asarray(solid.any(axis=2))
    left, right = across.argmax(1), size - across[:, ::-1].argmax(1)
    top, bottom = down.argmax(1), size - down[:, ::-1].argmax(1)
    poses = []
    for shape in range(6):
        wide, high = HALF_WIDTH[shape], HALF_HEIGHT[shape]
        by_width, by_height = (right - left) / (2 * wide), (bottom - top) / (2 * high)
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        choices = [
            (middle_x, top + high * by_width, by_width),
            (middle_x, bottom - high * by_width, by_width),
            (left + wide * by_height, middle_y, by_height),
            (right - wide * by_height, middle_y, by_height),
        ]
        for side in SIDE * size:
            for x in (left + wide * side, right - wide * side):
                choices += [(x, top + high * side, np.full(len(item), side)), (x, bottom - high * side, np.full(len(item), side))]
        poses.append(np.stack([np.stack(choice, 1) for choice in choices], 1))
    table = np.stack(poses, 1)  # (m,6,16,3): centre of the box and side, px
    table[:, 2, :, 1] += BELOW * table[:, 2, :, 2]
    m, shapes, many, _ = table.shape
    flat = table.reshape(-1, 3)
    flat[:, 2] = np.clip(flat[:, 2], RANGE[0] * size, RANGE[1] * size)
    mask, weight = _window(alpha, ignore, np.repeat(item, shapes * many), flat[:, 0], flat[:, 1], flat[:, 2], 16)
    bank, _ = _bank(16, False)
    drawn, both = (np.einsum("mscp,sp->msc", v.reshape(m, shapes, many, -1), bank[:, 0]) for v in (weight, mask))
    iou = _union(mask, both.reshape(-1), drawn.reshape(-1), np.tile(np.repeat(bank[:, 0].sum(1), many), m))
    choice = iou.reshape(m, shapes, many).argmax(2)
    chosen = np.take_along_axis(table, choice[..., None, None], 2).reshape(-1, 3)
    return np.repeat(item, shapes), np.tile(np.arange(shapes), m), chosen[:, 0], chosen[:, 1], chosen[:, 2]
