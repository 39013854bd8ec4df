"""T2I-Adapter (arXiv 2302.08453): a small network that adds to each level of a U-Net what a map says, under diffusers' parameter names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.schema import Positive, Width, config
from ldm.diffusion.batch import Cond, Injected, Told
from ldm.models.blocks import zero
from ldm.models.conditioned import ConditionNetwork


@config
class T2IAdapterConfig:
    """What a T2I-Adapter is made of, beside the widths of the U-Net's levels."""

    hint_channels: Width = 3  # channels of the map
    layers: Positive = 2  # residual blocks per level

    def to_diffusers(self, channels: tuple[int, ...], factor: int) -> dict[str, Any]:
        """The content of config.json, for a U-Net of these channels in latents `factor` times smaller than pictures."""
        return {
            "_class_name": "T2IAdapter",
            "in_channels": self.hint_channels,
            "channels": list(channels),
            "num_res_blocks": self.layers,
            "downscale_factor": factor,
            "adapter_type": "full_adapter",
        }


class T2IAdapter(ConditionNetwork):
    """Maps for all levels of a U-Net, which are zero at first."""

    folder: ClassVar[str] = "adapter"
    class_name: ClassVar[str] = "T2IAdapter"

    def __init__(self, own: T2IAdapterConfig, channels: tuple[int, ...], factor: int) -> None:
        super().__init__()
        self.own, self.channels, self.factor = own, channels, factor
        self.adapter = Levels(own, channels, factor)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, told: Told | None) -> Cond:
        """`cond` with what it adds, of a map (B,C,H,W) in pixels."""
        if told is None:
            return cond
        return replace(cond, injected=(cond.injected or Injected()) + self.added(told.value.to(x), told.strength))

    def added(self, hint: Tensor, weight: Tensor) -> Injected:
        """What is added to the U-Net of a map (B,C,H,W) in [0,1], so much of it as `weight` (B,) says."""
        scale = weight[:, None, None, None]
        return Injected(levels=tuple(scale.to(x) * x for x in self.adapter(hint)))

    def to_diffusers(self) -> dict[str, Any]:
        """The content of its config.json."""
        return self.own.to_diffusers(self.channels, self.factor)


class Levels(nn.Module):
    """The blocks of an adapter, one for each level."""

    def __init__(self, own: T2IAdapterConfig, channels: tuple[int, ...], factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv_in = nn.Conv2d(own.hint_channels * factor**2, channels[0], 3, padding=1)
        blocks = zip((channels[0], *channels[:-1]), channels, strict=True)
        self.body = nn.ModuleList(AdapterBlock(a, b, own.layers, down=i > 0) for i, (a, b) in enumerate(blocks))
        zero(self.conv_in)

    def forward(self, hint: Tensor) -> list[Tensor]:
        """(B,C,H,W) -> (B,c,h,w) for each level."""
        x = self.conv_in(F.pixel_unshuffle(hint, self.factor))
        found = []
        for block in self.body:
            x = block(x)
            found.append(x)
        return found


class AdapterBlock(nn.Module):
    """Residual blocks at one resolution; of zeros they make zeros at first."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.in_conv = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None
        self.resnets = nn.Sequential(*(AdapterResnet(channels_out) for _ in range(layers)))
        if self.in_conv is not None and self.in_conv.bias is not None:
            nn.init.zeros_(self.in_conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C',h,w), or half as large."""
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.down else x
        return self.resnets(x if self.in_conv is None else self.in_conv(x))


class AdapterResnet(nn.Module):
    """Two convolutions beside a shortcut, the second of which starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 1)
        zero(self.block2)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the same."""
        return x + self.block2(F.relu(self.block1(x)))
