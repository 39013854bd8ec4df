"""The adversarial game: each player's gradients are those of its own loss alone, whatever the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.families import game

LOSSES = {  # of the generator, of the discriminator, as their papers write them
    "hinge": (lambda r, f: -f.mean(), lambda r, f: 0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean())),
    "non_saturating": (
        lambda r, f: -torch.sigmoid(f).log().mean(),
        lambda r, f: -0.5 * (torch.sigmoid(r).log().mean() + (1 - torch.sigmoid(f)).log().mean()),
    ),
    "least_squares": (
        lambda r, f: F.mse_loss(f, torch.ones_like(f)),
        lambda r, f: 0.5 * (F.mse_loss(r, torch.ones_like(r)) + f.pow(2).mean()),
    ),
    "relativistic": (lambda r, f: -torch.sigmoid(f - r).log().mean(), lambda r, f: -torch.sigmoid(r - f).log().mean()),
}


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(5, 6, 3, 2, 1), nn.SiLU(), nn.Conv2d(6, 1, 3, 1, 1))

    def forward(self, picture: Tensor, told: Tensor) -> Tensor:
        return self.layers(torch.cat([told, picture], 1))


@pytest.mark.parametrize("kind", list(LOSSES))
def test_one_backward_pass_gives_both_players_the_gradients_of_their_own_losses(kind: Any) -> None:
    torch.manual_seed(0)
    judge, player = Judge().double(), nn.Conv2d(2, 3, 3, 1, 1).double()
    told, real = torch.randn(4, 2, 8, 8, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    made = player(told)
    leaf = made.detach().requires_grad_()
    value, slope = game.opinion(judge, kind, leaf, real, told)
    lesson, gauges = game.lesson(judge, kind, real, leaf.detach(), told)
    (game.through(made, slope, value) + lesson).backward()

    of_player, of_judge = LOSSES[kind]
    fake = player(told)
    expected = torch.autograd.grad(of_player(judge(real, told).detach(), judge(fake, told)), list(player.parameters()))
    taught = torch.autograd.grad(of_judge(judge(real, told), judge(fake.detach(), told)), list(judge.parameters()))
    for parameter, gradient in zip([*player.parameters(), *judge.parameters()], [*expected, *taught], strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert float(gauges["logit_margin"]) == pytest.approx(float(judge(real, told).mean() - judge(fake, told).mean()))


def test_the_gradient_penalty_of_a_linear_judge_is_half_its_squared_weights() -> None:
    judge = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    penalty = game.gradient_penalty(judge, torch.randn(5, 3, 2, 2, dtype=torch.float64))
    weight: Any = judge[1]
    assert float(penalty) == pytest.approx(0.5 * float(weight.weight.square().sum()))
    penalty.backward()
    assert torch.allclose(weight.weight.grad, weight.weight)


def test_a_silent_judge_takes_part_with_nothing() -> None:
    judge = nn.Linear(2, 1)
    game.silent(judge).backward()
    assert all(p.grad is not None and not p.grad.any() for p in judge.parameters())
