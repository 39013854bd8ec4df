"""Noise between noise."""

from __future__ import annotations

import torch

from ldm.diffusion.interpolation import slerp
from ldm.diffusion.rng import Rng

SHAPE = (4, 16, 16)


def noise(*positions: int) -> torch.Tensor:
    return Rng(0, positions).normal("init", SHAPE)


def test_ends_are_kept_to_the_bit_and_rows_are_by_themselves() -> None:
    begin, end = noise(1, 1, 1, 3), noise(2, 2, 2, 4)
    share = torch.tensor([0.0, 1.0, 0.3, 0.3])
    got = slerp(begin, end, share)
    assert torch.equal(got[0], begin[0]) and torch.equal(got[1], end[1])
    assert torch.equal(slerp(begin[2:3], end[2:3], share[2:3]), got[2:3])
    assert got.dtype == torch.float32


def test_it_is_the_great_circle() -> None:
    u = torch.tensor([[1.0, 0.0]])
    v = torch.tensor([[0.0, 1.0]])
    third = slerp(u, v, torch.tensor([1 / 3]))
    assert torch.allclose(third, torch.tensor([[3**0.5 / 2, 0.5]]))
    assert torch.equal(slerp(u, u, torch.tensor([0.4])), u)


def test_variance_stays() -> None:
    between = slerp(noise(1), noise(2), torch.tensor([0.5]))
    assert abs(float(between.std()) - 1) < 0.05  # the mean of both would have 0.71
