"""Threads of a training on a busy machine, with a pretended clock: fewer where steps collapse, and only where that helps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ldm.data.loader import ordered
from ldm.training.core_share import IN_A_ROW, QUIET, CoreShare, of_stage, waited

Step = Callable[[int, int], float]  # seconds of a step, by its number and the threads


class Machine:
    """So many threads, and what steps take with them."""

    def __init__(self, threads: int, seconds: Step, fixed: str = "", waiting: float = 0.0) -> None:
        self.threads, self.seconds, self.now, self.waiting = threads, seconds, 0.0, waiting
        self.share = CoreShare(fixed, lambda: self.threads, self.use, (lambda: self.now, lambda: self.now * self.waiting))
        self.used = [threads]

    def use(self, count: int) -> None:
        self.threads = count
        self.used.append(count)

    def train(self, steps: int, first: int = 0) -> list[tuple[int, str]]:
        told = []
        for step in range(first, first + steps):
            took = self.seconds(step, self.threads)
            self.now += took
            told.append((step, self.share.step(took, step % 2)))
        return [(step, line) for step, line in told if line]


def busy(step: int, threads: int) -> float:
    """From step 40 on, two threads have the time of one core: 130 images/s become 1 (issue 15, 13)."""
    alone = 0.25 * 2 / threads
    return alone if step < 40 else 32.0 if threads > 1 else 0.5


def test_a_collapse_is_noticed_within_three_steps_and_told_in_a_line() -> None:
    machine = Machine(2, busy)
    told = machine.train(100)
    assert machine.used == [2, 1]
    assert [step for step, _ in told] == [40 + IN_A_ROW - 1, 40 + 2 * IN_A_ROW - 1]
    assert told[0][1] == "a step takes 32 s, where 0.25 s was usual, as where others use the cores: trying 1 of 2 threads"
    assert told[1][1] == "with 1 of 2 threads a step is 64 times as fast"


def test_more_threads_go_down_by_halves() -> None:
    machine = Machine(8, lambda step, threads: 1.0 if step < 40 else 100.0 if threads > 2 else 2.0)
    told = machine.train(200)
    assert machine.used == [8, 4, 2] and [line for _, line in told][1:] == ["with 2 of 8 threads a step is 50 times as fast"]


def test_where_fewer_help_nothing_the_number_is_as_before() -> None:
    """A disk that stalls, memory that is swapped: not for want of cores."""
    machine = Machine(2, lambda step, threads: 0.25 if step < 40 else 25.0)
    told = machine.train(100)
    assert machine.used == [2, 1, 2] and told[-1][1] == "fewer threads are no faster; going on with 2"
    assert not machine.train(QUIET - 100, 100)


@pytest.mark.parametrize(
    "seconds",
    [
        lambda step, threads: 0.25 if step % 2 else 2.5,  # two resolutions in turn, one ten times the work
        lambda step, threads: 9.0 if step % 10 == 9 else 0.25,  # single steps that are interrupted
        lambda step, threads: 0.25 * (1 + step / 20),  # a slow drift
        lambda step, threads: 0.25 if step < 40 else 1.0,  # four times as slow: a fair share of busy cores, or a discriminator that begins
        lambda step, threads: 5.0 if step < 4 else 0.25,  # the first steps
    ],
)
def test_what_is_no_collapse_changes_nothing(seconds: Step) -> None:
    machine = Machine(2, seconds)
    assert not machine.train(400) and machine.used == [2]


def at_once(step: int, threads: int) -> float:
    """Others use the cores from the beginning; the first step is slower still."""
    return (4.0 if threads > 1 else 0.5) + 9.0 * (step == 0)


def test_a_run_that_is_slow_from_its_first_step_has_fewer_threads_after_a_few() -> None:
    machine = Machine(2, at_once, waiting=0.8)
    told = machine.train(100)
    assert machine.used == [2, 1] and [step for step, _ in told] == [IN_A_ROW, 2 * IN_A_ROW]
    assert told[0][1].startswith("the first steps were without a core for 80% of their time, as where others use the cores: trying 1 of 2")
    assert told[1][1] == "with 1 of 2 threads a step is 8 times as fast"


def test_first_steps_that_had_their_cores_or_gain_nothing_change_nothing() -> None:
    assert not Machine(2, at_once).train(100)
    machine = Machine(4, lambda step, threads: 1.0, waiting=0.5)
    assert [line for _, line in machine.train(100)][-1] == "fewer threads are no faster; going on with 4" and machine.used == [4, 2, 1, 4]
    assert not Machine(1, at_once, waiting=0.9).train(100)
    fixed = Machine(2, at_once, "OMP_NUM_THREADS says so many; a smaller one may be faster", waiting=0.9)
    ((step, said),) = fixed.train(100)
    assert step == IN_A_ROW and fixed.used == [2] and said.endswith("OMP_NUM_THREADS says so many; a smaller one may be faster")


def test_a_thread_knows_how_long_it_waited() -> None:
    first, second = waited(), waited()
    assert 0 <= first <= second < 1e6


def test_one_thread_stays_and_a_number_that_was_chosen_stays() -> None:
    assert not Machine(1, lambda step, threads: 0.1 if step < 40 else 9.0).train(100)
    machine = Machine(2, busy, "OMP_NUM_THREADS says so many; a smaller one may be faster")
    ((step, said),) = machine.train(100)
    assert step == 42 and machine.used == [2] and said.endswith("and OMP_NUM_THREADS says so many; a smaller one may be faster")


def test_results_to_the_bit_keep_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are split among threads, so their last bits depend on how many there are."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert of_stage(False).fixed.startswith("OMP_NUM_THREADS")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert of_stage(True).fixed.startswith("exact") and not of_stage(False).fixed


def test_threads_that_load_have_no_threads_below_them() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (found,) = ordered(iter([[torch.get_num_threads] * 4]), 2)
        assert found == [1, 1, 1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
