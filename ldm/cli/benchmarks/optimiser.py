"""The row of the optimiser and the moving average, on the small UNet's parameters with fixed gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ldm.cli.benchmarks.models import distance, small
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.families.family import ParameterGroup
from ldm.training import optim
from ldm.training.ema import Ema
from ldm.training.optim import AdamW

LR, DECAY = 1e-4, 0.9999
UPDATES = 10  # compared; EMAModel's first update forgets the start altogether, ours keeps a tenth


def steps(setup: Setup) -> Iterator[Case]:
    """B14."""
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    network = small(setup.tiny).unet.build()
    ours = list(network.parameters())
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a) * 1e-3
        b.grad = a.grad.clone()
    # Weight decay of biases and norms differs by choice, by less than the tolerance; the check is for the arithmetic.
    optimizers = optim.build(AdamW(lr=LR), [ParameterGroup("model", ours)])
    average = Ema(ours, DECAY)
    peer = torch.optim.AdamW(theirs, lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    their_average = EMAModel(theirs, decay=DECAY)
    average.updates = their_average.optimization_step = 9

    def our_side() -> None:
        for optimizer in optimizers:
            optimizer.step()
        average.update()

    def their_side() -> None:
        peer.step()
        their_average.step(theirs)

    def check() -> float:
        for _ in range(UPDATES):
            our_side()
            their_side()
        weights = distance([p.detach() for p in ours], [p.detach() for p in theirs])
        return max(weights, distance(average.averages, their_average.shadow_params))

    parameters = sum(p.numel() for p in ours)
    yield Case(
        name=f"{parameters / 1e6:.1f} M parameters, fp32",
        kind="equal",
        ours=our_side,
        theirs=their_side,
        check=check,
        tolerance=1e-4,
        error=f"relative error of weights and averages after {UPDATES} updates",
        unit="update",
        notes={"parameters": parameters, "tensors": len(ours)},
    )
