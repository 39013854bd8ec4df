"""Adversarial game of two players: their losses, the slope of the discriminator's opinion and its lesson, all in one backward pass.

The discriminator's opinion of a picture is taken with its parameters held, as a slope at the picture, and its lesson on the same picture,
detached; `through` then sends the slope back where the picture came from. So each player has the gradients of its own loss alone, though
there is one backward pass for both.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.families.family import Terms

# Hinge (Lim 2017, arXiv 1705.02894), non-saturating (Goodfellow 2014, 1406.2661), least squares (Mao 2017, 1611.04076), relativistic pairs
# (Jolicoeur-Martineau 2019, 1807.00734; Huang 2024, 2501.05441).
GameLoss = Literal["hinge", "non_saturating", "least_squares", "relativistic"]


def full(x: Tensor) -> Tensor:
    """In float32 at least: what autocast computed in half precision is summed in full."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generator_loss(kind: GameLoss, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """What the generator descends, of logits of its pictures and, where the loss is of pairs, of real ones."""
    if kind == "hinge":
        return -fake.mean()
    if kind == "non_saturating":
        return F.softplus(-fake).mean()
    if kind == "least_squares":
        return (fake - 1).square().mean()
    assert real is not None, "relativistic losses compare pairs"
    return F.softplus(real - fake).mean()


def discriminator_loss(kind: GameLoss, real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator descends, of its logits of real and made pictures."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "non_saturating":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    if kind == "least_squares":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    return F.softplus(fake - real).mean()


def opinion(judge: nn.Module, kind: GameLoss, leaf: Tensor, real: Tensor, *told: Tensor) -> tuple[Tensor, Tensor]:
    """The generator's loss, and its slope at the made pictures.

    Args:
        judge: the discriminator, called as judge(picture, *told); its parameters are held.
        leaf: made pictures, detached from what made them, with a gradient.
        real: real pictures, which relativistic losses compare them with.
        told: what both are conditioned on.
    """
    parameters = {name: p.detach() for name, p in judge.named_parameters()}
    with torch.no_grad():
        other = full(torch.func.functional_call(judge, parameters, (real, *told))) if kind == "relativistic" else None
    with torch.enable_grad():
        logits = full(torch.func.functional_call(judge, parameters, (leaf, *told)))
        value = generator_loss(kind, logits, other)
    (slope,) = torch.autograd.grad(value, leaf)
    return value, slope


def lesson(judge: nn.Module, kind: GameLoss, real: Tensor, fake: Tensor, *told: Tensor) -> tuple[Tensor, Terms]:
    """The discriminator's loss on real and made (detached) pictures, and gauges of its logits."""
    sure, unsure = full(judge(torch.cat([real, fake]), *(torch.cat([value, value]) for value in told))).chunk(2)
    return discriminator_loss(kind, sure, unsure), {
        "logits_real": sure.detach().mean(),
        "logits_fake": unsure.detach().mean(),
        "logit_margin": (sure.detach().mean() - unsure.detach().mean()),
    }


def gradient_penalty(judge: nn.Module, picture: Tensor, *told: Tensor) -> Tensor:
    """Mean over pictures of half the squared slope of the logits' sum at them: R1 on real ones (Mescheder 2018, arXiv 1801.04406)."""
    leaf = picture.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(full(judge(leaf, *told)).sum(), leaf, create_graph=True)
    return 0.5 * slope.square().flatten(1).sum(1).mean()


def silent(judge: nn.Module) -> Tensor:
    """A lesson of nothing: every parameter takes part in every backward pass, so no wrapper need search for unused ones."""
    return torch.stack([p.sum() * 0 for p in judge.parameters()]).sum()


def through(made: Tensor, slope: Tensor, value: Tensor) -> Tensor:
    """A term of this value whose gradient at `made` is `slope`, already computed."""
    carried = (made * slope).sum()
    return value.detach() + carried - carried.detach()
