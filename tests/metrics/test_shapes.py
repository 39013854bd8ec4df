"""Overlap of drawn objects with the ideal shape: pictures whose outlines are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from ldm.data.scenes.checker import read
from ldm.data.scenes.geometry import distance
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.metrics.shapes import overlaps, summary


def measured(images: np.ndarray) -> np.ndarray:
    return overlaps(images, read(images))


def painted(shape: int, *, side: float = 0.4, size: int = 64, corner: float = 0.0, bite: float = 0.0) -> np.ndarray:
    """A red shape in the middle of a white picture, its corners rounded by a radius, a disc of it bitten out."""
    fine = 8 * size
    ticks = (np.arange(fine) + 0.5) / fine - 0.5
    dx, dy = np.meshgrid(ticks, ticks)
    inside = distance(shape, dx, dy, np.full(dx.shape, side)) < 0
    if corner:
        eroded = ndimage.distance_transform_edt(inside) > corner * fine
        inside = ndimage.distance_transform_edt(~eroded) <= corner * fine
    inside &= np.hypot(dx - side * 0.45, dy) > bite
    alpha = inside.reshape(size, 8, size, 8).mean((1, 3))[..., None]
    return (255 * (alpha * np.array([0.88, 0.12, 0.14]) + (1 - alpha) * 0.9)).astype(np.uint8)[None]


@pytest.mark.parametrize(("tier", "size", "median", "worst"), [("one", 64, 0.985, 0.97), ("one", 32, 0.97, 0.93), ("T1", 64, 0.98, 0.95)])
def test_perfect_pictures_cover_their_shapes(tier, size, median, worst):
    images = to_bytes(render(prompts(tier, 24).specs, size))
    found = summary(measured(images))
    assert found["iou"] > median and found["iou_worst"] > worst
    blurred = ndimage.gaussian_filter(images.astype(float), (0, size / 32, size / 32, 0)).astype(np.uint8)
    assert summary(measured(blurred))["iou"] < found["iou"] - 0.005


def test_round_corners_of_a_square_cost_their_area():
    """A radius r takes (4 - pi) r² from a square of side s; the best square is a little smaller than the whole one."""
    whole, found = measured(painted(1)), []
    for radius in (0.05, 0.1):
        lost = (4 - np.pi) * (radius / 0.4) ** 2
        [overlap] = measured(painted(1, corner=radius))
        assert 1 - 1.3 * lost - 0.02 < overlap < 1 - 0.4 * lost, radius
        found.append(overlap)
    assert whole[0] > 0.99 > found[0] > found[1]


def test_a_bite_costs_its_area_and_place_and_size_cost_nothing():
    assert 0.85 < measured(painted(0, bite=0.08))[0] < 0.97
    moved = np.roll(painted(0), (7, -5), (1, 2))
    assert measured(moved)[0] == pytest.approx(measured(painted(0))[0], abs=0.005)
    assert measured(painted(0, side=0.36))[0] > 0.98


def test_nothing_read_is_nothing_measured():
    blank = np.full((2, 32, 32, 3), 230, np.uint8)
    assert len(measured(blank)) == 0 and summary(measured(blank)) == {}
