"""Transformer of a prior: the embedding of a picture out of noise, told a text (unCLIP, arXiv 2204.06125), under diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Depth, Fraction, Width, config
from ldm.diffusion.batch import Text
from ldm.models.attention import attention
from ldm.models.diffusers_config import require_buildable
from ldm.models.embeddings import TimeEmbedding, waves

STOCK, OWN = "PriorTransformer", "LDMPriorTransformer"
ADDED = 4  # tokens behind those of the text: its embedding, the time, the noised embedding, and the one where the answer is read


@config
class PriorTransformerConfig:
    """Size of a prior's transformer."""

    head_width: Width = 64
    heads: Width = 4
    layers: Depth = 6
    dropout: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """A prior's transformer with what the CLIP decides."""

    head_width: Width
    heads: Width
    layers: Depth
    dropout: Fraction = 0.0
    embedding: Width  # of the space that pictures and texts share
    states: Width  # width of the text's states
    tokens: Width  # of a text

    def __post_init__(self) -> None:
        require_buildable((self.width,), self.layers)

    @property
    def width(self) -> int:
        """Of a token."""
        return self.heads * self.head_width

    @property
    def stock(self) -> bool:
        """Whether diffusers' class is the same network: it takes texts whose states are as wide as embeddings."""
        return self.states == self.embedding

    def build(self) -> PriorTransformer:
        """A freshly initialised network."""
        return PriorTransformer(self)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of config.json; under our own class name where diffusers has no such network."""
        return {
            "_class_name": STOCK if self.stock else OWN,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "num_layers": self.layers,
            "embedding_dim": self.embedding,
            "num_embeddings": self.tokens,
            "additional_embeddings": ADDED,
            "dropout": self.dropout,
            **({} if self.stock else {"states_dim": self.states}),
        }

    @staticmethod
    def from_diffusers(values: Mapping[str, Any], where: str) -> PriorShape:
        """The shape behind a config.json, the file `where`.

        Raises:
            UserError: for another class, or naming the field whose value this network does not have.
        """
        if values.get("_class_name") not in (STOCK, OWN):
            raise UserError(f"{where}: _class_name is {values.get('_class_name')!r}; {STOCK} or {OWN} is needed")
        said = {own: values[theirs] for own, theirs in NAMES.items() if theirs in values}
        found = typed({"states": values.get("embedding_dim")} | said, PriorShape, where)
        wanted = USUAL | found.to_diffusers()
        for name, value in values.items():
            if name in wanted and value != wanted[name]:
                raise UserError(f"{where}: {name} is {value!r}; this network has {wanted[name]!r}")
        return found


NAMES = {  # of a shape's fields in config.json
    "heads": "num_attention_heads",
    "head_width": "attention_head_dim",
    "layers": "num_layers",
    "embedding": "embedding_dim",
    "tokens": "num_embeddings",
    "dropout": "dropout",
    "states": "states_dim",
}
USUAL: dict[str, Any] = {  # what else diffusers' class may be told, and this network is
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
}


class PriorTransformer(nn.Module):
    """Causal transformer over the text's states, its embedding, the time and the noised embedding; the last token gives the clean one."""

    def __init__(self, shape: PriorShape) -> None:
        super().__init__()
        self.shape = shape
        width, embedding = shape.width, shape.embedding
        self.time_embedding = TimeEmbedding(width, width)
        self.proj_in = nn.Linear(embedding, width)
        self.embedding_proj = nn.Linear(embedding, width)
        self.encoder_hidden_states_proj = nn.Linear(shape.states, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, shape.tokens + ADDED, width))
        self.prd_embedding = nn.Parameter(0.01 * torch.randn(1, 1, width))
        self.transformer_blocks = nn.ModuleList(Block(width, shape.heads, shape.dropout) for _ in range(shape.layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, embedding)
        # What turns its space into the decoder's: they are the same here.
        self.clip_mean = nn.Parameter(torch.zeros(1, embedding), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, embedding), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        """The clean embedding.

        Args:
            x: (B,E), the noised embedding.
            t: (B,), the time in the units of training.
            text: states (B,L,D), which are no padding, and as `pooled` the text's embedding (B,E).

        Returns:
            (B,E).
        """
        assert text.pooled is not None
        time = self.time_embedding(waves(t, self.shape.width).to(x))
        states = self.encoder_hidden_states_proj(text.tokens.to(x))
        last = [self.embedding_proj(text.pooled.to(x)), time, self.proj_in(x)]
        h = torch.cat([states, torch.stack(last, 1), self.prd_embedding.to(x).expand(len(x), -1, -1)], 1)  # (B,L+4,W)
        h = h + self.positional_embedding.to(h)
        length = h.shape[1]
        seen = F.pad(text.mask, (0, ADDED), value=True)[:, None, None, :]
        mask = seen & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()  # (B,1,L+4,L+4)
        for block in self.transformer_blocks:
            h = block(h, mask)
        return self.proj_to_clip_embeddings(self.norm_out(h[:, -1]))


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each beside a shortcut, as diffusers' BasicTransformerBlock names them."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = SelfAttention(width, heads, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B,L,W) -> (B,L,W)."""
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class SelfAttention(nn.Module):
    """Multi-head attention with biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B,L,W) -> (B,L,W)."""
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        out = attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.to_out[1](self.to_out[0](out))


class FeedForward(nn.Module):
    """GELU of four times the width, and back."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.ModuleList([Activated(width), nn.Dropout(dropout), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,W) -> (B,L,W)."""
        for layer in self.net:
            x = layer(x)
        return x


class Activated(nn.Module):
    """GELU of a projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,W) -> (B,L,4W)."""
        return F.gelu(self.proj(x))
