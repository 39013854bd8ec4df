"""Buckets hold nearly the area asked for, and each picture goes where it loses least."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.buckets import assign, cut_away, shapes


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (64, 8), (256, 64)])
def test_shapes_are_multiples_of_the_step_within_the_area_and_the_aspect(resolution, step):
    found = shapes(resolution, step)
    assert (resolution, resolution) in found and len(found) == len(set(found))
    for height, width in found:
        assert height % step == width % step == 0 and height * width <= resolution**2
        assert (height + step) * width > resolution**2 or (width + step) * height > resolution**2
        assert max(height, width) <= 2 * min(height, width) and (width, height) in found


def test_shapes_of_512_are_the_known_ones():
    assert {(512, 512), (448, 576), (576, 448), (384, 640), (640, 384)} <= set(shapes(512))


def test_each_picture_goes_where_its_aspect_is_nearest():
    choices = shapes(512)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 3000, (200, 2)).astype(np.int32)
    chosen = assign(sizes, choices)
    lost = cut_away(sizes, choices, chosen)
    for (height, width), c, cut in zip(sizes.tolist(), chosen.tolist(), lost.tolist(), strict=True):
        all_cuts = [1 - min(width / height / (w / h), w / h / (width / height)) for h, w in choices]
        assert cut == pytest.approx(all_cuts[c]) == pytest.approx(min(all_cuts))
