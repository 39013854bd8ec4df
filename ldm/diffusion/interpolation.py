"""Spherical interpolation (slerp) between samples of noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.schedules import precise


def slerp(begin: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """Noise (B, ...) on the great circle from one sample to another, so that it keeps the length that networks expect (Shoemake 1985).

    Args:
        share: (B,) from 0, which is `begin` to the bit, to 1, which is `end`.
    """
    flat_begin, flat_end = (x.flatten(1).to(precise(x.device)) for x in (begin, end))
    lengths = flat_begin.norm(dim=1) * flat_end.norm(dim=1)
    cosine = ((flat_begin * flat_end).sum(1) / lengths.clamp(min=1e-12)).clamp(-1, 1)
    angle = torch.acos(cosine)
    share = share.to(flat_begin)
    near = angle.sin().abs() < 1e-6  # one direction: the straight way
    sine = angle.sin().masked_fill(near, 1.0)
    first = torch.where(near, 1 - share, ((1 - share) * angle).sin() / sine)
    second = torch.where(near, share, (share * angle).sin() / sine)
    mixed = (first[:, None] * flat_begin + second[:, None] * flat_end).to(begin.dtype).view_as(begin)
    share = share.view(-1, *[1] * (begin.dim() - 1))
    return torch.where(share == 0, begin, torch.where(share == 1, end, mixed))
