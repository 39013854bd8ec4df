"""Gradients that do not depend, to the bit, on how many processes share a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.batch import rows
from ldm.rng import Rng, mix

if TYPE_CHECKING:
    from ldm.train import Trainer


def exact_gradients(trainer: Trainer, model: torch.nn.Module, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a batch: of every micro-batch by itself, added one after the other in the order of its samples.

    Floating-point sums depend on their order. Here the order is that of the samples, whoever computes them: each process
    hands the sum so far to the next, and the last one tells all. Returns terms and gauges as `Trainer.gradients` does.
    """
    stage, device = trainer.stage, trainer.device
    count, size = len(batch.position), stage.micro_batch
    parameters = [parameter for player in trainer.players for parameter in player.parameters]
    terms: dict[str, Tensor] = {}
    gauges: dict[str, Tensor] = {}
    parts: list[Tensor] = []
    live: list[torch.nn.Parameter] = []
    for first in range(0, count, size):
        here = rows(batch, first, first + size)
        # Dropout inside networks draws from torch's own generator: by the samples, not by who computes them.
        torch.manual_seed(mix(trainer.seed, "torch", int(here.position[0])) % 2**63)
        with trainer.processes.apart(model):
            with trainer._autocast():
                found, seen = model(here.to(device), Rng(trainer.seed, here.position))
            loss = torch.stack([value.float() for value in found.values()]).sum()
            trainer.scaler.scale(loss * (size / stage.batch)).backward()
        live = [parameter for parameter in parameters if parameter.grad is not None]
        parts.append(torch.cat([parameter.grad.flatten() for parameter in live if parameter.grad is not None]))
        for parameter in live:
            parameter.grad = None
        for sums, values in ((terms, found), (gauges, seen)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach() * (size / count)
    whole = trainer.processes.chained(parts)
    for parameter, values in zip(live, whole.split([parameter.numel() for parameter in live]), strict=True):
        parameter.grad = values.view_as(parameter)
    return terms, gauges
