"""Benchmark harness: two sides called in turn, their times, the ratio with its spread, and whether their results agree."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ldm.cli.benchmarks.rows import Case, Setup

LEAST_S = 0.1  # of one measurement: shorter work is repeated
COVERAGE = 0.95  # wanted of the interval around the median ratio
Clock = Callable[[Callable[[], Any], int], float]


@dataclass(frozen=True)
class Spread:
    """Median with quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(kw_only=True)
class Result:
    """Result of a benchmark case. Times are seconds per call (or bytes), in the order in which they were taken."""

    name: str
    kind: str
    status: str = "passed"  # or "failed"
    reason: str = ""
    clock: str = ""
    unit: str = "image"
    per_call: float = 1
    error: float = math.nan  # how far the results are apart
    error_of: str = ""
    tolerance: float = 0.0
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)  # calls per measurement, ours and theirs
    published: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Theirs over ours, round by round: above 1 ours needs less. Against a published rate where there is no peer."""
        if self.theirs:
            return [b / a for a, b in zip(self.ours, self.theirs, strict=True)]
        return [self.per_call / a / self.published for a in self.ours] if self.published else []

    def to_dict(self) -> dict[str, Any]:
        """The record, with the figures drawn from the raw ones."""
        made: dict[str, Any] = asdict(self)
        if not math.isfinite(self.error):
            made["error"] = None
        for name in ("ours", "theirs"):
            values = getattr(self, name)
            made[f"{name}_spread"] = asdict(Spread.of(values)) if values else None
        if self.ratios:
            low, high, covered = sign_interval(self.ratios)
            made["ratio"] = asdict(Spread.of(self.ratios)) | {"interval": [low, high], "coverage": covered}
        return made


def sign_interval(values: Sequence[float], wanted: float = COVERAGE) -> tuple[float, float, float]:
    """The narrowest pair of order statistics that holds the median with at least `wanted` chance, and that chance.

    Exact for any distribution: how many values lie below the median is binomial. With too few values for `wanted` the
    extremes are given with what they cover.
    """
    ordered, n = sorted(values), len(values)
    tail, best = 0.0, (ordered[0], ordered[-1], 1 - 2.0 ** (1 - n))
    for k in range((n + 1) // 2):
        tail += math.comb(n, k) / 2**n
        if 1 - 2 * tail < wanted:
            break
        best = (ordered[k], ordered[n - 1 - k], 1 - 2 * tail)
    return best


def clock_for(setup: Setup) -> tuple[str, Clock]:
    """The clock of a machine, with its name: seconds of `repeats` calls."""
    if setup.device == "cuda":
        return "CUDA events", _cuda_seconds
    if setup.threads == 1:
        return "CPU time, one thread", _seconds(time.process_time)
    return f"wall time, {setup.threads} threads", _seconds(time.perf_counter)


def _seconds(now: Callable[[], float]) -> Clock:
    def measure(call: Callable[[], Any], repeats: int) -> float:
        start = now()
        for _ in range(repeats):
            call()
        return now() - start

    return measure


def _cuda_seconds(call: Callable[[], Any], repeats: int) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()  # type: ignore[no-untyped-call]
    for _ in range(repeats):
        call()
    end.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def compare(case: Case, setup: Setup, rounds: int, clock: tuple[str, Clock] | None = None, alone: bool = False) -> Result:
    """Check that both sides give the same, then measure them in turn: A B, B A, A B, ...

    Args:
        case: what is compared.
        setup: picks the clock, and how short a measurement may be.
        rounds: pairs of measurements.
        clock: in place of the machine's.
        alone: measure our side only.
    """
    name, measure = clock or clock_for(setup)
    result = Result(
        name=f"toy: {case.name}" if setup.tiny else case.name,
        kind=case.kind,
        clock=f"returned {case.returned}" if case.returned else name,
        unit=case.unit,
        per_call=case.per_call,
        error_of=case.error,
        tolerance=case.tolerance,
        published=case.published,
        notes=dict(case.notes),
    )
    result.error = float(case.check())
    if not result.error <= case.tolerance:  # not a number fails too
        result.status = "failed"
        result.reason = f"{case.error}: {result.error:.2e}, and at most {case.tolerance:.0e} is allowed; nothing was timed"
        return result
    sides = [case.ours] if alone or case.theirs is None else [case.ours, case.theirs]
    times: list[list[float]] = [[] for _ in sides]
    result.repeats = [1 if case.returned else _repeats(measure, side, setup) for side in sides]
    if case.returned and not setup.tiny:  # files come from memory, not from the disk
        for side in sides:
            side()
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            gc.collect()
            if case.returned:
                times[i].append(float(sides[i]()))
            else:
                times[i].append(measure(sides[i], result.repeats[i]) / result.repeats[i])
    result.ours = times[0]
    result.theirs = times[1] if len(times) > 1 else []
    result.notes["load"] = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    return result


def _repeats(measure: Clock, side: Callable[[], Any], setup: Setup) -> int:
    """How many calls make a measurement long enough; the first call, which warms up, does not count."""
    measure(side, 1)
    if setup.tiny:
        return 1
    return max(1, min(10_000, math.ceil(LEAST_S / max(measure(side, 1), 1e-6))))
