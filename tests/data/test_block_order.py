"""Blocks of samples that lie side by side are shuffled by arithmetic: every sample once an epoch, any step, any number of processes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.data.order import BlockBatches


def lines(order: BlockBatches, turns: int) -> NDArray[np.int64]:
    """(turns, batch, block): the samples of each row's blocks."""
    steps = np.stack([order.at(step, 0, order.batch)[0] for step in range(turns * order.block)])
    return steps.reshape(turns, order.block, order.batch).transpose(0, 2, 1)


@pytest.mark.parametrize(
    ("samples", "batch", "block"), [(1000, 8, 16), (1024, 8, 16), (997, 4, 64), (130, 2, 64), (50, 4, 64), (3, 8, 64), (1, 2, 4)]
)
def test_every_sample_is_in_one_block_of_each_epoch(samples, batch, block):
    order = BlockBatches(3, samples, batch, [64], block)
    epochs = 5
    turns = -(-epochs * samples // (batch * order.block))
    line = lines(order, turns).reshape(-1, order.block)
    whole = line.reshape(-1)[: epochs * samples]
    counted = Counter(whole.tolist())
    assert set(counted) == set(range(samples))
    if samples % order.block == 0:
        assert set(counted.values()) == {epochs}
    # Blocks that lie in two epochs have samples of both: to the end of any epoch all have come equally often, but for those.
    for epoch in range(1, epochs):
        upto = Counter(line.reshape(-1)[: epoch * samples // order.block * order.block].tolist())
        assert max(upto.values()) <= epoch and sum(epoch - upto[i] for i in range(samples)) < order.block
    for number, row in enumerate(line):
        first, last = number * order.block, (number + 1) * order.block - 1
        if first // samples == last // samples:  # within one epoch it is one stretch of the data, which may go on at the beginning
            assert set(row.tolist()) in [{(start + i) % samples for i in range(order.block)} for start in row.tolist()]


def test_any_rows_of_any_step_are_those_of_the_whole():
    order = BlockBatches(7, 10_000, 12, [64, 32], 16)
    for step in (0, 15, 16, 999):
        whole, shape = order.at(step, 0, 12)
        assert shape == (64, 32)[step % 2]
        for world in (2, 3, 4):
            parts = [order.at(step, rank * 12 // world, 12 // world)[0] for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(order.at(5, 0, 12)[0], BlockBatches(8, 10_000, 12, [64], 16).at(5, 0, 12)[0])


def test_a_batch_is_drawn_from_all_over_the_data_and_blocks_change_with_the_epoch():
    samples, batch, block = 2**16, 64, 16
    order = BlockBatches(0, samples, batch, [8], block)
    spread = [np.corrcoef(np.arange(batch), order.at(step * 7, 0, batch)[0])[0, 1] for step in range(60)]
    assert abs(np.mean(spread)) < 4 / np.sqrt(60 * batch)  # of independent draws the mean has a deviation of 1 / sqrt(60 x 64)
    quarters = np.bincount(np.concatenate([order.at(step * block, 0, batch)[0] for step in range(60)]) // (samples // 4), minlength=4)
    assert (abs(quarters - 960) < 5 * np.sqrt(960 * 0.75)).all()
    samples = 2**13
    order, turns = BlockBatches(0, samples, batch, [8], block), samples // (batch * block)
    begins = [{int(row.min()) % block for row in lines(order, turns * 2)[turns * e : turns * (e + 1)].reshape(-1, block)} for e in (0, 1)]
    assert begins[0] != begins[1]  # cut at other places


@pytest.mark.parametrize("start", [0, 5, 16, 30])
@pytest.mark.parametrize("ends", [True, False])
def test_what_is_read_ahead_is_what_is_loaded_each_time_once_and_before(start, ends):
    order = BlockBatches(1, 3000, 8, [8], 16)
    for first, count in ((0, 8), (4, 4), (2, 1)):
        held: Counter[int] = Counter()
        requests = []
        for step in range(start, start + 100):
            asked = list(order.ahead(step, first, count, begins=step == start, stop=start + 100 if ends else None))
            requests.append(len(asked))
            for block in asked:
                held.update(block.tolist())
            for sample in order.at(step, first, count)[0].tolist():
                assert held[sample] > 0
                held[sample] -= 1
        assert sum(held.values()) <= (0 if ends else 2 * count * order.block)
        assert max(requests[1:]) <= max(1, -(-count * 4 // (3 * order.block)) + 1)  # spread over the steps


def test_no_samples_are_refused():
    with pytest.raises(UserError, match="empty"):
        BlockBatches(0, 0, 4, [8], 16)
