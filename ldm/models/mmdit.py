"""Multimodal diffusion transformer, text and picture in one attention (MMDiT, arXiv 2403.03206), under diffusers' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Count, Depth, Side, Width, config, named
from ldm.diffusion.batch import Cond, Text
from ldm.models.attention import attention
from ldm.models.backbone import Denoiser, DenoiserConfig
from ldm.models.blocks import zero
from ldm.models.diffusers_config import CONFIG, names_of, renamed_from_diffusers, renamed_to_diffusers, require_width
from ldm.models.dit import NORM_EPS, TIME_CHANNELS, TextProjection, TokenFeedForward, split_heads
from ldm.models.embeddings import PatchEmbed, TimeEmbedding, unpatch, waves

CLASS = "SD3Transformer2DModel"
PLAIN = (
    ("in_channels", "in_channels", 16),
    ("out_channels", "out_channels", 16),
    ("num_attention_heads", "heads", 18),
    ("attention_head_dim", "head_width", 64),
    ("num_layers", "layers", 18),
    ("joint_attention_dim", "context_width", 4096),
    ("pooled_projection_dim", "pooled_channels", 2048),
    ("patch_size", "patch", 2),
    ("sample_size", "sample_size", 128),
    ("pos_embed_max_size", "largest", 96),
    ("qk_norm", "qk_norm", None),
    ("dual_attention_layers", "dual_attention_layers", ()),
)


@named("mmdit")
@config
class MMDiTConfig(DenoiserConfig):
    """What a multimodal diffusion transformer is made of; the defaults are Stable Diffusion 3 medium's, but for its pooled text."""

    class_names: ClassVar[tuple[str, ...]] = (CLASS,)

    kind: Literal["mmdit"] = "mmdit"
    in_channels: Width = 16  # channels of x and Cond.image together
    out_channels: Width = 16  # channels of the prediction
    heads: Width = 24  # attention heads
    head_width: Width = 64  # channels of each
    layers: Depth = 24  # transformer blocks
    context_width: Width = 4096  # width of the text states
    pooled_channels: Count = 0  # width of the pooled text (Stable Diffusion 3: 2048); 0: as the text states
    patch: Width = 2  # side of a patch, in latents
    sample_size: Side = 128  # side of the latents at which positions count in steps of one
    largest: Side = 192  # patches along a side that positions are stored for; a picture takes the middle of the table
    qk_norm: Literal["rms_norm"] | None = None  # normalise queries and keys (Stable Diffusion 3.5)
    dual_attention_layers: tuple[Count, ...] = ()  # blocks in which the picture attends to itself once more (3.5 medium)
    checkpointing: bool = field(default=False, compare=False)  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        require_width(self.width, "heads x head_width")
        if self.width % 4:
            raise UserError(f"heads x head_width is {self.width}; it must be a multiple of 4")
        if wrong := [i for i in self.dual_attention_layers if i >= self.layers]:
            raise UserError(f"dual_attention_layers: {wrong[0]} is no block of {self.layers}; they count from 0")

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
    def reads_pooled(self) -> bool:
        """Always."""
        return True

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text."""
        return self.pooled_channels or self.context_width

    def build(self) -> MMDiT:
        """A freshly initialised network."""
        return MMDiT(self)

    def continuing(self, base: Self) -> Self:
        """The configuration of a network that goes on from `base`: its shape is the base's, what concerns training alone is as here."""
        return replace(base, checkpointing=self.checkpointing)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' config.json."""
        said = renamed_to_diffusers(CLASS, self, {}, PLAIN)
        return said | {"caption_projection_dim": self.width, "pooled_projection_dim": self.pooled_width}

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> Self:
        """The configuration behind a config.json.

        Raises:
            UserError: for a field whose value this network does not have.
        """
        said = renamed_from_diffusers(CLASS, values, {}, PLAIN, ("caption_projection_dim",))
        if said["out_channels"] is None:
            said["out_channels"] = said["in_channels"]
        if said["qk_norm"] not in (None, "rms_norm"):
            raise UserError(f"config.json of {CLASS}: qk_norm is {said['qk_norm']!r}; this network has null or 'rms_norm' only")
        made = typed(said, cls, CONFIG, names_of(PLAIN))
        if (found := values.get("caption_projection_dim", 1152)) != made.width:
            raise UserError(f"config.json of {CLASS}: caption_projection_dim is {found}; this network has {made.width} only")
        return made


class MMDiT(Denoiser):
    """Transformer blocks over the patches of the latents and the tokens of the text together, each with weights of its own.

    The time and the pooled text modulate both (adaLN-Zero). All tokens of the text are seen, padding too, as Stable
    Diffusion 3 does. New weights: modulations and the last layer begin with zero, so that a fresh block passes its input on.
    """

    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        width, c = config.width, config
        self.pos_embed = PatchEmbed(c.in_channels, width, c.patch, base=c.sample_size // c.patch, largest=c.largest)
        self.time_text_embed = TimeAndText(width, c.pooled_width)
        self.context_embedder = nn.Linear(c.context_width, width)
        self.transformer_blocks = nn.ModuleList(JointBlock(c, i) for i in range(c.layers))
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, c.patch**2 * c.out_channels)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: Tensor | None = None, step: Tensor | None = None) -> Tensor:
        """Predict the target.

        Args:
            x: (B,C,h,w), the noised latents.
            t: (B,), the time in the units of training.
            cond: the text with its pooled state; the image, if any, joins the channels of x.
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
        if cond.text is None or cond.text.pooled is None:
            raise ValueError("this transformer is told a text and its pooled state, but Cond.text lacks one")
        height, width = (side // self.config.patch for side in x.shape[2:])
        tokens = self.pos_embed(x)  # (B,h*w,W)
        told = self.time_text_embed(t, cond.text.pooled.to(x.dtype)) if step is None else step  # (B,W)
        text: Tensor | None = self.context_embedder(cond.text.tokens.to(x.dtype)) if memory is None else memory  # (B,L,W)
        for block in self.transformer_blocks:
            if self.checkpointing and torch.is_grad_enabled():
                tokens, text = torch.utils.checkpoint.checkpoint(block, tokens, text, told, use_reentrant=False)
            else:
                tokens, text = block(tokens, text, told)
        scale, shift = self.norm_out.parts(told)
        return unpatch(self.proj_out(self.norm_out(tokens, shift, scale)), height, width, self.config.patch)

    def remember(self, text: Text) -> Tensor:
        """The text's tokens as the first block sees them; from there on they change with the picture."""
        return self.context_embedder(text.tokens.to(self.proj_out.weight.dtype))

    def schedule(self, t: Tensor, cond: Cond) -> list[Tensor]:
        """The embedding of each of the times t (S,) with the pooled text of `cond`, (B,W) each."""
        if cond.text is None or cond.text.pooled is None:
            raise ValueError("this transformer is told the pooled text, but Cond.text.pooled is None")
        pooled = cond.text.pooled.to(self.proj_out.weight.dtype)
        return [self.time_text_embed(one.expand(len(pooled)), pooled) for one in t]

    @property
    def told_more(self) -> bool:
        """The pooled text differs from prompt to prompt."""
        return True

    def recomputed(self) -> Iterator[nn.Module]:
        """The transformer blocks."""
        yield from self.transformer_blocks

    def aligned(self) -> nn.Module:
        """The transformer block at two sevenths of the depth, as the eighth of 28 (REPA, section 4)."""
        return self.transformer_blocks[max(round(2 * self.config.layers / 7), 1) - 1]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.pos_embed.proj.weight.view(self.config.width, -1))
        for module in self.time_text_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                zero(module.linear)
        zero(self.proj_out)


class TimeAndText(nn.Module):
    """Embedding of the time plus that of the pooled text."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.timestep_embedder = TimeEmbedding(TIME_CHANNELS, width)
        self.text_embedder = TextProjection(pooled, width, silu=True)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """(B,) and (B,P) -> (B,W)."""
        return self.timestep_embedder(waves(t, TIME_CHANNELS).to(pooled.dtype)) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """Layer norm whose scale and shift, and gates besides, come from an embedding (adaLN-Zero)."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(width, count * width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)

    def parts(self, told: Tensor) -> tuple[Tensor, ...]:
        """(B,W) -> `count` of (B,1,W)."""
        return self.linear(F.silu(told))[:, None].chunk(self.count, dim=2)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(B,N,W) -> (B,N,W)."""
        return self.norm(x) * (1 + scale) + shift


class JointBlock(nn.Module):
    """One attention over picture and text, then a feed-forward layer for each; the last block leaves the text as it is."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        width = config.width
        last, twice = index == config.layers - 1, index in config.dual_attention_layers
        self.norm1 = Modulation(width, 9 if twice else 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(config, joins_text=True, answers_text=not last)
        self.attn2 = JointAttention(config, joins_text=False, answers_text=False) if twice else None
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.ff = TokenFeedForward(width)
        self.norm2_context = None if last else nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.ff_context = None if last else TokenFeedForward(width)

    def forward(self, x: Tensor, text: Tensor, told: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B,N,W), (B,L,W) and the embedding (B,W) -> (B,N,W) and (B,L,W), or None after the last block."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *again = self.norm1.parts(told)
        h = self.norm1(x, shift, scale)
        if self.ff_context is None:
            text_scale, text_shift = self.norm1_context.parts(told)  # the last one's order is the other way round
            answer, _ = self.attn(h, self.norm1_context(text, text_shift, text_scale))
        else:
            text_shift, text_scale, text_gate, *text_ff = self.norm1_context.parts(told)
            answer, text_answer = self.attn(h, self.norm1_context(text, text_shift, text_scale))
        second = None if self.attn2 is None else again[2] * self.attn2(self.norm1(x, again[0], again[1]))[0]
        x = x + gate * answer
        if second is not None:
            x = x + second
        x = x + gate_ff * self.ff(self.norm2(x) * (1 + scale_ff) + shift_ff)
        if self.ff_context is None or self.norm2_context is None:
            return x, None
        text = text + text_gate * text_answer
        shift_ff, scale_ff, gate_ff = text_ff
        return x, text + gate_ff * self.ff_context(self.norm2_context(text) * (1 + scale_ff) + shift_ff)


class JointAttention(nn.Module):
    """Multi-head attention of a picture's tokens to themselves, and where it `joins_text` of both to both."""

    def __init__(self, config: MMDiTConfig, joins_text: bool, answers_text: bool) -> None:
        super().__init__()
        width, normed = config.width, config.qk_norm is not None
        self.heads, self.joins_text = config.heads, joins_text
        self.norm_q = QueryNorm(config.head_width) if normed else None
        self.norm_k = QueryNorm(config.head_width) if normed else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        if joins_text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.norm_added_q = QueryNorm(config.head_width) if normed else None
            self.norm_added_k = QueryNorm(config.head_width) if normed else None
        self.to_add_out = nn.Linear(width, width) if answers_text else None

    def forward(self, x: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B,N,W) and (B,L,W) -> the same shapes; None for a text that is not answered."""
        q, k, v = (split_heads(layer(x), self.heads) for layer in (self.to_q, self.to_k, self.to_v))  # (B,heads,N,D)
        q, k = (y if norm is None else norm(y) for norm, y in ((self.norm_q, q), (self.norm_k, k)))
        if text is not None:
            added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            text_q, text_k, text_v = (split_heads(layer(text), self.heads) for layer in added)  # (B,heads,L,D)
            text_q = text_q if self.norm_added_q is None else self.norm_added_q(text_q)
            text_k = text_k if self.norm_added_k is None else self.norm_added_k(text_k)
            q, k, v = (torch.cat(pair, dim=2) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out = attention(q, k, v).transpose(1, 2).flatten(2)  # (B,N+L,W)
        answer = None if self.to_add_out is None else self.to_add_out(out[:, x.shape[1] :])
        return self.to_out[0](out[:, : x.shape[1]]), answer


class QueryNorm(nn.Module):
    """RMSNorm of queries or keys, head by head (arXiv 1910.07467), computed in float32 at least."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(...,D) -> (...,D)."""
        fine = x if x.dtype == torch.float64 else x.float()
        return (fine * torch.rsqrt(fine.pow(2).mean(-1, keepdim=True) + NORM_EPS)).to(x.dtype) * self.weight
