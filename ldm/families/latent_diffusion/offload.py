"""The parts of a model on the device one at a time: those that wait hold no memory there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def rest(part: nn.Module) -> None:
    """Empty a part's weights, whose device and type stay; `Offload` brings them back."""
    for weight in part.parameters():
        weight.data = weight.data.new_empty(0)


class Offload:
    """Who has its weights, out of the parts of a model: one at a time, and none at first.

    Args:
        sources: for each part a function that loads it anew.
        keep: whether weights wait in the machine's memory after their first turn (for a GPU); else they are loaded again.
    """

    def __init__(self, sources: Mapping[nn.Module, Callable[[], nn.Module]], keep: bool) -> None:
        self._sources, self._keep = sources, keep
        self._kept: dict[nn.Module, list[Tensor]] = {}
        self._whose: nn.Module | None = None
        for part in sources:
            rest(part)

    def __call__(self, part: nn.Module) -> None:
        """It is this part's turn."""
        if part is self._whose:
            return
        if self._whose is not None:
            rest(self._whose)
        self._whose = part
        fresh = self._kept.get(part) or [weight.detach() for weight in self._sources[part]().parameters()]
        if self._keep:
            self._kept[part] = fresh
        with torch.no_grad():
            for weight, values in zip(part.parameters(), fresh, strict=True):
                weight.data = values.to(weight)
