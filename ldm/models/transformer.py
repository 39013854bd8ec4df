"""Spatial transformer: self-attention over the places of a map and cross-attention to a text, under diffusers' parameter names."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.batch import WeightedTokens
from ldm.models.attention import attention
from ldm.models.attention_exchange import AttentionExchange


@dataclass(frozen=True, slots=True)
class Memory:
    """What the transformers see beside the map; `UNet.remember` fills in the text's keys and values once for all steps."""

    tokens: Tensor | None  # (B,L,D) of the prompt
    mask: Tensor | None  # (B,1,1,L) bool
    keys_values: dict[CrossAttention, tuple[Tensor, Tensor]] = field(default_factory=dict)
    exchange: AttentionExchange | None = None  # what rows of the batch take of others' attention
    objects: WeightedTokens | None = None  # what the gated self-attention of every block sees besides the map
    beside: dict[CrossAttention, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)  # keys, values, weights


class Transformer(nn.Module):
    """Transformer blocks over the places of a map, beside a shortcut."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        context_width: int,
        groups: int,
        linear: bool,
        upcast: bool,
        dropout: float,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.linear = linear
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        blocks = (TransformerBlock(channels, heads, context_width, upcast, dropout, gated) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        batch, channels, height, width = x.shape
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B,h*w,C)
        if self.linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, memory)
        if self.linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).reshape(batch, channels, height, width)
        return x + (h if self.linear else self.proj_out(h))


class TransformerBlock(nn.Module):
    """Self-attention, to objects too where it is `gated`; attention to the text; a gated feed-forward layer; each beside a shortcut."""

    def __init__(self, channels: int, heads: int, context_width: int, upcast: bool, dropout: float, gated: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = CrossAttention(channels, channels, heads, upcast, looks_inward=True)
        self.fuser = GatedSelfAttention(channels, context_width, heads, upcast) if gated else None
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, context_width, heads, upcast, looks_inward=False)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(B,L,C) -> (B,L,C)."""
        x = x + self.attn1(self.norm1(x), None, memory.exchange)
        if self.fuser is not None and memory.objects is not None:
            x = self.fuser(x, memory.objects)
        x = x + self.attn2(self.norm2(x), memory, memory.exchange)
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to themselves (`looks_inward`) or to a text.

    To what stands beside the text it attends apart, by the same queries, and adds what it finds (IP-Adapter, arXiv 2308.06721, eq. 5).
    """

    def __init__(self, channels: int, source_channels: int, heads: int, upcast: bool, looks_inward: bool) -> None:
        super().__init__()
        self.heads, self.upcast, self.looks_inward = heads, upcast, looks_inward
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_channels, channels, bias=False)
        self.to_v = nn.Linear(source_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, memory: Memory | None, exchange: AttentionExchange | None = None) -> Tensor:
        """(B,L,C) -> (B,L,C)."""
        mask = None
        if memory is None:
            q, k, v = self._inward(x)  # (B,heads,L,D)
            q, k = (q, k) if exchange is None else exchange.to_places(q, k)
        else:
            q = self._split(self.to_q(x))  # (B,heads,L,D)
            assert memory.tokens is not None, "there is no text to attend to"
            k, v = memory.keys_values.get(self) or self.keys_values(memory.tokens)
            mask = memory.mask
        if memory is None or exchange is None:
            out = self._attend(q, k, v, mask)
        else:
            out = exchange.to_text(self._attend, q, k, v, mask)
        for keys, values, weight in memory.beside.get(self, ()) if memory is not None else ():
            out = out + weight.to(out)[:, None, None, None] * self._attend(q, self._split(keys), self._split(values), None)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B,heads,L,D), of whatever type the network computes in."""
        if not self.upcast:
            return attention(q, k, v, mask)
        with torch.autocast(q.device.type, enabled=False):
            fine = [y if y.dtype == torch.float64 else y.float() for y in (q, k, v)]
            return attention(fine[0], fine[1], fine[2], mask).to(q.dtype)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B,S,C') -> two of (B,heads,S,D)."""
        return self._split(self.to_k(source)), self._split(self.to_v(source))

    def _inward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of what attends to itself."""
        return self._split(self.to_q(x)), *self.keys_values(x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class GatedSelfAttention(nn.Module):
    """Self-attention of a map and objects together, and a feed-forward layer, behind gates that start shut (GLIGEN, arXiv 2301.07093)."""

    def __init__(self, channels: int, context_width: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(context_width, channels)
        self.attn = CrossAttention(channels, channels, heads, upcast, looks_inward=True)
        self.ff = FeedForward(channels, 0.0)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.alpha_attn = nn.Parameter(torch.zeros(()))
        self.alpha_dense = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, objects: WeightedTokens) -> Tensor:
        """(B,L,C) -> (B,L,C)."""
        weight = objects.weight.to(x)[:, None, None]
        both = torch.cat([x, self.linear(objects.tokens)], dim=1)  # (B,L+S,C)
        x = x + weight * self.alpha_attn.tanh() * self.attn(self.norm1(both), None)[:, : x.shape[1]]
        return x + weight * self.alpha_dense.tanh() * self.ff(self.norm2(x))


class FeedForward(nn.Module):
    """GEGLU (arXiv 2002.05202) of `inner` channels, four times the width where it says nothing, and back."""

    def __init__(self, channels: int, dropout: float, inner: int = 0, bias: bool = True) -> None:
        super().__init__()
        inner = inner or 4 * channels
        self.net = nn.ModuleList([Gate(channels, inner, bias), nn.Dropout(dropout), nn.Linear(inner, channels, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,C) -> (B,L,C)."""
        for layer in self.net:
            x = layer(x)
        return x


class Gate(nn.Module):
    """One half of a projection times the GELU of the other."""

    def __init__(self, channels: int, inner: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,C) -> (B,L,4C)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
