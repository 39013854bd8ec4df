"""The convolutional encoder and decoder that both autoencoders are made of, under diffusers' parameter names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.attention import attention
from ldm.models.blocks import Downsample, ResnetBlock, Upsample, norm, normed, recompute

EPS = 1e-6  # added to the variance in every norm


@dataclass(frozen=True)
class CoderShape:
    """What an encoder and its decoder have in common."""

    channels: tuple[int, ...]  # width of each level, from the full resolution down
    layers: int  # residual blocks per level
    attention: tuple[bool, ...]  # which levels attend to themselves
    middle_attention: bool  # whether the lowest resolution attends to itself between its last two blocks
    groups: int  # of every GroupNorm
    checkpointing: bool  # recompute each level in the backward pass


class Encoder(nn.Module):
    """Pixels to a small map: residual blocks per level, halving in between.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the map.
        shape: the levels.
    """

    def __init__(self, in_channels: int, out_channels: int, shape: CoderShape) -> None:
        super().__init__()
        self.checkpointing = shape.checkpointing
        channels, groups = shape.channels, shape.groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            scale = Downsample(width, padded_at_end=True) if i < last else None
            before, attends = channels[max(i - 1, 0)], shape.attention[i]
            self.down_blocks.append(CoderStage(before, width, shape.layers, groups, attends, scale, 0))
        self.mid_block = Bottom(channels[-1], groups, shape.middle_attention, 0)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,c,h,w)."""
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = _run(block, x, None, self.checkpointing)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """A small map to pixels: the encoder turned over, with one residual block more per level.

    Args:
        in_channels: channels of the map.
        out_channels: channels of the image.
        shape: the levels.
        code_channels: channels of the codes that scale and shift every norm (MoVQ), or 0 for plain GroupNorm.
    """

    def __init__(self, in_channels: int, out_channels: int, shape: CoderShape, code_channels: int = 0) -> None:
        super().__init__()
        self.checkpointing = shape.checkpointing
        channels, groups = shape.channels, shape.groups
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[-1], 3, padding=1)
        self.mid_block = Bottom(channels[-1], groups, shape.middle_attention, code_channels)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(channels))):
            scale = Upsample(channels[i]) if i else None
            before, layers, attends = channels[min(i + 1, last)], shape.layers + 1, shape.attention[i]
            self.up_blocks.append(CoderStage(before, channels[i], layers, groups, attends, scale, code_channels))
        self.conv_norm_out = norm(channels[0], groups, EPS, code_channels)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor, codes: Tensor | None = None) -> Tensor:
        """(B,c,h,w), the codes (B,c',h,w) where the norms read them -> (B,C,H,W)."""
        x = self.conv_in(z)
        for block in (self.mid_block, *self.up_blocks):
            x = _run(block, x, codes, self.checkpointing)
        return self.conv_out(F.silu(normed(self.conv_norm_out, x, codes)))


class CoderStage(nn.Module):
    """The residual blocks of one resolution, each followed by attention where wanted, and a change of size."""

    def __init__(
        self, before: int, channels: int, layers: int, groups: int, attends: bool, scale: Downsample | Upsample | None, code_channels: int
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(before if i == 0 else channels, channels, groups=groups, eps=EPS, code_channels=code_channels)
            for i in range(layers)
        )
        self.attentions = None
        if attends:
            self.attentions = nn.ModuleList(MapAttention(channels, groups, code_channels) for _ in range(layers))
        self.downsamplers = nn.ModuleList([scale]) if isinstance(scale, Downsample) else None
        self.upsamplers = nn.ModuleList([scale]) if isinstance(scale, Upsample) else None

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """(B,C,h,w) -> (B,C',h',w')."""
        for i, block in enumerate(self.resnets):
            x = block(x, None, codes)
            if self.attentions is not None:
                x = self.attentions[i](x, codes)
        for scales in (self.downsamplers, self.upsamplers):
            if scales is not None:
                x = scales[0](x)
        return x


class Bottom(nn.Module):
    """The blocks at the lowest resolution: residual, attention where wanted, residual."""

    def __init__(self, channels: int, groups: int, attends: bool, code_channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MapAttention(channels, groups, code_channels)] if attends else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups=groups, eps=EPS, code_channels=code_channels) for _ in range(2))

    def forward(self, x: Tensor, codes: Tensor | None) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        x = self.resnets[0](x, None, codes)
        for attend in self.attentions:
            x = attend(x, codes)
        return self.resnets[1](x, None, codes)


class MapAttention(nn.Module):
    """Attention of the places of a map to each other, by default with one head as wide as the map, beside a shortcut."""

    def __init__(self, channels: int, groups: int, code_channels: int = 0, *, heads: int = 1, eps: float = EPS) -> None:
        super().__init__()
        self.heads = heads
        # diffusers has one name for each kind of norm here, where its residual blocks have one for both.
        self.group_norm = None if code_channels else norm(channels, groups, eps)
        self.spatial_norm = norm(channels, groups, eps, code_channels) if code_channels else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, codes: Tensor | None = None) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        layer = self.group_norm if self.spatial_norm is None else self.spatial_norm
        assert layer is not None
        h = normed(layer, x, codes).flatten(2).transpose(1, 2)  # (B,h*w,C)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self._projected(h))  # (B,heads,h*w,D)
        h = self.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))  # (B,h*w,C)
        return x + h.transpose(1, 2).reshape(x.shape)

    def _projected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, each (B,L,C)."""
        return self.to_q(h), self.to_k(h), self.to_v(h)


def _run(block: nn.Module, x: Tensor, codes: Tensor | None, checkpointing: bool) -> Tensor:
    return recompute(block, x, codes) if checkpointing and torch.is_grad_enabled() else block(x, codes)
