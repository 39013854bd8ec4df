"""Noise-aware classifier of latents for classifier guidance: which words would a caption say?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class NoisyClassifierConfig:
    """Convolutions that are told the noise level, a 4x4 map at most, and one number for each word."""

    words: tuple[str, ...]  # what it knows
    latent_channels: int = 4
    channels: tuple[int, ...] = (32, 64)  # per stage; each but the first halves height and width
    grid: int = 4  # the last map is pooled to grid x grid

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    def build(self) -> NoisyClassifier:
        """The network, freshly initialised."""
        return NoisyClassifier(self)


class NoisyClassifier(nn.Module):
    """Noisy latents to log-odds of words; no layer couples the samples of a batch."""

    def __init__(self, config: NoisyClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.latent_channels, *config.channels)
        self.stages = nn.ModuleList(
            nn.ModuleDict(
                {
                    "first": nn.Conv2d(a, b, 3, stride=2 if i else 1, padding=1),
                    "norm": nn.GroupNorm(1, b),
                    "level": nn.Linear(64, 2 * b),
                    "second": nn.Conv2d(b, b, 3, padding=1),
                }
            )
            for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        self.head = nn.Linear(widths[-1] * config.grid**2, len(config.words))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Log-odds (B,W) that a caption says each word, of latents x (B,c,h,w) at time t (B,)."""
        frequency = torch.exp(torch.arange(32, device=x.device) * (-math.log(10_000) / 32))
        angle = t.float()[:, None] * frequency  # (B,32)
        level = torch.cat([angle.sin(), angle.cos()], 1).to(x)  # (B,64)
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleDict)
            scale, shift = stage["level"](level)[:, :, None, None].chunk(2, dim=1)  # (B,C,1,1)
            x = stage["first"](x)
            x = F.silu(stage["norm"](x) * (1 + scale) + shift)
            x = x + F.silu(stage["second"](x))
        return self.head(F.adaptive_avg_pool2d(x, self.config.grid).flatten(1))  # (B,W)
