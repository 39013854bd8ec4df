"""Simulated data order, at any number of samples and ranks: it is a formula, so any position can be asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.data.order import ShuffledBatches
from ldm.diffusion.rng import mix

DRAWN = 1_000_000  # positions of the whole epoch that are looked at
SMALL = 50_000  # samples of the copy whose whole epoch is looked at
CHUNK = 65_536  # positions at a time
STATE_BYTES = 8  # what has to be saved of the order: the number of the next batch


@dataclass(frozen=True)
class Simulated:
    """What was found; nothing repeated and nothing missing is what is right."""

    samples: int
    batch: int
    processes: int
    drawn: int  # positions of the first epoch that were computed
    repeated: int  # samples that came twice among them
    outside: int  # numbers that no sample has
    small: int  # samples of the copy
    small_wrong: int  # samples of the copy that its first two epochs did not show exactly twice, over all processes
    steps: int  # global batches whose parts were put together
    parts_wrong: int  # of them, those whose parts over the processes were not the whole
    seconds: float

    @property
    def right(self) -> bool:
        """Whether all of it is as it should be."""
        return not (self.repeated or self.outside or self.small_wrong or self.parts_wrong)

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        judged = "right" if self.right else "WRONG"
        yield f"order of {self.samples:,} samples, batch {self.batch:,} on {self.processes:,} processes: {judged}"
        yield f"  {self.drawn:,} positions of the first epoch: {self.repeated:,} samples twice, {self.outside:,} out of range"
        yield f"  two whole epochs of {self.small:,}: {self.small_wrong:,} samples not seen exactly twice"
        yield f"  {self.steps:,} batches put together from their parts: {self.parts_wrong:,} wrong"
        yield f"  state to save: the number of the next batch, {STATE_BYTES} bytes; computed in {self.seconds:.1f} s"


def simulate(samples: int, batch: int, processes: int, seed: int = 0) -> Simulated:
    """Ask the order of a stage for positions all over its first epoch, and try a small copy of it exhaustively.

    Memory does not depend on `samples`: positions are drawn one from each of DRAWN equal parts of the epoch, so none twice.

    Args:
        samples: how many the data has.
        batch: of one update, over all processes.
        processes: that share it equally.

    Raises:
        UserError: for a batch that cannot be shared equally.
    """
    if batch % processes:
        raise UserError(f"batch: {plural(batch, 'image')} cannot be shared equally by {processes} processes; give a multiple")
    started = time.monotonic()
    seed = mix(seed, "simulation") % 2**63
    numbers = _drawn(samples, seed)
    found = np.unique(numbers)
    small = min(samples, SMALL)
    steps = sorted({0, 1, max(0, samples // batch - 1), samples // batch, samples // batch + 1, 3 * samples // batch})
    return Simulated(
        samples=samples,
        batch=batch,
        processes=processes,
        drawn=len(numbers),
        repeated=len(numbers) - len(found),
        outside=int(((found < 0) | (found >= samples)).sum()),
        small=small,
        small_wrong=_small(small, batch, processes, seed),
        steps=len(steps),
        parts_wrong=sum(_parted(samples, batch, processes, seed, step) for step in steps),
        seconds=time.monotonic() - started,
    )


def _drawn(samples: int, seed: int) -> np.ndarray:
    """Sample numbers at DRAWN positions (at all, where there are fewer) spread over the first epoch."""
    count = min(samples, DRAWN)
    order = ShuffledBatches(seed, samples, 1, [0])
    rng = np.random.Generator(np.random.Philox(seed % 2**64))
    out = np.empty(count, np.int64)
    for start in range(0, count, CHUNK):
        part = np.arange(start, min(start + CHUNK, count))
        low = part * samples // count if samples < 2**42 else np.array([int(i) * samples // count for i in part])
        high = (part + 1) * samples // count if samples < 2**42 else np.array([(int(i) + 1) * samples // count for i in part])
        position = low + (rng.random(len(part)) * (high - low)).astype(np.int64)
        out[start : start + len(part)] = order.numbers(position)
    return out


def _small(samples: int, batch: int, processes: int, seed: int) -> int:
    """Samples that two epochs of batches, cut by process, do not show exactly twice."""
    order, seen = ShuffledBatches(seed, samples, batch, [0]), np.zeros(samples, np.int64)
    size, left = batch // processes, 2 * samples
    for step in range(math.ceil(2 * samples / batch)):
        for rank in range(processes):
            count = max(0, min(size, left - rank * size))
            if count:
                found = order.at(step, rank * size, count)[0]
                np.add.at(seen, found[(found >= 0) & (found < samples)], 1)
        left -= batch
    return int((seen != 2).sum())


def _parted(samples: int, batch: int, processes: int, seed: int, step: int) -> bool:
    """Whether the processes' parts of a batch are not the batch."""
    order, size = ShuffledBatches(seed, samples, batch, [0]), batch // processes
    parts = np.concatenate([order.at(step, rank * size, size)[0] for rank in range(processes)])
    return not np.array_equal(parts, order.at(step, 0, batch)[0])
