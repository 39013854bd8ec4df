"""Pace of each process: what it spends on its own part of a step, without waiting for others; and which one all wait for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SLOWER = 1.3  # times the median of the others
LEAST_S = 0.005  # more than these, a step
IN_A_ROW = 3  # looks, before it is told
KEPT = 64  # processes whose figures are logged one by one


@dataclass(frozen=True)
class Spent:
    """Seconds of one process a step."""

    data: float  # until its batch was there
    forward: float  # in its forward passes, before it sends anything: on a GPU that GPU's own time

    @property
    def own(self) -> float:
        """Both."""
        return self.data + self.forward


class Pace:
    """The clock of this process between two looks at it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._data, self._forward, self._steps = 0.0, 0.0, 0
        self._events: list[tuple[Any, Any]] = []

    def batch(self, waited_s: float) -> None:
        """A batch has come."""
        self._data += waited_s
        self._steps += 1

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass, which is not waited for."""
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()  # type: ignore[no-untyped-call]
            yield
            last.record()  # type: ignore[no-untyped-call]
            self._events.append((first, last))
            return
        began = time.perf_counter()
        yield
        self._forward += time.perf_counter() - began

    def look(self) -> Spent:
        """What a step took since the last look; called where the device has done what it was told."""
        gpu = sum(first.elapsed_time(last) for first, last in self._events) / 1000
        steps = max(1, self._steps)
        found = Spent(self._data / steps, (self._forward + gpu) / steps)
        self._data, self._forward, self._steps = 0.0, 0.0, 0
        self._events.clear()
        return found


class SlowRank:
    """Tells, once each time that it begins, which process all others wait for."""

    def __init__(self) -> None:
        self._row: tuple[int, int] = (-1, 0)  # the slowest process, and for how many looks it has been

    def look(self, spent: Sequence[Spent]) -> str:
        """A line for the reader; empty: nothing is new."""
        worst = max(range(len(spent)), key=lambda rank: spent[rank].own)
        others = statistics.median(one.own for rank, one in enumerate(spent) if rank != worst)
        own = spent[worst]
        if own.own < SLOWER * others or own.own < others + LEAST_S:
            self._row = (-1, 0)
            return ""
        self._row = (worst, self._row[1] + 1 if worst == self._row[0] else 1)
        if self._row[1] != IN_A_ROW:
            return ""
        parts = f"{own.data:.3f} s until its batch is there, {own.forward:.3f} s forward pass"
        return f"rank {worst} is slow: {own.own:.3f} s of its own a step ({parts}), the others {others:.3f} s; all wait for it"


def logged(spent: Sequence[Spent]) -> dict[str, Any]:
    """What log.jsonl says of them: of each process, or where there are very many, of the slowest ones."""
    ranks = sorted(range(len(spent)), key=lambda rank: -spent[rank].own)[:KEPT] if len(spent) > KEPT else range(len(spent))
    return {str(rank): [round(spent[rank].data, 4), round(spent[rank].forward, 4)] for rank in ranks}
