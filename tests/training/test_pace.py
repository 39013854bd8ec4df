"""Which process all others wait for."""

from __future__ import annotations

import torch

from ldm.training.pace import KEPT, Pace, SlowRank, Spent, logged

EVEN = [Spent(0.01, 0.20), Spent(0.02, 0.19), Spent(0.0, 0.21)]
ODD = [EVEN[0], Spent(0.5, 0.2), EVEN[2]]


def test_a_process_that_stays_slow_is_named_once() -> None:
    slow = SlowRank()
    said = [slow.look(spent) for spent in (EVEN, ODD, EVEN, ODD, ODD, ODD, ODD, EVEN, ODD, ODD, ODD)]
    assert [i for i, text in enumerate(said) if text] == [5, 10]
    assert said[5] == (
        "rank 1 is slow: 0.700 s of its own a step (0.500 s until its batch is there, 0.200 s forward pass), the others 0.210 s;"
        " all wait for it"
    )


def test_milliseconds_and_even_processes_are_no_news() -> None:
    slow = SlowRank()
    assert not any(slow.look([Spent(0, 0.001), Spent(0, 0.003)]) for _ in range(9))
    assert not any(slow.look([Spent(0.1, 0.1), Spent(0.12, 0.1)]) for _ in range(9))


def test_a_look_gives_means_of_steps_and_begins_anew() -> None:
    pace = Pace(torch.device("cpu"))
    for waited in (1.0, 3.0):
        pace.batch(waited)
        with pace.forward():
            pass
    found = pace.look()
    assert found.data == 2.0 and 0 <= found.forward < 1 and pace.look() == Spent(0.0, 0.0)


def test_of_very_many_processes_the_slowest_are_logged() -> None:
    many = [Spent(0.0, float(rank)) for rank in range(2 * KEPT)]
    assert set(logged(many)) == {str(rank) for rank in range(KEPT, 2 * KEPT)} and logged(EVEN)["1"] == [0.02, 0.19]
