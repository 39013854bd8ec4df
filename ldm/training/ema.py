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
        """Within the block the parameters hold the EMA; afterwards their own values again, bit for bit."""
        kept = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, average in zip(self.parameters, self.averages, strict=True):
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, own in zip(self.parameters, kept, strict=True):
                    p.copy_(own)

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
