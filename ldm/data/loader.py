"""Data loader: deterministic batches addressed by step and rank, prefetched by threads."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.data import remote, threads
from ldm.data.dataset import B, Samples, expect, loaded
from ldm.data.images import Shape
from ldm.data.order import AheadSampler, BatchSampler, ShuffledBatches
from ldm.diffusion.batch import Fed, cat, pinned
from ldm.diffusion.rng import Makers, Rng

R = TypeVar("R")

AHEAD = 2  # batches that are being prepared while one is used
SLICE = 16  # samples per task at most, so that workers share a batch and a stalled read is narrowed down
STALLED_S = 60.0  # without a word from the oldest task


def batches(
    data: Samples[B],
    *,
    seed: int,
    batch: int,
    resolution: int | Sequence[int] = 0,
    order: BatchSampler | None = None,
    flip: bool = False,
    start: int = 0,
    stop: int | None = None,
    rank: tuple[int, int] = (0, 1),
    workers: int = 0,
) -> Iterator[B]:
    """This rank's part of the global batches start, start + 1, ... stop - 1; decoded pictures are bytes until `.to(device)`.

    Global batch s holds the global positions s * batch to (s + 1) * batch - 1, of which each rank takes a contiguous
    equal share. Nothing is dropped or padded.

    Args:
        batch: samples over all ranks together.
        resolution: px; several are taken in turn from batch to batch.
        order: which samples make up each batch, and in which shape; None: all shuffled, at `resolution`.
        stop: the step before which to end; None: never.
        rank: this process among how many.
        workers: threads that prepare batches ahead; 0: the caller's own thread does it when asked.

    Raises:
        UserError: if `batch` does not divide among the ranks, the data set is empty, or no sample arrives for a minute.
    """
    made = _slices(
        data, seed=seed, batch=batch, resolution=resolution, order=order, flip=flip, start=start, stop=stop, rank=rank, workers=workers
    )
    yield from ordered(made, workers, join=lambda parts: parts[0] if len(parts) == 1 else cat(parts))


def fed(data: Samples[B], *, foreseen: Foreseen, pin: bool = False, **options: Any) -> Iterator[tuple[Shape, Fed]]:
    """The same batches with their shapes, and with the draws that earlier batches of a shape were asked for.

    All is made and joined by the threads: what remains to be done with a batch is to send it.

    Args:
        foreseen: what is drawn for each shape; may grow while batches are taken.
        pin: whether batches lie in pinned memory, from which they can be sent to a GPU without waiting for it.
        options: of `batches`.
    """

    def join(parts: list[tuple[Shape, Fed]]) -> tuple[Shape, Fed]:
        shape, whole = parts[0][0], parts[0][1] if len(parts) == 1 else cat([part for _, part in parts])
        return shape, pinned(whole) if pin else whole

    yield from ordered(_slices(data, foreseen=foreseen, **options), options.get("workers", 0), join=join)


Foreseen = dict[Shape, Makers]  # what a loss draws, by the shape of the batch


def _slices(
    data: Samples[B],
    *,
    seed: int,
    batch: int,
    resolution: int | Sequence[int] = 0,
    order: BatchSampler | None = None,
    flip: bool = False,
    start: int = 0,
    stop: int | None = None,
    rank: tuple[int, int] = (0, 1),
    workers: int = 0,
    foreseen: Foreseen | None = None,
) -> Iterator[list[Callable[[], Any]]]:
    """What makes the parts of each batch; with `foreseen` (shape, Fed), else batches."""
    number, world = rank
    if batch % world:
        raise UserError(f"batch: {plural(batch, 'image')} cannot be shared equally by {world} processes; give a multiple")
    size = batch // world
    if len(data) == 0:
        raise UserError("the data set is empty")
    order = order or ShuffledBatches(seed, len(data), batch, [resolution] if isinstance(resolution, int) else list(resolution))
    cuts = max(1, min(size, max(workers, -(-size // SLICE)))) if workers else 1
    for step in count(start) if stop is None else range(start, stop):
        index, shape = order.at(step, number * size, size)
        if isinstance(order, AheadSampler):
            for numbers in order.ahead(step, number * size, size, begins=step == start, stop=stop):
                expect(data, numbers.tolist())
        first = step * batch + number * size
        makers = None if foreseen is None else dict(foreseen.setdefault(shape, {}))  # one for all parts, which must have the same draws
        yield [_Slice(data, i, p, shape, seed, flip, makers) for i, p in _cut(index, np.arange(first, first + size), cuts)]


def _settle(future: Future[R], task: Callable[[], R]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)


def _cut(index: np.ndarray, position: np.ndarray, cuts: int) -> Iterator[tuple[list[int], list[int]]]:
    for i, p in zip(np.array_split(index, cuts), np.array_split(position, cuts), strict=True):
        yield i.tolist(), p.tolist()


@dataclass(frozen=True)
class _Slice(Generic[B]):
    """A part of a batch, still to be loaded; it says what it is made of, for the message when it never arrives."""

    data: Samples[B]
    index: list[int]
    position: list[int]
    resolution: Shape
    seed: int
    flip: bool
    makers: Makers | None = None

    def __call__(self) -> B | tuple[Shape, Fed]:
        batch = loaded(self.data, self.index, self.position, self.resolution, self.seed, self.flip)
        if self.makers is None:
            return batch
        rng = Rng(self.seed, self.position)
        return self.resolution, Fed(batch=batch, draws={draw: make(rng) for draw, make in self.makers.items()})

    def __str__(self) -> str:
        return ", ".join(self.data.origin(i) for i in self.index)


def _result(future: Future[R], stalled_s: float) -> R:
    """A task's result; one that waits for a store has as long as the store's requests take.

    Raises:
        TimeoutError: if nothing comes for `stalled_s`, and no request is under way.
    """
    while True:
        try:
            return future.result(stalled_s)
        except TimeoutError:
            if future.done() or not remote.under_way():
                raise


@dataclass
class _Group(Generic[R]):
    """Tasks whose results are joined by the thread that ends the last one."""

    tasks: list[tuple[Future[R], Callable[[], R]]]
    join: Callable[[list[R]], Any]
    whole: Future[Any] = field(default_factory=Future)
    left: int = 0  # tasks that have not ended
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.left = len(self.tasks)

    def one(self, future: Future[R], task: Callable[[], R]) -> None:
        _settle(future, task)
        with self.lock:
            self.left -= 1
            last = self.left == 0
        if last and not any(one.cancelled() or one.exception() for one, _ in self.tasks):
            _settle(self.whole, lambda: self.join([one.result() for one, _ in self.tasks]))


def ordered(
    groups: Iterator[list[Callable[[], R]]], workers: int, stalled_s: float = STALLED_S, *, join: Callable[[list[R]], Any] = list
) -> Iterator[Any]:
    """Ordered thread pool map with prefetch: groups of tasks, joined results group by group in order.

    Up to AHEAD groups are being worked on.

    The threads are daemons: one that hangs in a read never keeps the process from ending.

    Raises:
        UserError: naming the task, if the oldest one gives nothing for `stalled_s`.
        Exception: whatever a task raised, where its result would have come.
    """
    if workers == 0:
        for group in groups:
            yield join([task() for task in group])
        return
    todo: queue.SimpleQueue[tuple[_Group[R], Future[R], Callable[[], R]] | None] = queue.SimpleQueue()

    def work() -> None:
        # These threads are the parallel ones: a team of further threads below each would wait for the others' turns on the cores.
        torch.set_num_threads(1)
        item: tuple[_Group[R], Future[R], Callable[[], R]] | None
        while (item := todo.get()) is not None:
            try:
                with threads.piece():
                    item[0].one(item[1], item[2])
                    item = None  # what it made is let go within the piece, too
            except threads.ProcessEnds:
                return

    def submit(tasks: list[Callable[[], R]]) -> _Group[R]:
        group = _Group([(Future[R](), task) for task in tasks], join)
        for future, task in group.tasks:
            todo.put((group, future, task))
        return group

    for i in range(workers):
        threads.start(work, f"loader-{i}")
    running = deque(submit(group) for group in islice(groups, AHEAD))
    try:
        while running:
            for future, task in running[0].tasks:
                try:
                    _result(future, stalled_s)
                except TimeoutError:
                    if future.done():  # the task's own
                        raise
                    raise UserError(f"no data for {stalled_s:.0f} s; stuck while reading one of: {task}") from None
            result = running.popleft().whole.result()
            running.extend(submit(group) for group in islice(groups, 1))
            yield result
            del result
    finally:
        for unused in running:
            for future, _ in unused.tasks:
                future.cancel()
        for _ in range(workers):
            todo.put(None)
