"""Residual, down- and upsampling blocks that the U-Net and the autoencoders share, under diffusers' parameter names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TimeShifts:
    """What every residual block adds at one step of a schedule; `UNet.schedule` makes those of all steps at once."""

    shifts: dict[ResnetBlock, Tensor]  # each (B,C') or (1,C')


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut, optionally told a time embedding.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        groups: groups of both GroupNorms.
        eps: added to their variance.
        time_channels: width of the time embedding, or 0 for none.
        dropout: share of values dropped before the second convolution.
        code_channels: channels of the codes that scale and shift both norms (MoVQ), or 0 for plain GroupNorm.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        groups: int,
        eps: float,
        time_channels: int = 0,
        dropout: float = 0.0,
        code_channels: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = norm(channels_in, groups, eps, code_channels)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, channels_out) if time_channels else None
        self.norm2 = norm(channels_out, groups, eps, code_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor, time: Tensor | TimeShifts | None = None, codes: Tensor | None = None) -> Tensor:
        """(B,C,h,w), (B,T) after its SiLU or what became of it, (B,c,h',w') -> (B,C',h,w)."""
        h = self.conv1(F.silu(normed(self.norm1, x, codes)))  # (B,C',h,w)
        if self.time_emb_proj is not None:
            shift = time.shifts[self] if isinstance(time, TimeShifts) else self.time_emb_proj(time)
            h = h + shift[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(normed(self.norm2, h, codes))))  # (B,C',h,w)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class CodeNorm(nn.Module):
    """GroupNorm whose scale and shift are read, place by place, off the codes (MoVQ, arXiv 2209.09002, equation 4)."""

    def __init__(self, channels: int, code_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv_y = nn.Conv2d(code_channels, channels, 1)
        self.conv_b = nn.Conv2d(code_channels, channels, 1)

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """(B,C,h,w), (B,c,h',w') -> (B,C,h,w)."""
        # 1x1 convolutions commute with nearest enlargement, and the codes are the smaller map.
        scale, shift = (F.interpolate(conv(codes), size=x.shape[-2:]) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift


def norm(channels: int, groups: int, eps: float, code_channels: int = 0) -> nn.Module:
    """GroupNorm, or CodeNorm where there are codes."""
    return CodeNorm(channels, code_channels) if code_channels else nn.GroupNorm(groups, channels, eps=eps)


def normed(layer: nn.Module, x: Tensor, codes: Tensor | None) -> Tensor:
    """`x` after a layer made by `norm`."""
    return layer(x, codes) if isinstance(layer, CodeNorm) else layer(x)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2.

    The autoencoders (`padded_at_end`) pad one row and column at the bottom and the right, the U-Net one on every side.
    """

    def __init__(self, channels: int, *, padded_at_end: bool) -> None:
        super().__init__()
        self.padded_at_end = padded_at_end
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if padded_at_end else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,C,h/2,w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.padded_at_end else x)


class Upsample(nn.Module):
    """Nearest enlargement by two and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B,C,h,w) -> (B,C,2h,2w), or (B,C,*size) where an odd size was halved on the way down."""
        if size is not None and size != (2 * x.shape[-2], 2 * x.shape[-1]):
            return self.conv(F.interpolate(x, size=size))
        # Forward and backward on one AVX512-bf16 core, 64 to 512 channels: 1.1 to 2.0 times as fast from 8x8 on.
        # An adapter may have put its own layer in the place of the convolution; it is called as any other.
        if x.device.type == "cpu" and min(x.shape[-2:]) >= 8 and type(self.conv) is nn.Conv2d:
            return folded_upsample(x, self.conv.weight, self.conv.bias)
        return self.conv(F.interpolate(x, scale_factor=2.0))


def folded_upsample(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest enlargement by two and a 3x3 convolution in 4/9 of the multiplications.

    Each of the four kinds of places of the result (even or odd row and column) sees 2x2 places of `x` alone, under sums
    of the kernel's entries. Equal to the two steps up to rounding.

    Args:
        x: (B,C,h,w).
        weight: (C',C,3,3).
        bias: (C',).

    Returns:
        (B,C',2h,2w).
    """
    batch, _, height, width = x.shape
    x = F.pad(x, (1, 1, 1, 1))
    rows = []
    for r, across in enumerate(_pairs(weight, 2)):  # (C',C,2,3)
        columns = [
            F.conv2d(x[:, :, r : r + height + 1, c : c + width + 1], kernel, bias)  # (B,C',h,w)
            for c, kernel in enumerate(_pairs(across, 3))  # (C',C,2,2)
        ]
        rows.append(torch.stack(columns, dim=-1))  # (B,C',h,w,2)
    return torch.stack(rows, dim=-3).reshape(batch, -1, 2 * height, 2 * width)


def phase_kernels(weight: Tensor) -> list[Tensor]:
    """The four kernels (C',C,2,2) that a folded enlargement sees, row by row, of a kernel (C',C,3,3)."""
    return [kernel for across in _pairs(weight, 2) for kernel in _pairs(across, 3)]


def _pairs(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A kernel of three along `dim` as the two of two that even and odd places of an enlarged map see."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)


def start_as_identity(module: nn.Module) -> None:
    """Zero the last convolution of every residual block, so that a fresh one passes its input on (arXiv 2105.05233)."""
    for part in module.modules():
        if isinstance(part, ResnetBlock):
            zero(part.conv2)


def zero(layer: nn.Conv2d | nn.Linear) -> None:
    """Set weights and bias to zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def recompute(module: nn.Module, *inputs: object) -> Tensor:
    """The module's output, whose activations the backward pass computes anew (gradient checkpointing)."""
    return torch.utils.checkpoint.checkpoint(module, *inputs, use_reentrant=False)
