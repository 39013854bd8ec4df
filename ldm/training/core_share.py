"""Core share: fewer threads where steps become many times slower than they were, because others use the cores.

Threads of one operation wait for each other. Where two of them have the time of one core, each waits for the other's turn at every
operation, and a step takes not twice but a hundred times as long.
"""

from __future__ import annotations

import os
import statistics
from collections import deque
from collections.abc import Callable, Hashable

import torch

SLOW = 6.0  # times the usual seconds of a step
IN_A_ROW = 3  # steps that are so slow, or that try fewer threads
LEAST = 8  # steps before anything is usual
REMEMBERED = 64
BETTER = 1.5  # times as fast, for fewer threads to stay
QUIET = 200  # steps after a try that helped nothing


class CoreShare:
    """The threads of a stage that trains on a CPU; `step` is told how long each step computed.

    Floating-point sums are split among threads, so their last bits depend on how many there are. So the number stays where it was
    chosen by the user (`OMP_NUM_THREADS`) or results are promised to the bit (`exact`); a slow step is told there, too.

    Args:
        fixed: who has chosen the number; empty: it may change.
        count, use: how many threads there are, and how to change that.
    """

    def __init__(
        self, fixed: str = "", count: Callable[[], int] = torch.get_num_threads, use: Callable[[int], None] = torch.set_num_threads
    ) -> None:
        self.fixed, self._count, self._use = fixed, count, use
        self._past: dict[Hashable, deque[float]] = {}
        self._slow: list[float] = []  # of steps in a row: times the usual
        self._tried: list[float] | None = None  # the same with fewer threads
        self._before, self._quiet = 0, 0

    def step(self, seconds: float, shape: Hashable = None) -> str:
        """One step of pictures of that shape computed for so long; what is to be told of it, if anything.

        Returns:
            A line, empty but where something begins to be slow or threads change.
        """
        past = self._past.setdefault(shape, deque(maxlen=REMEMBERED))
        if len(past) < LEAST:
            past.append(seconds)
            return ""
        usual = max(statistics.median(past), 1e-6)
        times = seconds / usual
        if self._tried is not None:
            self._tried.append(times)
            return self._judge() if len(self._tried) == IN_A_ROW else ""
        self._quiet = max(0, self._quiet - 1)
        if times <= SLOW:
            self._slow.clear()
            past.append(seconds)
            return ""
        self._slow.append(times)
        if len(self._slow) < IN_A_ROW or self._quiet or self._count() == 1:
            return ""
        return self._fewer(seconds, usual)

    def _fewer(self, seconds: float, usual: float) -> str:
        found = f"a step takes {seconds:.3g} s, where {usual:.3g} s was usual"
        if self.fixed:
            self._slow.clear()
            self._quiet = QUIET
            return f"{found}; {self._count()} threads wait for each other where others use the cores, and {self.fixed}"
        self._before = self._count()
        self._use(self._before // 2)
        self._tried = []
        return f"{found}, as where others use the cores: trying {self._count()} of {self._before} threads"

    def _judge(self) -> str:
        """After a few steps with fewer threads: whether they stay."""
        assert self._tried is not None
        before, now, tried = statistics.median(self._slow), statistics.median(self._tried), self._count()
        if before < BETTER * now and tried > 1:
            self._use(tried // 2)
            self._tried = []
            return ""
        self._tried = None
        self._slow.clear()
        if before >= BETTER * now:
            self._past.clear()
            return f"with {tried} of {self._before} threads a step is {before / now:.3g} times as fast"
        self._use(self._before)
        self._quiet = QUIET
        return f"fewer threads are no faster; going on with {self._before}"


def of_stage(exact: bool) -> CoreShare:
    """That of a stage, as its settings and the environment say."""
    if "OMP_NUM_THREADS" in os.environ:
        return CoreShare("OMP_NUM_THREADS says so many; a smaller one may be faster")
    return CoreShare("exact: true keeps their number; OMP_NUM_THREADS=1 may be faster") if exact else CoreShare()
