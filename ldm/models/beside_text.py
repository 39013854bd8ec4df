"""Tokens beside the text (IP-Adapter, arXiv 2308.06721), read by every attention to the text with keys and values of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.batch import Beside, Cond, Injected, Movable, Told
from ldm.models.blocks import zero
from ldm.models.conditioned import ConditionNetwork

TOKENS = 4  # of an embedding: diffusers reads no other number
SHRINK = 4  # pixels of a map along each side that enter as one


class BesideText(ConditionNetwork):
    """Tokens of a view, and their keys and values for each attention to the text; the values start at zero.

    Args:
        image_proj: makes tokens (B,S,D) of what the view's encoder gave.
        width: D.
        attentions: channels of each attention to the text by its name, in the network's order.
    """

    folder: ClassVar[str] = "ip_adapter"

    def __init__(self, image_proj: nn.Module, width: int, attentions: Mapping[str, int]) -> None:
        super().__init__()
        self.image_proj = image_proj
        # IP-Adapter's files number all attentions, those of maps to themselves too, as diffusers' U-Net has them: its middle comes last.
        order = sorted(attentions, key=lambda name: name.startswith("mid_block"))
        self.places = [str(2 * order.index(name) + 1) for name in attentions]
        channels = dict(zip(self.places, attentions.values(), strict=True))
        self.ip_adapter = nn.ModuleDict({str(2 * k + 1): KeysValues(width, channels[str(2 * k + 1)]) for k in range(len(order))})

    def forward(self, x: Tensor, t: Tensor, cond: Cond, told: Told | None) -> Cond:
        """`cond` with the keys and values."""
        if told is None:
            return cond
        tokens = self.image_proj(told.value.to(x.device) if isinstance(told.value, Movable) else told.value.to(x))
        layers = [cast(KeysValues, self.ip_adapter[place]) for place in self.places]
        made = Beside(
            keys=tuple(one.to_k_ip(tokens) for one in layers), values=tuple(one.to_v_ip(tokens) for one in layers), weight=told.strength
        )
        return replace(cond, injected=(cond.injected or Injected()) + Injected(beside=(made,)))

    def to_diffusers(self) -> dict[str, Any]:
        """The content of its config.json; diffusers has no such network."""
        return {"_class_name": "LDMBesideText"}


class KeysValues(nn.Module):
    """Keys and values of one attention; the values start at zero."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(width, channels, bias=False)
        self.to_v_ip = nn.Linear(width, channels, bias=False)
        zero(self.to_v_ip)


class EmbeddingTokens(nn.Module):
    """Tokens of an embedding, as IP-Adapter's files have them."""

    def __init__(self, embedding: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embedding, TOKENS * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B,E) -> (B,4,D)."""
        return self.norm(self.proj(embedding).unflatten(1, (TOKENS, -1)))


class MapTokens(nn.Module):
    """A grid of tokens of a map, each of what lies in its part."""

    def __init__(self, width: int, side: int, channels: int = 3, hidden: int = 96) -> None:
        super().__init__()
        self.side = side
        self.convs = nn.Sequential(
            nn.Conv2d(channels * SHRINK**2, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
        )
        self.proj = nn.Linear(hidden, width)
        self.place = nn.Parameter(0.02 * torch.randn(side * side, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """(B,C,H,W) in [0,1] -> (B,side²,D)."""
        down = [SHRINK * -(-n // SHRINK) for n in image.shape[2:]]
        x = F.pixel_unshuffle(F.pad(image, (0, down[1] - image.shape[3], 0, down[0] - image.shape[2])), SHRINK)
        x = F.adaptive_avg_pool2d(self.convs(x), self.side)
        return self.norm(self.proj(x.flatten(2).transpose(1, 2)) + self.place)


class TripleTokens(nn.Module):
    """A token for each triple, of the texts of its subject, relation and object; a learned one where there is none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.nothing = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)

    def forward(self, told: Any) -> Tensor:
        """`ldm.diffusion.batch.Triples` of K -> (B,K,D)."""
        return self.norm(torch.where(told.there[..., None], self.layers(told.words), self.nothing))
