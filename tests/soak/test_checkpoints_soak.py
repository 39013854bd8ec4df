"""The full figures of the faults that checkpoints survive: `python -m pytest -m soak -s tests/soak/test_checkpoints_soak.py`."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from faults import child, flip, is_whole, save
from test_checkpoint_faults import killed_until_done, needs_fork, silent
from test_snapshot import trainer

from ldm.formats import atomic
from ldm.training.checkpoint import newest_valid

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def test_ten_thousand_turned_bits(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    newest, chance, started = save(tmp_path, 2, 2), random.Random(1), time.monotonic()
    for _ in range(10_000):
        back = flip(newest, chance)
        found = newest_valid(tmp_path, silent)
        assert found is not None and is_whole(found, 1)
        back()
    print(f"\n10,000 turned bits: none accepted, {time.monotonic() - started:.0f} s")


@needs_fork
def test_a_hundred_kills(tmp_path: Path) -> None:
    assert child(lambda: trainer(tmp_path / "whole", 64).run() and None)
    whole, same, started = atomic.verify(tmp_path / "whole" / "stage" / "model"), 0, time.monotonic()
    for number in range(10):
        folder = tmp_path / str(number)
        assert killed_until_done(folder, 10, random.Random(number)) == 10
        same += atomic.verify(folder / "stage" / "model") == whole
    print(f"\n100 kills in 10 trainings: {same} of 10 end with the same bits, {time.monotonic() - started:.0f} s")
    assert same == 10


@needs_fork
def test_there_is_a_valid_state_at_every_moment(tmp_path: Path) -> None:
    """keep: 1, killed a hundred times at random: the newest whole state never goes back."""
    chance, last, found_always = random.Random(2), 0, 0
    save(tmp_path, 0, 1)
    for _ in range(100):

        def work(first: int = last) -> None:
            for step in range(first + 1, first + 10_000):
                save(tmp_path, step, 1)

        child(work, 0.005 + chance.random() * 0.1)
        found = newest_valid(tmp_path, silent)
        assert found is not None and is_whole(found, found[2].step) and found[2]["step"] >= last
        last, found_always = found[2].step, found_always + 1
    print(f"\nkeep 1, 100 kills over {last} saves: {found_always} times a whole newest state, never an older one")
