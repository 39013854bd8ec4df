"""Diffusion transformer with cross-attention to the text (DiT, arXiv 2212.09748; PixArt-alpha, 2310.00426), under diffusers' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Depth, Fraction, PositiveFloat, Side, Width, config, named
from ldm.diffusion.batch import Cond, Text
from ldm.models.attention import attention
from ldm.models.backbone import Denoiser, DenoiserConfig
from ldm.models.blocks import recompute, zero
from ldm.models.diffusers_config import CONFIG, names_of, renamed_from_diffusers, renamed_to_diffusers, require_width
from ldm.models.embeddings import PatchEmbed, TimeEmbedding, unpatch, waves

TIME_CHANNELS = 256  # of the waves that a time or a size becomes
NORM_EPS = 1e-6

CLASS = "PixArtTransformer2DModel"
PLAIN = (
    ("in_channels", "in_channels", 4),
    ("out_channels", "out_channels", 8),
    ("num_attention_heads", "heads", 16),
    ("attention_head_dim", "head_width", 72),
    ("num_layers", "layers", 28),
    ("caption_channels", "context_width", None),
    ("patch_size", "patch", 2),
    ("dropout", "dropout", 0.0),
    ("sample_size", "sample_size", 128),
    ("interpolation_scale", "interpolation_scale", None),
    ("use_additional_conditions", "size_conditions", None),
)
FIXED: dict[str, object] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_eps": NORM_EPS,
    "norm_type": "ada_norm_single",
    "upcast_attention": False,
}
IGNORED = (
    "norm_num_groups",
    "num_embeds_ada_norm",
    "cross_attention_dim",
    "caption_projection_dim",
    "use_linear_projection",
    "num_vector_embeds",
)


@named("dit")
@config
class DiTConfig(DenoiserConfig):
    """What a diffusion transformer is made of; the defaults are PixArt-alpha's, XL/2 at 512 px."""

    class_names: ClassVar[tuple[str, ...]] = (CLASS,)

    kind: Literal["dit"] = "dit"
    in_channels: Width = 4  # channels of x and Cond.image together
    out_channels: Width = 4  # channels of the prediction
    heads: Width = 16  # attention heads
    head_width: Width = 72  # channels of each
    layers: Depth = 28  # transformer blocks
    context_width: Width = 4096  # width of the text states
    patch: Width = 2  # side of a patch, in latents
    dropout: Fraction = 0.0  # dropout in the feed-forward layers
    sample_size: Side = 64  # side of the latents at which positions count in steps of one; other sizes are stretched to it
    interpolation_scale: PositiveFloat | None = None  # positions are divided by it; null: sample_size / 64, at least 1
    size_conditions: bool = False  # told the picture's size and aspect ratio (PixArt-alpha at 1024 px)
    checkpointing: bool = field(default=False, compare=False)  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        require_width(self.width, "heads x head_width")
        if self.width % (12 if self.size_conditions else 4):
            raise UserError(f"heads x head_width is {self.width}; it must be a multiple of {12 if self.size_conditions else 4}")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_width

    @property
    def aligned_width(self) -> int:
        """The width."""
        return self.width

    @property
    def multiple(self) -> int:
        """Sides of the latents must be multiples of it: the patch."""
        return self.patch

    @property
    def reads_size(self) -> bool:
        """Whether the network must be told Cond.size."""
        return self.size_conditions

    def build(self) -> DiT:
        """A freshly initialised network."""
        return DiT(self)

    def continuing(self, base: Self) -> Self:
        """The configuration of a network that goes on from `base`: its shape is the base's, what concerns training alone is as here."""
        return replace(base, dropout=self.dropout, checkpointing=self.checkpointing)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' config.json."""
        return renamed_to_diffusers(CLASS, self, FIXED, PLAIN) | {"cross_attention_dim": self.width}

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> Self:
        """The configuration behind a config.json.

        Raises:
            UserError: for a field whose value this network does not have.
        """
        said = renamed_from_diffusers(CLASS, values, FIXED, PLAIN, IGNORED)
        if said["context_width"] is None:
            raise UserError(f"config.json of {CLASS}: caption_channels is null; this network has a projection of the text only")
        if said["out_channels"] is None:
            said["out_channels"] = said["in_channels"]
        if said["size_conditions"] is None:
            said["size_conditions"] = said["sample_size"] == 128
        made = typed(said, cls, CONFIG, names_of(PLAIN))
        if (found := values.get("cross_attention_dim", 1152)) != made.width:
            raise UserError(f"config.json of {CLASS}: cross_attention_dim is {found}; this network has {made.width} only")
        return made


Shifts: TypeAlias = tuple[Tensor, Tensor]  # (B,6W) that all blocks share, and the embedding behind it (B,W)


@dataclass(frozen=True, slots=True)
class TextMemory:
    """What the cross-attentions see of a prompt: keys and values of every block, and which tokens are words."""

    keys_values: list[tuple[Tensor, Tensor]]  # each (B,heads,L,D)
    mask: Tensor  # (B,1,1,L) bool


class DiT(Denoiser):
    """Transformer blocks over the patches of the latents, modulated by the time (adaLN-single), attending to the text.

    Padding tokens are hidden, as PixArt's pipeline does. New weights are PixArt's: cross-attentions and the last layer
    begin with zero.
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        width, c = config.width, config
        scale = c.interpolation_scale or max(c.sample_size // 64, 1)
        self.pos_embed = PatchEmbed(c.in_channels, width, c.patch, base=c.sample_size // c.patch, scale=scale)
        self.transformer_blocks = nn.ModuleList(DiTBlock(width, c.heads, c.dropout) for _ in range(c.layers))
        self.adaln_single = SharedModulation(width, c.size_conditions)
        self.caption_projection = TextProjection(c.context_width, width)
        self.norm_out = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, c.patch**2 * c.out_channels)
        self._initialise()

    def forward(
        self, x: Tensor, t: Tensor, cond: Cond, memory: TextMemory | None = None, step: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Predict the target.

        Args:
            x: (B,C,h,w), the noised latents.
            t: (B,), the time in the units of training.
            cond: the text; the image, if any, joins the channels of x; the sizes, if the network was told to use them.
            memory: what `remember` made of the text of `cond`.
            step: what `schedule` made of `t` and `cond`; `t` is not read then.

        Returns:
            (B,C',h,w).

        Raises:
            ValueError: if the channels do not add up, or `cond` lacks something that this network needs.
        """
        x = x if cond.image is None else torch.cat([x, cond.image], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise ValueError(f"x and Cond.image have {x.shape[1]} channels; this transformer wants {self.config.in_channels}")
        height, width = (side // self.config.patch for side in x.shape[2:])
        tokens = self.pos_embed(x)  # (B,h*w,W)
        shifts, embedded = self._modulation(t, cond, x.dtype) if step is None else step  # (B,6W), (B,W)
        states, mask = self._text(cond.text, x.dtype) if memory is None else (None, memory.mask)
        for i, block in enumerate(self.transformer_blocks):
            seen = states if memory is None else memory.keys_values[i]
            if self.checkpointing and torch.is_grad_enabled():
                tokens = recompute(block, tokens, shifts, seen, mask)
            else:
                tokens = block(tokens, shifts, seen, mask)
        shift, scale = (self.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)  # (B,1,W) each
        tokens = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        return unpatch(tokens, height, width, self.config.patch)

    def remember(self, text: Text) -> TextMemory:
        """The keys and values of every cross-attention: they depend on the prompt alone, so once serves all steps."""
        tokens, mask = self._text(text, self.proj_out.weight.dtype)
        return TextMemory([block.attn2.keys_values(tokens) for block in self._blocks()], mask)

    def schedule(self, t: Tensor, cond: Cond) -> list[Shifts]:
        """The modulation at each of the times t (S,); with sizes it holds for the batch of `cond`, else for any."""
        return [self._modulation(one, cond, self.proj_out.weight.dtype) for one in t.split(1)]

    @property
    def told_more(self) -> bool:
        """Whether the modulation has sizes in it, which differ from picture to picture."""
        return self.config.size_conditions

    def recomputed(self) -> Iterator[nn.Module]:
        """The transformer blocks."""
        yield from self.transformer_blocks

    def aligned(self) -> nn.Module:
        """The transformer block at two sevenths of the depth, as the eighth of 28 (REPA, section 4)."""
        return self.transformer_blocks[max(round(2 * self.config.layers / 7), 1) - 1]

    def _blocks(self) -> Iterator[DiTBlock]:
        for block in self.transformer_blocks:
            assert isinstance(block, DiTBlock)
            yield block

    def _text(self, text: Text | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if text is None:
            raise ValueError("this transformer attends to text, but Cond.text is None")
        return self.caption_projection(text.tokens.to(dtype)), text.mask[:, None, None, :]

    def _modulation(self, t: Tensor, cond: Cond, dtype: torch.dtype) -> Shifts:
        if self.config.size_conditions and cond.size is None:
            raise ValueError("this transformer is told sizes, but Cond.size is None")
        return self.adaln_single(t, cond.size, dtype)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.config.width, -1))
        for part in (self.adaln_single, self.caption_projection):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for block in self._blocks():
            zero(block.attn2.out)
        zero(self.proj_out)


class DiTBlock(nn.Module):
    """Self-attention, attention to the text, and a feed-forward layer; the time scales, shifts and gates the first and the last."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn1 = TokenAttention(width, heads)
        self.attn2 = TokenAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.ff = TokenFeedForward(width, dropout)

    def forward(self, x: Tensor, shifts: Tensor, seen: Tensor | tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """(B,N,W) -> (B,N,W).

        Args:
            x: tokens of the picture.
            shifts: (B or 1,6W), of the time.
            seen: states of the text (B,L,W), or the keys and values that `attn2` made of them.
            mask: (B,1,1,L) bool, False for padding.
        """
        table = self.scale_shift_table[None] + shifts.unflatten(1, (6, -1))  # (B,6,W)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = table.chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.attn1(h, self.attn1.keys_values(h))
        keys_values = seen if isinstance(seen, tuple) else self.attn2.keys_values(seen)
        x = x + self.attn2(x, keys_values, mask)
        return x + gate_ff * self.ff(self.norm2(x) * (1 + scale_ff) + shift_ff)


class TokenAttention(nn.Module):
    """Multi-head attention of tokens to given keys and values, with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    @property
    def out(self) -> nn.Linear:
        """The layer after the heads."""
        return cast("nn.Linear", self.to_out[0])

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """(B,N,W) -> (B,N,W)."""
        out = attention(split_heads(self.to_q(x), self.heads), *keys_values, mask)
        return self.out(out.transpose(1, 2).flatten(2))

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B,S,W) -> two of (B,heads,S,D)."""
        return split_heads(self.to_k(source), self.heads), split_heads(self.to_v(source), self.heads)


class TokenFeedForward(nn.Module):
    """GELU (tanh form) of four times the width, and back."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(width, 4 * width), nn.Dropout(dropout), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,W) -> (B,N,W)."""
        for layer in self.net:
            x = layer(x)
        return x


class GeluProjection(nn.Module):
    """GELU of a linear layer, in its tanh form."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,W) -> (B,N,inner)."""
        return F.gelu(self.proj(x), approximate="tanh")


class TextProjection(nn.Module):
    """Linear, GELU (tanh form) or SiLU, linear."""

    def __init__(self, channels: int, width: int, silu: bool = False) -> None:
        super().__init__()
        self.silu = silu
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(...,C) -> (...,W)."""
        h = self.linear_1(x)
        return self.linear_2(F.silu(h) if self.silu else F.gelu(h, approximate="tanh"))


class SharedModulation(nn.Module):
    """The scales, shifts and gates that all blocks share, of the time and where wanted of the size (adaLN-single, 2310.00426, 2.3)."""

    def __init__(self, width: int, sizes: bool) -> None:
        super().__init__()
        self.emb = TimeAndSize(width, sizes)
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, size: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B,) and (B,6) px -> (B,6W) and the embedding itself (B,W)."""
        embedded = self.emb(t, size, dtype)
        return self.linear(F.silu(embedded)), embedded


class TimeAndSize(nn.Module):
    """Embedding of the time, to which a size's and an aspect ratio's are added."""

    def __init__(self, width: int, sizes: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimeEmbedding(TIME_CHANNELS, width)
        self.resolution_embedder = TimeEmbedding(TIME_CHANNELS, width // 3) if sizes else None
        self.aspect_ratio_embedder = TimeEmbedding(TIME_CHANNELS, width // 3) if sizes else None

    def forward(self, t: Tensor, size: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B,) and (B,6) px -> (B,W)."""
        embedded = self.timestep_embedder(waves(t, TIME_CHANNELS).to(dtype))
        if self.resolution_embedder is None or self.aspect_ratio_embedder is None or size is None:
            return embedded
        target = size[:, 4:6].float()  # height and width px
        sides = self.resolution_embedder(waves(target.flatten(), TIME_CHANNELS).to(dtype)).view(len(target), -1)
        ratio = self.aspect_ratio_embedder(waves(target[:, 0] / target[:, 1], TIME_CHANNELS).to(dtype))
        return embedded + torch.cat([sides, ratio], dim=1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B,N,W) -> (B,heads,N,W/heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
