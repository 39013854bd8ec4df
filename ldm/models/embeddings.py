"""Embeddings of numbers and places: waves, coordinates, times, and the patches of a map with their positions, under diffusers' names."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.diffusion.schedules import precise

COORDINATES = 6  # x, y and the cosine and sine of each


class TimeEmbedding(nn.Module):
    """Linear, SiLU, linear; with `channels_told` also a linear layer for what is added to the times before them."""

    def __init__(self, channels_in: int, channels_out: int, channels_told: int = 0) -> None:
        super().__init__()
        self.cond_proj = nn.Linear(channels_told, channels_in, bias=False) if channels_told else None
        self.linear_1 = nn.Linear(channels_in, channels_out)
        self.linear_2 = nn.Linear(channels_out, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C) -> (B,T)."""
        return self.linear_2(F.silu(self.linear_1(x)))

    def told(self, x: Tensor) -> Tensor:
        """(B,K) -> (B,C), to be added to the times."""
        assert self.cond_proj is not None
        return self.cond_proj(x)


def waves(values: Tensor, channels: int, cosine_first: bool = True, shift: int = 0) -> Tensor:
    """Sines and cosines of numbers at geometric frequencies 10000^(-i / (channels/2 - shift)).

    Args:
        values: (N,).
        channels: width of the result; an odd one ends with a zero.
        cosine_first: whether the cosines come before the sines.
        shift: as in the formula.

    Returns:
        (N,channels) float32: computed so whatever the network's type, because half types cannot count to 1000.
    """
    half = channels // 2
    frequency = torch.arange(half, dtype=torch.float32, device=values.device)
    angle = values.float()[:, None] * torch.exp(-math.log(10000) * frequency / (half - shift))
    parts = [angle.cos(), angle.sin()] if cosine_first else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, channels % 2))


def coordinates(x: Tensor) -> Tensor:
    """Where each place is: x and y in (-1,1), and the cosine and sine of pi times each, (B,6,h,w)."""
    rows, columns = (torch.arange(n, device=x.device, dtype=x.dtype) for n in x.shape[2:])
    y = ((rows + 0.5) * (2 / len(rows)) - 1)[:, None].expand(x.shape[2:])
    z = ((columns + 0.5) * (2 / len(columns)) - 1)[None, :].expand(x.shape[2:])
    maps = [z, y, *(f(math.pi * a) for a in (z, y) for f in (torch.cos, torch.sin))]
    return torch.stack(maps).expand(len(x), -1, -1, -1)


class PatchEmbed(nn.Module):
    """Patches of a map as tokens, each with the sines and cosines of its place (ViT, arXiv 2010.11929).

    Args:
        channels: channels of the map.
        width: width of a token, a multiple of 4.
        patch: side of a patch.
        base: patches along a side at which positions count in steps of one.
        largest: positions are a stored table of so many patches a side, whose middle a map takes (SD3); 0: computed
            for each size, stretched so that every map reaches as far as one of `base` patches (PixArt).
        scale: positions are divided by it.
    """

    pos_embed: Tensor  # (1,largest*largest,W), where there is a table

    def __init__(self, channels: int, width: int, patch: int, *, base: int, largest: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.patch, self.base, self.largest, self.scale = patch, base, largest, scale
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        if largest:
            self.register_buffer("pos_embed", places(width, largest, largest, base, scale).float()[None])

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,(h/patch)*(w/patch),W).

        Raises:
            ValueError: for a side that is no multiple of the patch.
            UserError: for a map beyond the table.
        """
        height, width = (side // self.patch for side in x.shape[2:])
        if (height * self.patch, width * self.patch) != tuple(x.shape[2:]):
            raise ValueError(f"latents of {x.shape[2]} x {x.shape[3]} cannot be cut into patches of {self.patch} x {self.patch}")
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        if not self.largest:
            where = places(tokens.shape[2], height, width, self.base, self.scale, x.device)
            return tokens + where.float().to(tokens.dtype)
        if max(height, width) > self.largest:
            raise UserError(
                f"size: {height} x {width} patches are more than this network has positions for, {self.largest} a side; draw smaller"
            )
        top, left = (self.largest - height) // 2, (self.largest - width) // 2
        table = self.pos_embed.view(self.largest, self.largest, -1)
        return tokens + table[top : top + height, left : left + width].flatten(0, 1).to(tokens.dtype)


def unpatch(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B,h*w,patch*patch*C), a token's channels last, -> (B,C,h*patch,w*patch)."""
    return tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def places(channels: int, height: int, width: int, base: int, scale: float, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of x, then of y, of every place of a grid, (height*width,channels), float64 where the device has it."""
    dtype = torch.float64 if device is None else precise(device)
    frequency = 1.0 / 10000 ** (torch.arange(channels // 4, dtype=dtype, device=device) / (channels / 4))
    y, x = (torch.arange(n, dtype=torch.float32, device=device) / (n / base) / scale for n in (height, width))
    grids = torch.meshgrid(y, x, indexing="ij")
    angles = [grid.flatten()[:, None].to(dtype) * frequency for grid in reversed(grids)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
