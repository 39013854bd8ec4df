"""Core share: fewer threads where steps become many times slower than they were, because others use the cores.

Threads of one operation wait for each other. Where two of them have the time of one core, each waits for the other's turn at every
operation, and a step takes not twice but a hundred times as long. Later on a step's own past shows it; at the start of a stage, which
has none, the system does, by the time that a thread was ready and had no core.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable

import torch

SLOW = 6.0  # times the usual seconds of a step
IN_A_ROW = 3  # steps that are so slow, or that try fewer threads
LEAST = 8  # steps before anything is usual
REMEMBERED = 64
BETTER = 1.5  # times as fast, for fewer threads to stay
QUIET = 200  # steps after a try that helped nothing
WAITING = 0.4  # share of the first steps' time without a core, from which on fewer threads are tried


def waited() -> float:
    """Seconds that this thread was ready and had no core; 0 where the system does not tell."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


class CoreShare:
    """The threads of a stage that trains on a CPU; `step` is told how long each step computed.

    Floating-point sums are split among threads, so their last bits depend on how many there are. So the number stays where it was
    chosen by the user (`OMP_NUM_THREADS`) or results are promised to the bit (`exact`); a slow step is told there, too.

    Args:
        fixed: who has chosen the number; empty: it may change.
        count, use: how many threads there are, and how to change that.
        clocks: seconds now, and seconds so far without a core.
    """

    def __init__(
        self,
        fixed: str = "",
        count: Callable[[], int] = torch.get_num_threads,
        use: Callable[[int], None] = torch.set_num_threads,
        clocks: tuple[Callable[[], float], Callable[[], float]] = (time.perf_counter, waited),
    ) -> None:
        self.fixed, self._count, self._use, self._clocks = fixed, count, use, clocks
        self._began: tuple[float, float] | None = None  # by the clocks, after the first step, which is like no other
        self._first: list[float] = []  # seconds of those after it
        self._relative = True  # whether steps that are judged are counted in times the usual, or in seconds
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
        usual = max(statistics.median(past), 1e-6) if len(past) >= LEAST else 0.0
        if self._tried is not None:
            self._tried.append(seconds / usual if self._relative and usual else seconds)
            return self._judge() if len(self._tried) == IN_A_ROW else ""
        if not usual:
            past.append(seconds)
            return self._at_first(seconds)
        times = seconds / usual
        self._quiet = max(0, self._quiet - 1)
        if times <= SLOW:
            self._slow.clear()
            past.append(seconds)
            return ""
        self._slow.append(times)
        if len(self._slow) < IN_A_ROW or self._quiet or self._count() == 1:
            return ""
        return self._fewer(f"a step takes {seconds:.3g} s, where {usual:.3g} s was usual")

    def _at_first(self, seconds: float) -> str:
        """One of a stage's first steps: what of them is to be told."""
        now, without = (clock() for clock in self._clocks)
        if self._began is None:
            self._began = now, without
            return ""
        if len(self._first) == IN_A_ROW:
            return ""
        self._first.append(seconds)
        share = (without - self._began[1]) / max(now - self._began[0], 1e-6)
        if len(self._first) < IN_A_ROW or share < WAITING or self._count() == 1:
            return ""
        self._slow, self._relative = self._first[:], False
        return self._fewer(f"the first steps were without a core for {min(share, 1):.0%} of their time")

    def _fewer(self, found: str) -> str:
        if self.fixed:
            self._slow.clear()
            self._quiet, self._relative = QUIET, True
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
        self._tried, self._relative = None, True
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
