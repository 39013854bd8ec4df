"""Training alarms: loss and gradient spikes, a dead EMA, jumps of the learning rate."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.distributed.sharding import is_split
from ldm.formats.records import number

WINDOW = 200  # logged steps that are remembered
LEAST = 30  # of these before anything is judged
SPREADS = 10.0  # robust standard deviations above the median
TIMES = {"loss": 2.0, "gradient": 5.0}  # and so many times the median
QUIET = 20  # logged steps without a spike before the next one is told
STILL = 5  # logged steps in a row at which the weights had moved and their EMA had not
JUMP = 0.01  # of the peak rate
NORMS = "grad_norm_"  # how gauges of gradients begin
TENSORS, VALUES = 16, 64  # of the probe that tells whether weights move


class Alarms:
    """One stage's; `look` is given what is logged and returns a line for each thing that begins to be odd.

    Args:
        factor: the learning rate as a share of its peak after so many images.
        batch: images of an update: a rate that is logged after n images was set for n - batch.
        weights, averages: of the model and its EMA, in one order; no averages: no EMA is kept.
        before: the stage's logged lines of earlier starts, in their order.
    """

    def __init__(
        self,
        factor: Callable[[int], float],
        batch: int,
        weights: Sequence[Tensor] = (),
        averages: Sequence[Tensor] = (),
        before: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.factor, self.batch = factor, batch
        self._past: dict[str, deque[float]] = {}
        self._quiet: dict[str, int] = {}  # logged steps since the last spike
        self._peak: tuple[float, int] | None = None  # of the learning rate, and after how many images
        every = max(1, len(weights) // TENSORS)
        self._probed = list(weights)[::every], list(averages)[::every]
        self._moving = self._probe()
        self._still, self._told = 0, False
        for line in before:
            for _, name, value in _numbers(line.get("terms"), line.get("gauges")):
                self._remember(name, value)
            lr, images = line.get("lr"), line.get("images")
            if (rate := number(lr)) and isinstance(images, int):
                self._peak = self._peak_of(rate, images) or self._peak

    def look(self, images: int, terms: Mapping[str, float], gauges: Mapping[str, float], lr: float) -> list[str]:
        """A line for each alarm that this logged step begins."""
        found = [line for kind, name, value in _numbers(terms, gauges) if (line := self._spike(kind, name, value, images))]
        return found + self._jump(images, lr) + self._dead(images)

    def _remember(self, name: str, value: float) -> None:
        self._past.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def _spike(self, kind: str, name: str, value: float, images: int) -> str:
        past = self._past.get(name, ())
        self._quiet[name] = self._quiet.get(name, QUIET) + 1
        said = ""
        if len(past) >= LEAST:
            middle = statistics.median(past)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in past)
            # A term that was zero until now has begun, and one of both signs has no measure.
            if middle > 0 and value > TIMES[kind] * middle and value > middle + SPREADS * spread:
                if self._quiet[name] > QUIET:
                    said = f"{kind} spike: {name} is {value:.4g} after {images:,} images, where {middle:.4g} was usual"
                self._quiet[name] = 0
        self._remember(name, value)
        return said

    def _peak_of(self, lr: float, images: int) -> tuple[float, int] | None:
        factor = self.factor(images - self.batch)
        return (lr / factor, images) if factor > 1e-6 else None

    def _jump(self, images: int, lr: float) -> list[str]:
        before, now = self._peak, self._peak_of(lr, images)
        self._peak = now or before
        if before is None or now is None or abs(now[0] - before[0]) <= JUMP * max(now[0], before[0]):
            return []
        return [
            f"learning rate jump: {lr:.4g} after {images:,} images, where the schedule that held after {before[1]:,} gives"
            f" {before[0] * self.factor(images - self.batch):.4g}"
        ]

    def _probe(self) -> tuple[Tensor, Tensor] | None:
        if not self._probed[1]:
            return None
        first, second = (torch.cat([_local(t).flatten()[:VALUES].float() for t in tensors]).cpu() for tensors in self._probed)
        return first, second

    def _dead(self, images: int) -> list[str]:
        before, now = self._moving, self._probe()
        self._moving = now
        if before is None or now is None or self._told:
            return []
        stands = torch.equal(before[1], now[1]) and not torch.equal(before[0], now[0])
        self._still = self._still + 1 if stands else 0
        if self._still < STILL:
            return []
        self._told = True
        return [
            f"dead EMA: the weights move, and since {STILL} logged steps their EMA has not (after {images:,} images);"
            " pictures and the product are made of these: lower ema"
        ]


def _local(tensor: Tensor) -> Tensor:
    """What this process has of it."""
    here = tensor.detach()
    return here.to_local() if is_split(here) else here  # type: ignore[attr-defined, no-any-return]


def _numbers(terms: Any, gauges: Any) -> Iterable[tuple[str, str, float]]:
    """Kind, name and value of what may spike; a log may hold anything."""
    for kind, values, begin in (("loss", terms, ""), ("gradient", gauges, NORMS)):
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name.startswith(begin) and (found := number(value)) is not None:
                yield kind, name, found
