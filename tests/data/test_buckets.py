"""Buckets hold nearly the area asked for, and each picture goes where it loses least."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.buckets import Buckets, assign, bucket_stage, cut_away, lines, shapes, wrong_step
from ldm.data.order import BucketedBatches


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


def stage_order(bucket: np.ndarray, seed: int, batch: int) -> BucketedBatches:
    return BucketedBatches(seed, bucket, [(8, 8 + 8 * n) for n in range(6)], batch)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 2**63), st.integers(1, 9), st.integers(1, 7), st.integers(0, 9))
def test_no_sample_is_left_out_or_favoured(buckets: list[int], seed: int, batch: int, epochs: int, more: int) -> None:
    bucket = np.array(buckets)
    order = stage_order(bucket, seed, batch)
    members = {(8, 8 + 8 * number): np.flatnonzero(bucket == number) for number in set(buckets)}
    whole = {shape: epochs * len(own) // batch for shape, own in members.items()}  # what does not fill a batch waits
    seen: dict[tuple[int, int], list[int]] = {shape: [] for shape in members}
    for step in range(sum(whole.values()) + more):
        if step == sum(whole.values()):
            for shape, own in members.items():  # the end of an epoch: all of a bucket equally often, but for those that wait
                counts = np.bincount(seen[shape], minlength=len(bucket))[own]
                assert counts.sum() == whole[shape] * batch and counts.max() - counts.min() <= 1
        index, shape = order.at(step, 0, batch)
        assert set(index.tolist()) <= set(members[shape].tolist())  # a batch has one shape, that of its samples
        seen[shape] += index.tolist()
    steps = sum(whole.values()) + more
    assert order.batches(steps).tolist() == [len(seen[shape]) // batch for shape in order.shapes]
    for shape, own in members.items():
        counts = np.bincount(seen[shape], minlength=len(bucket))[own]
        assert counts.max() - counts.min() <= 2 + batch // len(own)


def test_batches_are_addressed_by_number_and_cut_by_rank() -> None:
    bucket = np.random.default_rng(0).integers(0, 6, 500)
    order = stage_order(bucket, 7, 8)
    whole = [order.at(step, 0, 8) for step in range(200)]
    assert all(np.array_equal(order.at(step, 0, 8)[0], whole[step][0]) for step in (199, 3, 77))
    for ranks in (2, 4, 8):
        size = 8 // ranks
        for step in (0, 50, 199):
            parts = [order.at(step, rank * size, size) for rank in range(ranks)]
            assert np.concatenate([index for index, _ in parts]).tolist() == whole[step][0].tolist()
            assert {shape for _, shape in parts} == {whole[step][1]}
    assert not np.array_equal(stage_order(bucket, 8, 8).at(0, 0, 8)[0], whole[0][0])  # another seed, another order
    far, _ = order.at(10**12, 0, 8)  # no counter, no state
    assert len(far) == 8
    shapes_seen = [shape for _, shape in whole[:60]]
    assert any(a != b for a, b in zip(shapes_seen, shapes_seen[1:], strict=False))  # buckets are mixed, not one after the other


class Sizes:
    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self._sizes = np.array(sizes, np.int32)

    def sizes(self) -> np.ndarray:
        return self._sizes


def test_what_is_not_reached_is_counted() -> None:
    data = Sizes([(64, 64)] * 30 + [(64, 128)] * 3)
    found = bucket_stage(data, Buckets(), resolution=64, seed=0, batch=8, steps=4)
    assert found is not None and [row["images"] for row in found.rows] == [30, 3]
    assert sum(row["updates"] for row in found.rows) == 4 and found.missed == 3
    told = lines(found.rows)
    assert "64 x 64" in told[0] and "3 never reached" in told[1] and "96 x 40" not in told[0]
    enough = bucket_stage(data, Buckets(), resolution=64, seed=0, batch=8, steps=40)
    assert enough is not None and enough.missed == 0
    assert bucket_stage(object(), Buckets(), resolution=64, seed=0, batch=8, steps=4) is None  # no sizes: squares


def test_settings_that_make_no_shapes_are_refused() -> None:
    def wrong(resolution: int = 64, factor: int = 8, **fields: float) -> list[str]:
        return list(wrong_step(Buckets(**fields), resolution, factor, "stages.x.buckets"))  # type: ignore[arg-type]

    assert wrong() == wrong(512) == []
    assert wrong(step=12) == ["stages.x.buckets.step: got 12; the autoencoder needs a multiple of 8"]
    assert "more than resolution" in wrong(step=128)[0] and "at least as long" in wrong(max_aspect=0.5)[0]
