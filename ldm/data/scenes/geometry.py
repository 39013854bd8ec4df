"""Geometry of the six shapes at equal area: signed distance functions, outlines, and spatial relations.

All lengths are in units of the image's side, x to the right and y downwards; a shape's centre is the centre of its bounding box.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

RING = 0.55  # inner radius by outer
TRIANGLE = 2 / 3**0.25  # the triangle's edge at area 1
OUTER = 1 / np.sqrt(np.pi * (1 - RING**2))  # the ring's outer radius at area 1
HALF_WIDTH = np.array([1 / np.sqrt(np.pi), 0.5, TRIANGLE / 2, 1 / np.sqrt(2), 1.5 / np.sqrt(5), OUTER])  # at area 1
HALF_HEIGHT = np.array([1 / np.sqrt(np.pi), 0.5, TRIANGLE * np.sqrt(3) / 4, 1 / np.sqrt(2), 1.5 / np.sqrt(5), OUTER])


def distance(shape: int, dx: NDArray, dy: NDArray, side: NDArray) -> NDArray:
    """Signed distance to a shape's outline (negative inside; a lower bound near outer corners).

    Only sums, products and square roots, which IEEE 754 rounds alike everywhere: the pictures are the same bits on every machine.
    """
    kind = dx.dtype.type
    if shape == 0:
        return np.sqrt(dx * dx + dy * dy) - side * kind(HALF_WIDTH[0])
    if shape == 2:
        low = dy - side * kind(TRIANGLE * np.sqrt(3) / 12)
        return np.maximum(low, kind(np.sqrt(3) / 2) * np.abs(dx) - kind(0.5) * low) - side * kind(TRIANGLE / np.sqrt(12))
    if shape == 5:
        radius = np.sqrt(dx * dx + dy * dy)
        return np.maximum(radius - side * kind(OUTER), side * kind(RING * OUTER) - radius)
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == 1:
        return np.maximum(ax, ay) - side * kind(0.5)
    if shape == 3:
        return (ax + ay - side * kind(np.sqrt(0.5))) * kind(np.sqrt(0.5))
    arm = side * kind(0.5 / np.sqrt(5))
    return np.maximum(np.minimum(ax, ay) - arm, np.maximum(ax, ay) - kind(3) * arm)


@cache
def outline(shape: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points of a shape of area 1 about its centre: 54 on the outer outline and 96 inside, each (n,2)."""
    corner = np.arctan2(HALF_HEIGHT[2], HALF_WIDTH[2])
    arms = np.arctan2(1.0, 3.0)
    turns = np.pi / 2 * np.arange(4)
    angles = np.concatenate([np.arange(44) * np.pi / 22, [corner, np.pi - corner], turns + arms, turns - arms])
    ray = np.stack([np.cos(angles), np.sin(angles)], 1)
    low, high = np.full(len(ray), OUTER * RING + 1e-6 if shape == 5 else 0.0), np.ones(len(ray))
    for _ in range(40):
        half = (low + high) / 2
        inside = distance(shape, ray[:, 0] * half, ray[:, 1] * half, np.ones(len(ray))) < 0
        low, high = np.where(inside, half, low), np.where(inside, high, half)
    spread = np.arange(1024)[:, None] * (0.7548776662466927, 0.5698402909980532) % 1 * 2 - 1  # evenly, by the R2 sequence
    points = spread * (HALF_WIDTH[shape], HALF_HEIGHT[shape])
    points = points[distance(shape, points[:, 0], points[:, 1], np.ones(len(points))) < 0]
    return ray * low[:, None], points[:96]


@cache
def outlines() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The points of all shapes: (6,54,2) and (6,96,2)."""
    both = [outline(shape) for shape in range(6)]
    return np.stack([edge for edge, _ in both]), np.stack([inner for _, inner in both])


def distances(shape: NDArray[np.int64], points: NDArray, x: NDArray, y: NDArray, side: NDArray) -> NDArray:
    """Signed distances of points (N,T,P,2) to object n, candidate t: shape and side (N,), x and y (N,T)."""
    out = np.ones(points.shape[:-1])
    for kind in range(6):
        rows = np.flatnonzero(shape == kind)
        if len(rows):
            dx, dy = points[rows, ..., 0] - x[rows][..., None], points[rows, ..., 1] - y[rows][..., None]
            out[rows] = distance(kind, dx, dy, side[rows, None, None])
    return out


def relation_of(dx: NDArray, dy: NDArray) -> NDArray[np.int64]:
    """What the first object is of the second, from second minus first: an index of `scene_spec.RELATIONS`, or -1 where none is plain."""
    ax, ay = np.abs(dx), np.abs(dy)
    across, along = (ax > 0.15) & (ax > 1.3 * ay), (ay > 0.15) & (ay > 1.3 * ax)
    return np.where(across, np.where(dx > 0, 0, 1), np.where(along, np.where(dy > 0, 2, 3), -1))
