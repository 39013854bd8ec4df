"""Reconstruction metrics: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,), dB, of images (B,C,H,W) in [0,1]; equal images have infinity."""
    errors = [(x.double() - y.double()).square().mean() for x, y in zip(a, b, strict=True)]
    return -10 * torch.log10(torch.stack(errors))


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity (B,) of images (B,C,H,W) in [0,1], mean over channels and places (Wang 2004, eq. 13).

    Gaussian window, K1 = 0.01, K2 = 0.03, places where the window fits; images smaller than it get a smaller one.
    """
    size = min(window, a.shape[2], a.shape[3])
    offset = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    line = torch.exp(-0.5 * (offset / sigma).square())
    line = line / line.sum()
    # One image at a time: a few hundred large ones in double precision would take many gigabytes.
    return torch.stack([_ssim(x.double(), y.double(), line) for x, y in zip(a, b, strict=True)])


def _ssim(x: Tensor, y: Tensor, line: Tensor) -> Tensor:
    """Of two images (C,H,W), with the window's profile along either axis."""
    moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # every map by itself: (5C,1,H,W)
    blurred = F.conv2d(F.conv2d(moments, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    mx, my, xx, yy, xy = blurred[:, 0].unflatten(0, (5, len(x)))
    xx, yy, xy = xx - mx * mx, yy - my * my, xy - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))).mean()
