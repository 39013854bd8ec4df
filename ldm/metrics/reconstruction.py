"""How close pictures are to the ones they should be: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,), dB, of images (B,C,H,W) in [0,1]; equal images have infinity."""
    return -10 * torch.log10((a.double() - b.double()).square().mean((1, 2, 3)))


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity (B,) of images (B,C,H,W) in [0,1], mean over channels and places (Wang 2004, eq. 13).

    Gaussian window, K1 = 0.01, K2 = 0.03, places where the window fits; images smaller than it get a smaller one.
    """
    size = min(window, a.shape[2], a.shape[3])
    offset = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    line = torch.exp(-0.5 * (offset / sigma).square())
    line = line / line.sum()
    channels = a.shape[1]
    across, down = line.view(1, 1, 1, -1).expand(channels, 1, 1, size), line.view(1, 1, -1, 1).expand(channels, 1, size, 1)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, across, groups=channels), down, groups=channels)

    x, y = a.double(), b.double()
    mx, my = blur(x), blur(y)
    xx, yy, xy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))).mean((1, 2, 3))
