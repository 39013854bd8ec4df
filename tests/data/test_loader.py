"""The order of samples is a formula; ranks, restarts and workers only cut it differently."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config.errors import UserError
from ldm.data.loader import Foreseen, batches, fed, ordered
from ldm.data.order import shuffled
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng


class Numbers:
    """A data set whose images say their own number, position and seed."""

    mirrors = True

    def __init__(self, n: int, broken: int | None = None) -> None:
        self.n, self.broken = n, broken
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.n

    def load(self, index: Sequence[int], position: Sequence[int], resolution: int, seed: int, flip: bool) -> ImageBatch:
        if self.broken in index:
            raise OSError("the disk is gone")
        self.threads.add(threading.current_thread().name)
        noise = Rng(seed, position).uniform("crop").float().view(-1, 1, 1, 1)
        image = (torch.tensor(list(index)).float().view(-1, 1, 1, 1) + noise + flip).expand(-1, 3, resolution, resolution)
        return ImageBatch(
            image=image.contiguous(),
            caption=tuple(f"number {i}" for i in index),
            size=torch.zeros(len(index), 6),
            position=torch.tensor(list(position)),
        )

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        return [f"number {i}" for i in index]

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        return [[f"number {i}"] for i in index]

    def origin(self, index: int) -> str:
        return f"number {index}"

    def describe(self) -> dict[str, object]:
        return {}

    def fingerprint(self) -> str:
        return str(self.n)


def same(a: ImageBatch, b: ImageBatch) -> bool:
    return torch.equal(a.image, b.image) and a.caption == b.caption and torch.equal(a.position, b.position)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(n, seed, epoch):
    index = shuffled(seed, np.arange(epoch * n, (epoch + 1) * n), n)
    assert index.dtype == np.int64 and np.array_equal(np.sort(index), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 10**12), seed=st.integers(0, 2**32), position=st.lists(st.integers(0, 2**50), max_size=40))
def test_a_position_does_not_depend_on_its_neighbours(n, seed, position):
    together = shuffled(seed, position, n)
    assert [int(shuffled(seed, [p], n)[0]) for p in position] == together.tolist()
    assert all(0 <= i < n for i in together)


def test_orders_differ_by_epoch_and_seed_and_look_random():
    n = 1000
    first, second = shuffled(0, np.arange(n), n), shuffled(0, np.arange(n, 2 * n), n)
    assert (first == second).sum() < 10 and (first == shuffled(1, np.arange(n), n)).sum() < 10
    # Rank correlation with the identity, between neighbours and between epochs is that of chance (sd about 0.03).
    for a, b in ((first, np.arange(n)), (first[1:], first[:-1]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.13
    # All orders of three are equally likely: chi-square with 5 degrees of freedom, 20.5 at one in a thousand.
    orders = [tuple(order) for order in shuffled(7, np.arange(3600), 3).reshape(-1, 3).tolist()]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and sum((c - 200) ** 2 / 200 for c in counts) < 20.5


def test_an_epoch_covers_the_data_and_the_tail_goes_on_into_the_next():
    data = Numbers(10)
    found = list(batches(data, seed=3, batch=4, resolution=2, stop=5))
    captions = [c for b in found for c in b.caption]
    assert len(captions) == 20
    assert sorted(captions[:10]) == sorted(captions[10:]) == sorted(f"number {i}" for i in range(10))
    assert captions[:10] != captions[10:]
    assert torch.cat([b.position for b in found]).tolist() == list(range(20))
    assert [len(b.caption) for b in found] == [4] * 5


def test_a_batch_may_be_larger_than_the_data():
    (found,) = batches(Numbers(3), seed=0, batch=8, resolution=2, stop=1)
    assert sorted(found.caption[:3]) == sorted(found.caption[3:6]) == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_what_one_process_sees(world):
    options = {"seed": 5, "batch": 8, "resolution": 2, "flip": True, "start": 2, "stop": 6}
    alone = list(batches(Numbers(21), **options))
    ranks = [list(batches(Numbers(21), rank=(r, world), **options)) for r in range(world)]
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(torch.cat([p.image for p in parts]), whole.image)
        assert torch.equal(torch.cat([p.position for p in parts]), whole.position)
        assert sum((p.caption for p in parts), ()) == whole.caption


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_starting_at_a_step_equals_coming_to_it(workers):
    options = {"seed": 1, "batch": 6, "resolution": 2, "stop": 9}
    through = list(batches(Numbers(13), **options))
    again = list(batches(Numbers(13), start=4, workers=workers, **options))
    assert len(again) == 5 and all(same(a, b) for a, b in zip(through[4:], again, strict=True))


@pytest.mark.parametrize("start", [0, 1])
def test_resolutions_take_turns_by_step(start):
    found = list(batches(Numbers(9), seed=0, batch=2, resolution=(2, 4), start=start, stop=4, workers=2))
    assert [b.image.shape[-1] for b in found] == [2, 4, 2, 4][start:]


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_workers_change_nothing(workers):
    data = Numbers(50)
    options = {"seed": 2, "batch": 36, "resolution": 2, "stop": 4}
    threaded = list(batches(data, workers=workers, **options))
    assert all(same(a, b) for a, b in zip(batches(Numbers(50), **options), threaded, strict=True))
    assert all(name.startswith("loader-") for name in data.threads)


def test_without_a_stop_it_never_ends_and_threads_end_with_it():
    before = threading.active_count()
    feed = batches(Numbers(5), seed=0, batch=2, resolution=2, workers=3)
    assert [next(feed).position[0].item() for _ in range(20)] == list(range(0, 40, 2))
    feed.close()
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_the_steps_after_the_last_are_not_loaded():
    assert list(batches(Numbers(5), seed=0, batch=2, resolution=2, start=3, stop=3, workers=2)) == []


def test_an_unequal_share_and_an_empty_set_are_refused():
    with pytest.raises(UserError, match=r"batch: 10 .* 4 processes"):
        next(batches(Numbers(5), seed=0, batch=10, resolution=2, rank=(0, 4)))
    with pytest.raises(UserError, match="empty"):
        next(batches(Numbers(0), seed=0, batch=10, resolution=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_comes_out_where_its_batch_would(workers):
    order = shuffled(0, np.arange(12), 12).tolist()
    feed = batches(Numbers(12, broken=order[7]), seed=0, batch=2, resolution=2, stop=6, workers=workers)
    assert [len(next(feed).caption) for _ in range(3)] == [2, 2, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(feed)


def test_a_hanging_read_is_named_and_does_not_last_for_ever():
    release = threading.Event()

    class Hanging:
        def __call__(self) -> int:
            release.wait(250)
            return 1

        def __str__(self) -> str:
            return "photo.jpg"

    started = time.monotonic()
    feed = ordered(iter([[lambda: 0], [Hanging()]]), workers=1, stalled_s=0.2)
    assert next(feed) == [0]
    with pytest.raises(UserError, match=r"photo\.jpg"):
        next(feed)
    assert time.monotonic() - started < 120  # and not the reader's 250 s
    release.set()


def test_a_timeout_of_the_task_itself_stays_what_it_is():
    def fails() -> int:
        raise TimeoutError("server")

    with pytest.raises(TimeoutError, match="server"):
        list(ordered(iter([[fails]]), workers=1))


@pytest.mark.parametrize("workers", [0, 3])
def test_what_is_drawn_for_a_shape_is_drawn_ahead_by_the_threads(workers: int) -> None:
    threads: set[str] = set()

    def masks(rng: Rng) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        return rng.uniform("mask", (2,)) < 0.5

    def drawn(rng: Rng) -> list[torch.Tensor]:
        return [rng.normal("eps", (3, 2)), rng.uniform("t"), rng.made(("masks", "", (2,)), masks)]

    foreseen: Foreseen = {}
    ahead = []
    for shape, batch in fed(Numbers(40), foreseen=foreseen, seed=7, batch=36, resolution=(2, 4), stop=9, workers=workers):
        positions = batch.batch.position
        assert shape == batch.batch.image.shape[-1]
        ahead.append(len(batch.draws))
        found = drawn(Rng(7, positions, batch.draws, foreseen[shape]))
        assert all(torch.equal(a, b) for a, b in zip(found, drawn(Rng(7, positions)), strict=True))
    assert ahead[:2] == [0, 0] and ahead[-2:] == [3, 3], "each shape is learned by itself"
    assert not workers or any(name.startswith("loader-") for name in threads)
