"""Batch samplers: stateless shuffling by seed and global batch number, so that any batch can be addressed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.data.images import Shape
from ldm.diffusion.rng import mix

ROUNDS = 8  # of the Feistel network


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele 2014): every bit of the result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


def shuffled(seed: int, position: Sequence[int] | np.ndarray, n: int) -> np.ndarray:
    """The sample numbers (int64, in [0,n)) at global positions, each epoch p // n being a permutation of its own.

    A Feistel network over the next power of two, walked until it lands below n: constant time and memory per position.
    """
    if n < 1:
        raise UserError("the data set is empty")
    position = np.asarray(position, dtype=np.int64)
    epoch, value = np.divmod(position, n)
    if n == 1:
        return value
    bits = max(6, (n - 1).bit_length())  # below 64 values a Feistel network mixes poorly
    low = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << (bits // 2)) - 1), np.uint64((1 << (bits - bits // 2)) - 1)
    key = _scramble(np.uint64(mix(seed, "order")) ^ _scramble(epoch.astype(np.uint64) + np.uint64(1)))
    value = value.astype(np.uint64)
    out = np.empty(len(position), np.int64)
    todo = np.arange(len(position))
    while len(todo):
        left, right = value >> low, value & low_mask
        for r in range(0, ROUNDS, 2):
            left = left ^ (_scramble(key + right * np.uint64(ROUNDS) + np.uint64(r)) & high_mask)
            right = right ^ (_scramble(key + left * np.uint64(ROUNDS) + np.uint64(r + 1)) & low_mask)
        value = (left << low) | right
        done = value < n
        out[todo[done]] = value[done]
        todo, value, key = todo[~done], value[~done], key[~done]
    return out


class BatchSampler(Protocol):
    """Batch sampler: which samples make up each global batch."""

    def at(self, step: int, first: int, count: int) -> tuple[NDArray[np.int64], Shape]:
        """The sample numbers of rows first to first + count - 1 of batch `step`, and the shape of that whole batch."""
        ...


@runtime_checkable
class AheadSampler(BatchSampler, Protocol):
    """Batch sampler that knows what is worth reading with one request."""

    def ahead(self, step: int, first: int, count: int, *, begins: bool, stop: int | None) -> Iterator[NDArray[np.int64]]:
        """What to read when these rows of batch `step` are prepared; `begins`: nothing was read before; `stop`: all ends there."""
        ...


class ShuffledBatches:
    """Shuffling batch sampler: every sample once in each epoch, in its own order; past the end the next begins, inside a batch too.

    Args:
        seed: of the order.
        samples: how many there are.
        batch: rows of a global batch.
        shapes: taken in turn from batch to batch.
    """

    def __init__(self, seed: int, samples: int, batch: int, shapes: Sequence[Shape]) -> None:
        self.seed, self.samples, self.batch, self.shapes = seed, samples, batch, tuple(shapes)

    def at(self, step: int, first: int, count: int) -> tuple[NDArray[np.int64], Shape]:
        """As `BatchSampler.at`."""
        start = step * self.batch + first
        return self.numbers(np.arange(start, start + count)), self.shapes[step % len(self.shapes)]

    def numbers(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample numbers at global positions."""
        return shuffled(self.seed, position, self.samples)


class BlockBatches:
    """Block-shuffling batch sampler: samples that lie side by side are seen near each other in time, but not in one batch.

    An epoch's samples, turned by a random number, are cut into blocks of equal length, and the blocks are shuffled. Every row of a batch
    has a block of its own, and takes one sample of it, in random order, at each of as many steps as a block is long: a block is read with
    one request, by the one process that has the row. It is a shuffle buffer of batch x block samples that no process has to hold as a
    whole, and still arithmetic on the position: any step can be addressed, and the order does not depend on how many processes there are.

    Every sample is in one block of each epoch. Epochs overlap by at most batch x block samples, as the last blocks of one are seen beside
    the first of the next: a batch of such a seam may have samples that lie side by side, or one sample twice.

    Args:
        seed: of the order.
        samples: how many there are.
        batch: rows of a global batch.
        shapes: taken in turn from batch to batch.
        block: samples of a block; where there are fewer than batch x block samples, as many as go into a batch's rows.
    """

    def __init__(self, seed: int, samples: int, batch: int, shapes: Sequence[Shape], block: int) -> None:
        if samples < 1:
            raise UserError("the data set is empty")
        self.seed, self.samples, self.batch, self.shapes = seed, samples, batch, tuple(shapes)
        self.block = max(1, min(block, samples // batch))

    def at(self, step: int, first: int, count: int) -> tuple[NDArray[np.int64], Shape]:
        """As `BatchSampler.at`."""
        turn, within = divmod(step, self.block)
        blocks = turn * self.batch + np.arange(first, first + count)
        return self._samples(blocks, np.full(count, within)), self.shapes[step % len(self.shapes)]

    def _samples(self, block: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample numbers at places in blocks."""
        inside = shuffled(mix(self.seed, "within"), block * self.block + within, self.block)  # each block in an order of its own
        return self._numbers(self._moved(block) * self.block + inside)

    def _moved(self, block: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which block of the unshuffled line stands at each place: those that lie in one epoch as a whole change places."""
        epoch = block * self.block // self.samples
        first = -(-epoch * self.samples // self.block)  # whole blocks of an epoch: first to last - 1
        last = (epoch + 1) * self.samples // self.block
        found = block.copy()
        for e in np.unique(epoch).tolist():
            here = np.flatnonzero((epoch == e) & (block >= first) & (block < last))
            if len(here):
                begin, count = int(first[here[0]]), int(last[here[0]] - first[here[0]])
                found[here] = begin + shuffled(mix(self.seed, "blocks", e), block[here] - begin, count)
        return found

    def _numbers(self, line: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample numbers along the line, which passes all of them in their order, from a random one on, in each epoch."""
        epoch, place = np.divmod(line, self.samples)
        turned = {e: mix(self.seed, "turned", e) % self.samples for e in np.unique(epoch).tolist()}
        return (place + np.array([turned[e] for e in epoch.tolist()], np.int64)) % self.samples

    def ahead(self, step: int, first: int, count: int, *, begins: bool, stop: int | None) -> Iterator[NDArray[np.int64]]:
        """What to read when the rows first to first + count - 1 of batch `step` are prepared: the samples of whole blocks.

        The rows' next blocks are asked for one after the other during the first three quarters of a turn, so that a store has its
        requests spread over time.

        Args:
            begins: it is the first step, before which nothing was asked for: what the present blocks still have comes too.
            stop: the step before which all ends; None: never.
        """
        turn, within = divmod(step, self.block)
        rows = np.arange(first, first + count)
        due = rows * self.block * 3 // (4 * self.batch)  # when in a turn the row's next block is asked for
        if begins:
            for row in rows.tolist():
                yield self._block(turn * self.batch + row)[within : None if stop is None else stop - turn * self.block]
        left = self.block if stop is None else stop - (turn + 1) * self.block  # of the next blocks
        for row in rows[(due <= within) if begins else (due == within)].tolist():
            if left > 0:
                yield self._block((turn + 1) * self.batch + row)[:left]

    def _block(self, block: int) -> NDArray[np.int64]:
        return self._samples(np.full(self.block, block), np.arange(self.block))


class BucketedBatches:
    """Bucket batch sampler: batches of one shape each, a sample in its bucket's shape alone.

    Buckets come in a random order, in proportion to their sizes: after e epochs a bucket of n samples has had
    floor(e n / batch) batches, of as many permutations of its samples as these take. What does not fill a batch at the end
    of an epoch is not dropped but waits for the next, so a bucket smaller than a batch has one every few epochs. All of it is
    arithmetic on the batch's number.

    Args:
        seed: of the order.
        bucket: (N,) of which shape each sample is.
        shapes: by number.
        batch: rows of a global batch.
    """

    def __init__(self, seed: int, bucket: NDArray[np.integer], shapes: Sequence[Shape], batch: int) -> None:
        if not len(bucket):
            raise UserError("the data set is empty")
        self.seed, self.batch = seed, batch
        there = [number for number in range(len(shapes)) if (bucket == number).any()]
        self.shapes = [shapes[number] for number in there]
        self.members = [np.flatnonzero(bucket == number).astype(np.int64) for number in there]
        self.counts = np.array([len(members) for members in self.members], np.int64)

    def _batches(self, epochs: int) -> NDArray[np.int64]:
        """Of each bucket in so many epochs."""
        # Python's integers: a product of two large ones must not run over.
        return np.array([epochs * int(count) // self.batch for count in self.counts], np.int64)

    def _epoch(self, step: int) -> int:
        """In which epoch a batch lies."""
        low, high = 0, 1
        while int(self._batches(high).sum()) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(self._batches(middle).sum()) <= step else (low, middle)
        return low

    def _lots(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Batches of each bucket before an epoch, and in it."""
        before = self._batches(epoch)
        return before, self._batches(epoch + 1) - before

    def _drawn(self, epoch: int, place: NDArray[np.int64], own: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The bucket at each place of an epoch, and which of the epoch's batches of that bucket it is."""
        lot = shuffled(mix(self.seed, "buckets", epoch), place, int(own.sum()))
        ends = np.cumsum(own)
        bucket = np.searchsorted(ends, lot, side="right")
        return bucket, lot - (ends - own)[bucket]

    def at(self, step: int, first: int, count: int) -> tuple[NDArray[np.int64], Shape]:
        """As `BatchSampler.at`."""
        epoch = self._epoch(step)
        before, own = self._lots(epoch)
        (bucket,), (number,) = self._drawn(epoch, np.array([step - int(before.sum())]), own)
        start = (int(before[bucket]) + int(number)) * self.batch + first
        members = self.members[bucket]
        chosen = shuffled(mix(self.seed, "bucket", int(bucket)), np.arange(start, start + count), len(members))
        return members[chosen], self.shapes[bucket]

    def batches(self, steps: int) -> NDArray[np.int64]:
        """How many of the first `steps` batches each bucket has."""
        epoch = self._epoch(steps)
        before, own = self._lots(epoch)
        places = np.arange(steps - int(before.sum()))
        if not len(places):
            return before
        return before + np.bincount(self._drawn(epoch, places, own)[0], minlength=len(self.shapes))
