"""Exponential moving average (EMA) of weights, with warm-up, swapped in for sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.distributed.sharding import like


def decay_at(updates: int, decay: float) -> float:
    """The decay of update number `updates` (from 0): min(decay, (1+n)/(10+n)), so that early weights are soon forgotten."""
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """EMA of parameters, in float32.

    Args:
        parameters: the trained parameters, in a fixed order.
        decay: the share of the old average that each update keeps, in [0,1].
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self._apart: dict[int, Tensor] = {}  # own values that cannot take the averages' places, while these are applied
        self.averages: list[Tensor] = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the EMA towards the present weights."""
        weight = 1 - decay_at(self.updates, self.decay)
        present = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.averages, present, weight)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the EMA; afterwards their own values again, bit for bit.

        Meanwhile the averages hold the parameters' own values, so that no more than one weight is there a third time.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for i, (p, average) in enumerate(zip(self.parameters, self.averages, strict=True)):
            own = p.detach().clone()
            p.copy_(average)
            if own.dtype == average.dtype:
                average.copy_(own)
            elif i in self._apart:
                p.copy_(self._apart.pop(i))
            else:  # a half type would not hold the average
                self._apart[i] = own

    def state(self) -> dict[str, Tensor]:
        """The EMA by position, to store."""
        return {str(i): a for i, a in enumerate(self.averages)}

    def restore(self, state: dict[str, Tensor], updates: int) -> None:
        """Take up a stored EMA.

        Raises:
            ValueError: if their number or shapes differ from the parameters'.
        """
        shapes = [tuple(state[str(i)].shape) for i in range(len(state))]
        if shapes != [tuple(a.shape) for a in self.averages]:
            raise ValueError("the stored EMA does not fit the model's parameters")
        for i, average in enumerate(self.averages):
            average.copy_(like(state[str(i)], average))
        self.updates = updates
