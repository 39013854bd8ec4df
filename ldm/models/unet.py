"""The U-Net of Stable Diffusion 1.x, 2.x and XL, and small kin of it, under diffusers' parameter names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, replace
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Count, Depth, Fraction, Positive, PositiveFloat, Width, config, named
from ldm.diffusion.batch import Cond, Injected, Text, WeightedTokens
from ldm.models.attention_exchange import AttentionExchange
from ldm.models.backbone import Denoiser, DenoiserConfig
from ldm.models.blocks import Downsample, ResnetBlock, TimeShifts, Upsample, recompute, start_as_identity, zero
from ldm.models.coder import MapAttention
from ldm.models.diffusers_config import (
    CONFIG,
    LEVEL_NAMES,
    OWN_UNET,
    STOCK_UNET,
    TEXTLESS_PLAIN,
    TEXTLESS_UNET,
    UNET_PLAIN,
    names_of,
    require_buildable,
    unet_from_diffusers,
    unet_to_diffusers,
)
from ldm.models.embeddings import COORDINATES, TimeEmbedding, coordinates, waves
from ldm.models.grounding import GroundingEmbedding
from ldm.models.inference import prepare, shared_copy
from ldm.models.transformer import CrossAttention, GatedSelfAttention, Memory, Transformer, TransformerBlock

SIZES = 6  # numbers in Cond.size
TEXTUAL = ("size_channels", "pooled_text", "mask_padding", "gated", "coordinates", "guidance_channels", "class_embedding")
NOTHING = Injected()


@named("unet")
@config
class UNetConfig(DenoiserConfig):
    """What a U-Net is made of; the defaults are Stable Diffusion 1.x.

    With a `context_width` of 0 it reads no text: places attend to each other alone, as in DDPM (diffusers' UNet2DModel).
    `coordinates`, `pooled_text` and `mask_padding` leave the stock architecture: with one of them `stock` is False and
    diffusers cannot open the model.
    """

    folder: ClassVar[Literal["unet", "transformer"]] = "unet"
    class_names: ClassVar[tuple[str, ...]] = (STOCK_UNET, OWN_UNET, TEXTLESS_UNET)
    later: ClassVar[tuple[str, ...]] = ("guidance_channels", "gated", "class_embedding", "class_width", "padded_at_end")

    kind: Literal["unet"] = "unet"
    in_channels: Width = 4  # channels of x and Cond.image together (9 for Stable Diffusion inpainting)
    out_channels: Width = 4  # channels of the prediction
    channels: tuple[Width, ...] = (320, 640, 1280, 1280)  # width of each level, from the full resolution down
    layers: Depth = 2  # residual blocks per level on the way down (one more on the way up)
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels attend to themselves and to the text
    middle: Literal["attention", "plain", "none"] = "attention"  # middle block; plain: one residual block
    heads: Width | tuple[Width, ...] = 8  # attention heads, for all levels or for each
    depth: Depth | tuple[Depth, ...] = 1  # transformer blocks per attention, for all levels or for each
    context_width: Count = 768  # width of the text states; 0: it reads none
    linear_projection: bool = False  # enter and leave attention by a linear layer (SD 2.x, XL), not a 1x1 convolution
    upcast_attention: bool = False  # compute attention in float32 (SD 2.1 overflows in float16)
    size_channels: Count = 0  # channels for each number of Cond.size (XL: 256); 0: neither sizes nor pooled text
    pooled_channels: Count = 0  # width of the pooled text (XL: 1280); 0: as the text states
    guidance_channels: Count = 0  # width of the guidance scale's waves (latent consistency models: 256); 0: the network is not told it
    norm_groups: Width = 32  # groups of every GroupNorm
    norm_eps: PositiveFloat = 1e-5  # added to the variance in the residual blocks
    padded_at_end: bool = False  # without text: halving pads below and to the right alone, as the published DDPM's
    dropout: Fraction = 0.0  # dropout in residual blocks and feed-forward layers
    flip_sin_to_cos: bool = True  # the time embedding starts with its cosines
    freq_shift: Count = 0  # shift in the denominator of the time embedding's frequencies
    class_embedding: Literal["none", "timestep", "table", "projection"] = (
        "none"  # how Cond.vector joins the time embedding; none: not at all
    )
    class_width: Count = 0  # rows of the table, or width of the vector that is projected
    gated: bool = False  # every transformer has gated self-attention to objects that are told by boxes (GLIGEN)
    sample_size: Positive | None = field(default=None, compare=False)  # side of the latents that diffusers assumes
    coordinates: bool = False  # append x, y and their cosine and sine to the input (not stock)
    pooled_text: bool = False  # add the pooled text to the time embedding (not stock)
    mask_padding: bool = False  # hide padding tokens from attention; Stable Diffusion shows all 77 (not stock)
    zero_start: bool = field(default=False, compare=False)  # a fresh network's residual branches and output are zero
    checkpointing: bool = field(default=False, compare=False)  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        levels = len(self.channels)
        require_buildable(self.channels, self.layers * (1 + max(self.level_depth, default=1)))
        for name in ("attention", "heads", "depth"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise UserError(f"{name} has {len(value)} entries for the {levels} levels of channels {self.channels}")
        for level, channels in enumerate(self.channels):
            attends = self.attention[level] or (level == levels - 1 and self.middle == "attention")
            if channels % self.norm_groups:
                raise UserError(f"norm_groups {self.norm_groups} does not divide {channels} of channels")
            if attends and channels % self.level_heads[level]:
                raise UserError(f"heads {self.level_heads[level]} does not divide {channels} of channels")
        if self.pooled_channels and not self.reads_pooled:
            raise UserError("pooled_channels is set, but neither size_channels nor pooled_text uses the pooled text")
        if bool(self.class_width) != (self.class_embedding in ("table", "projection")):
            raise UserError(f"class_width is {self.class_width} with class_embedding={self.class_embedding}; table and projection need it")
        if self.class_embedding == "projection" and self.size_channels:
            raise UserError(
                "class_embedding=projection and size_channels exclude each other: diffusers has one field for both their widths"
            )
        if not self.context_width:
            self._check_textless()
        elif self.padded_at_end:
            raise UserError("padded_at_end is of networks that read no text (context_width 0); leave it out")
        if self.size_channels and self.pooled_text:
            raise UserError("size_channels brings the pooled text along already; leave pooled_text off")

    def _check_textless(self) -> None:
        """Refuse what diffusers' UNet2DModel has not.

        Raises:
            UserError: naming the field.
        """
        usual = {f.name: f.default for f in fields(self) if f.name in ("depth", "linear_projection", "upcast_attention", *TEXTUAL)}
        for name, value in usual.items():
            if getattr(self, name) != value:
                raise UserError(f"{name}: got {getattr(self, name)}; without text there is no such thing, leave it out")
        if self.middle != "attention":
            raise UserError(f"middle: got {self.middle}; without text the middle attends, leave it out")
        if not self.single_headed and len({c // h for c, h in zip(self.channels, self.level_heads, strict=True)}) > 1:
            raise UserError(f"heads: got {self.heads}; without text all heads are equally wide (channels / heads), or each level has one")

    @property
    def single_headed(self) -> bool:
        """Whether every level attends with one head."""
        return set(self.level_heads) == {1}

    @property
    def stock(self) -> bool:
        """Whether diffusers can open the model."""
        return not (self.coordinates or self.pooled_text or self.mask_padding)

    @property
    def aligned_width(self) -> int:
        """Channels of the second level, of the first where there is no other."""
        return self.channels[:2][-1]

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text, where it is read."""
        return self.pooled_channels or self.context_width

    @property
    def reads_pooled(self) -> bool:
        """Whether the pooled text is added to the time embedding."""
        return self.size_channels > 0 or self.pooled_text

    @property
    def reads_size(self) -> bool:
        """Whether the network must be told Cond.size (as Stable Diffusion XL's)."""
        return self.size_channels > 0

    @property
    def reads_guidance(self) -> bool:
        """Whether the network must be told Cond.guidance, as one that was distilled from guided steps."""
        return self.guidance_channels > 0

    @property
    def reads_vector(self) -> bool:
        """Whether something joins the time embedding."""
        return self.class_embedding != "none"

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Of what is projected."""
        return (self.class_width,) if self.class_embedding == "projection" else ()

    def told_vector(self, kind: str, width: int = 0) -> UNetConfig:
        """With this class embedding."""
        return replace(self, class_embedding=cast(Any, kind), class_width=width)

    @property
    def level_heads(self) -> tuple[int, ...]:
        """Heads at each level."""
        return self.heads if isinstance(self.heads, tuple) else (self.heads,) * len(self.channels)

    @property
    def level_depth(self) -> tuple[int, ...]:
        """Transformer blocks per attention at each level."""
        return self.depth if isinstance(self.depth, tuple) else (self.depth,) * len(self.channels)

    @property
    def time_channels(self) -> int:
        """Width of the time embedding."""
        return 4 * self.channels[0]

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of the maps on the way down that the way up meets again."""
        scaled = len(self.channels) - 1
        return (self.channels[0], *(c for i, c in enumerate(self.channels) for _ in range(self.layers + (i < scaled))))

    def build(self) -> UNet:
        """A freshly initialised network."""
        return UNet(self)

    def continuing(self, base: UNetConfig) -> UNetConfig:
        """The configuration of a network that goes on from `base`: its shape is the base's, what concerns training alone is as here."""
        return replace(base, dropout=self.dropout, checkpointing=self.checkpointing, zero_start=False)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' config.json; under our own class name where diffusers has no such network."""
        return unet_to_diffusers(self)

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any]) -> UNetConfig:
        """The configuration behind a config.json.

        Raises:
            UserError: for a field whose value this network does not have.
        """
        plain = TEXTLESS_PLAIN if values.get("_class_name") == TEXTLESS_UNET else UNET_PLAIN
        return typed(unet_from_diffusers(values), cls, CONFIG, names_of(plain) | LEVEL_NAMES)


class UNetEncoder(nn.Module):
    """The way down of a U-Net and its middle, with the embeddings of the time and of all else that is added to it."""

    config: UNetConfig
    checkpointing: bool

    def __init__(self, config: UNetConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.checkpointing = config.checkpointing
        channels, time = config.channels, config.time_channels
        self.conv_in = nn.Conv2d(config.in_channels + COORDINATES * config.coordinates, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0], time, config.guidance_channels)
        self.add_embedding = TimeEmbedding(SIZES * config.size_channels + config.pooled_width, time) if config.size_channels else None
        self.pooled_embedding = TimeEmbedding(config.pooled_width, time) if config.pooled_text else None
        self.class_embedding = _class_embedding(config, time)
        down_blocks: list[Level] = []
        for i in range(len(channels)):
            scale = Downsample(channels[i], padded_at_end=config.padded_at_end) if i < len(channels) - 1 else None
            down_blocks.append(level(config, i, channels[max(i - 1, 0)], [0] * config.layers, scale))
        self.down_blocks = nn.ModuleList(down_blocks)
        self.mid_block = Middle(config, time) if config.middle != "none" else None

    def enter(self, x: Tensor, cond: Cond) -> Tensor:
        """What the first convolution makes of x (B,C,h,w), and of the image and the coordinates that join it.

        Raises:
            ValueError: if the channels do not add up.
        """
        if cond.image is not None:
            x = torch.cat([x, cond.image], dim=1)
        if x.shape[1] != self.config.in_channels:
            raise ValueError(f"x and Cond.image have {x.shape[1]} channels; this U-Net wants {self.config.in_channels}")
        if self.config.coordinates:
            x = torch.cat([x, coordinates(x)], dim=1)  # (B,C+6,h,w)
        return self.conv_in(x)  # (B,c,h,w)

    def contract(
        self, x: Tensor, time: Tensor | TimeShifts, memory: Memory, recomputed: bool, levels: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """The middle's output, and all maps (B,C,h,w) on the way there, of what `enter` gave; `levels` as in `Injected`."""
        skips = [x]
        for number, level in enumerate(_levels(self.down_blocks)):
            for i in range(len(level.resnets)):
                x = level.layer(i, x, time, memory, recomputed)
                if number < len(levels) and i == len(level.resnets) - 1:
                    x = x + levels[number]
                skips.append(x)
            if level.downsamplers is not None:
                x = level.downsamplers[0](x)
                skips.append(x)
        if self.mid_block is not None:
            x = recompute(self.mid_block, x, time, memory) if recomputed else self.mid_block(x, time, memory)
        return x, skips

    def remember(self, text: Text) -> Memory:
        """The keys and values of every cross-attention: they depend on the prompt alone, so once serves all steps."""
        memory = self._memory(text, self.conv_in.weight.dtype)
        if memory.tokens is not None:
            for module in self.modules():
                if isinstance(module, CrossAttention) and not module.looks_inward:
                    memory.keys_values[module] = module.keys_values(memory.tokens)
        return memory

    def _memory(self, text: Text | None, dtype: torch.dtype) -> Memory:
        if text is None or not self.config.context_width:
            if self.config.context_width and (any(self.config.attention) or self.config.middle == "attention"):
                raise ValueError("this U-Net attends to text, but Cond.text is None")
            return Memory(None, None)
        return Memory(text.tokens.to(dtype), text.mask[:, None, None, :] if self.config.mask_padding else None)

    @property
    def told_more(self) -> bool:
        """Whether the time embedding has sizes, pooled text or a guidance scale or a vector in it, which differ from prompt to prompt."""
        c = self.config
        return self.add_embedding is not None or self.pooled_embedding is not None or c.reads_guidance or c.class_embedding != "none"

    def schedule(self, t: Tensor, cond: Cond) -> list[TimeShifts]:
        """What the residual blocks add at each of the times t (S,): the embeddings of a whole schedule in one call.

        With sizes, pooled text or a guidance scale it holds for the batch of `cond`, else for any.
        """
        time = F.silu(self._time(t, cond, self.conv_in.weight.dtype, every=True))  # (S,B or 1,T)
        blocks = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        shifts = {block: block.time_emb_proj(time) for block in blocks if block.time_emb_proj is not None}
        return [TimeShifts({block: rows[i] for block, rows in shifts.items()}) for i in range(len(t))]

    def _time(self, t: Tensor, cond: Cond, dtype: torch.dtype, every: bool = False) -> Tensor:
        """The time embedding with all that is added to it: (B,T), or of `every` time for each of the batch (S,B or 1,T)."""
        c = self.config
        times = waves(t, c.channels[0], c.flip_sin_to_cos, c.freq_shift).to(dtype)
        times = times[:, None] if every else times
        if c.reads_guidance:
            if cond.guidance is None:
                raise ValueError("this U-Net is told the guidance scale, but Cond.guidance is None")
            scales = waves((cond.guidance - 1) * 1000, c.guidance_channels, cosine_first=False, shift=1)
            times = times + self.time_embedding.told(scales.to(dtype))
        time = self.time_embedding(times)
        if self.class_embedding is not None:
            time = time + self._classed(cond.vector, dtype)
        if self.add_embedding is None and self.pooled_embedding is None:
            return time
        if cond.text is None or cond.text.pooled is None:
            raise ValueError("this U-Net is told the pooled text, but Cond.text.pooled is None")
        pooled = cond.text.pooled.to(dtype)
        if self.pooled_embedding is not None:
            return time + self.pooled_embedding(pooled)
        if cond.size is None:
            raise ValueError("this U-Net is told sizes, but Cond.size is None")
        sizes = waves(cond.size.flatten(), c.size_channels, c.flip_sin_to_cos, c.freq_shift)
        sizes = sizes.view(len(pooled), -1).to(dtype)
        assert self.add_embedding is not None
        return time + self.add_embedding(torch.cat([pooled, sizes], dim=1))

    def _classed(self, vector: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What the class embedding makes (B,T) of Cond.vector."""
        c = self.config
        if vector is None:
            raise ValueError(f"this U-Net is told a vector (class_embedding {c.class_embedding}), but Cond.vector is None")
        assert self.class_embedding is not None
        if c.class_embedding == "table":
            return self.class_embedding(vector.long())
        told = waves(vector, c.channels[0], c.flip_sin_to_cos, c.freq_shift) if c.class_embedding == "timestep" else vector
        return self.class_embedding(told.to(dtype))


def _class_embedding(config: UNetConfig, time: int) -> nn.Module | None:
    if config.class_embedding == "none":
        return None
    if config.class_embedding == "table":
        return nn.Embedding(config.class_width, time)
    return TimeEmbedding(config.class_width or config.channels[0], time)


class UNet(UNetEncoder, Denoiser):
    """A denoising U-Net with attention to the states of a text.

    New weights are PyTorch's usual initialisation; with `zero_start` the last layer of every residual block, of every
    transformer and of the network are zero, as in latent diffusion's own code. That is slower at first: after 300 steps
    on toy shapes (64/128 channels, v-prediction, AdamW 1e-3, two seeds) the loss is 0.190, without it 0.161.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        channels, last = config.channels, len(config.channels) - 1
        widths = list(config.skip_channels)  # of the maps that the way up will meet again
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(channels))):
            skips = [widths.pop() for _ in range(config.layers + 1)]
            self.up_blocks.append(level(config, i, channels[min(i + 1, last)], skips, Upsample(channels[i]) if i else None))

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self.position_net = GroundingEmbedding(config.context_width) if config.gated else None
        if config.zero_start:
            start_as_identity(self)
            for module in self.modules():
                if isinstance(module, Transformer):
                    zero(module.proj_out)
            zero(self.conv_out)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: Memory | None = None, step: TimeShifts | None = None) -> Tensor:
        """Predict the target.

        Args:
            x: (B,C,h,w), the noised latents.
            t: (B,), the time in the units of training.
            cond: the text; the image, if any, joins the channels of x; the sizes, if the network was told to use them; what is injected.
            memory: what `remember` made of the text of `cond`, to save its projections in every step.
            step: what `schedule` made of `t` and `cond`, likewise; `t` is not read then.

        Returns:
            (B,C',h,w).

        Raises:
            ValueError: if the channels do not add up, or `cond` lacks something that this network needs.
        """
        dtype = x.dtype  # what the first convolution gives may be of a half type
        x = self.enter(x, cond)
        # (B,T); each block would repeat the SiLU
        time = F.silu(self._time(t, cond, dtype)) if step is None else step
        memory, injected = memory or self._memory(cond.text, dtype), cond.injected or NOTHING
        if (told := injected.objects) is not None:
            if self.position_net is None:
                raise ValueError("this U-Net is told objects, but has no gated self-attention")
            memory = replace(memory, objects=WeightedTokens(self.position_net(told.box, told.there, told.phrase.to(dtype)), told.weight))
        if injected.beside:
            found = enumerate(self.cross_attentions())
            memory = replace(memory, beside={m: [(b.keys[i], b.values[i], b.weight) for b in injected.beside] for i, m in found})
        recomputed = self.checkpointing and torch.is_grad_enabled()
        x, skips = self.contract(x, time, memory, recomputed, injected.levels)
        if injected.skips:
            skips = [skip + more for skip, more in zip(skips, injected.skips, strict=True)]
        if injected.middle is not None:
            x = x + injected.middle
        for level in _levels(self.up_blocks):
            for i in range(len(level.resnets)):
                x = level.layer(i, torch.cat([x, skips.pop()], dim=1), time, memory, recomputed)
            if level.upsamplers is not None:
                x = level.upsamplers[0](x, tuple(skips[-1].shape[2:]))
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B,C',h,w)

    def recomputed(self) -> Iterator[nn.Module]:
        """Residual blocks and transformers of all levels, and the middle as a whole."""
        for level in (*_levels(self.down_blocks), *_levels(self.up_blocks)):
            yield from level.resnets
            yield from level.attentions or ()
        if self.mid_block is not None:
            yield self.mid_block

    def aligned(self) -> nn.Module:
        """The last block of the second level on the way down, of the first where there is no other."""
        found = _levels(self.down_blocks)[: len(self.config.channels[:2])][-1]
        return (found.attentions or found.resnets)[-1]

    def for_inference(self, dtype: torch.dtype | None = None) -> UNet:
        """Fused, folded and laid out in place by `prepare`; to the bit what it was under autocast of `dtype`."""
        return prepare(self, dtype=dtype, channels_last=True, in_place=True)

    def taught_vector(self, wanted: UNetConfig) -> UNet:
        """The same function with a class embedding that adds zeros; all other weights are shared."""
        made = shared_copy(self)
        made.config = self.config.told_vector(wanted.class_embedding, wanted.class_width)
        made.class_embedding = _class_embedding(made.config, 4 * made.config.channels[0])
        last = made.class_embedding.linear_2 if isinstance(made.class_embedding, TimeEmbedding) else made.class_embedding
        assert last is not None
        for weight in last.parameters():
            nn.init.zeros_(weight)
        return made

    def widened(self, in_channels: int) -> UNet:
        """The same function with more input channels, to which new weights of zero listen; all other weights are shared."""
        have, more = self.config.in_channels, in_channels - self.config.in_channels
        old, made = self.conv_in.weight.detach(), shared_copy(self)
        zeros = old.new_zeros(old.shape[0], more, *old.shape[2:])
        made.config = replace(self.config, in_channels=in_channels)
        made.conv_in.in_channels += more
        # The coordinates, if any, come last.
        made.conv_in.weight = nn.Parameter(torch.cat([old[:, :have], zeros, old[:, have:]], dim=1))
        return made

    def told_guidance(self, channels: int) -> UNet:
        """The same function, told the guidance scale as waves of so many channels, to which new weights of zero listen."""
        made = shared_copy(self)
        made.config = replace(self.config, guidance_channels=channels)
        fresh = nn.Linear(channels, self.config.channels[0], bias=False)
        zero(fresh)
        made.time_embedding.cond_proj = fresh.to(self.conv_in.weight)
        return made

    def exchanging(self, memory: Memory, exchange: AttentionExchange) -> Memory:
        """The same keys and values, with an exchange of attention."""
        return replace(memory, exchange=exchange)

    def grounded(self) -> UNet:
        """The same function with gated self-attention in every transformer, whose gates are shut; all other weights are shared."""
        if self.config.gated:
            return self
        made, config = shared_copy(self), replace(self.config, gated=True)
        made.config, made.position_net = config, GroundingEmbedding(config.context_width)
        for block in made.modules():
            if isinstance(block, TransformerBlock):
                attn = block.attn1
                block.fuser = GatedSelfAttention(attn.to_q.out_features, config.context_width, attn.heads, attn.upcast)
        return made

    def cross_attentions(self) -> list[CrossAttention]:
        """Its attentions to the text, in the order of the network's parts."""
        return list(self.attentions_to_text().values())

    def attentions_to_text(self) -> dict[str, CrossAttention]:
        """The same by their names."""
        return {name: m for name, m in self.named_modules() if isinstance(m, CrossAttention) and not m.looks_inward}


class Level(nn.Module):
    """The residual blocks of one resolution, each with a transformer where the level attends, and a change of size."""

    def __init__(
        self, config: UNetConfig, sizes: list[int], channels: int, time: int, attends_as: int | None, scale: Downsample | Upsample | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet(config, size, channels, time) for size in sizes)
        self.attentions = None
        if attends_as is not None:
            self.attentions = nn.ModuleList(transformer(config, attends_as) for _ in sizes)
        self.downsamplers = nn.ModuleList([scale]) if isinstance(scale, Downsample) else None
        self.upsamplers = nn.ModuleList([scale]) if isinstance(scale, Upsample) else None

    def layer(self, i: int, x: Tensor, time: Tensor | TimeShifts, memory: Memory, recomputed: bool) -> Tensor:
        """Residual block i and its transformer, (B,C,h,w) -> (B,C',h,w)."""
        x = recompute(self.resnets[i], x, time) if recomputed else self.resnets[i](x, time)
        if self.attentions is None:
            return x
        told = (memory,) if isinstance(self.attentions[i], Transformer) else ()
        return recompute(self.attentions[i], x, *told) if recomputed else self.attentions[i](x, *told)


class Middle(nn.Module):
    """The blocks at the lowest resolution: residual, transformer, residual; or one residual block alone."""

    def __init__(self, config: UNetConfig, time: int) -> None:
        super().__init__()
        attends, channels = config.middle == "attention", config.channels[-1]
        self.attentions = nn.ModuleList([transformer(config, len(config.channels) - 1)] if attends else [])
        self.resnets = nn.ModuleList(resnet(config, channels, channels, time) for _ in range(1 + attends))

    def forward(self, x: Tensor, time: Tensor | TimeShifts, memory: Memory) -> Tensor:
        """(B,C,h,w) -> (B,C,h,w)."""
        x = self.resnets[0](x, time)
        for attend, block in zip(self.attentions, self.resnets[1:], strict=True):
            x = block(attend(x, memory) if isinstance(attend, Transformer) else attend(x), time)
        return x


def _levels(blocks: nn.ModuleList) -> list[Level]:
    return cast("list[Level]", list(blocks))


def level(config: UNetConfig, index: int, before: int, skips: list[int], scale: Downsample | Upsample | None) -> Level:
    """A level as `config` wants it, whose first block reads `before` channels, and each so many of `skips` besides."""
    channels = config.channels[index]
    sizes = [(channels if i else before) + more for i, more in enumerate(skips)]
    return Level(config, sizes, channels, config.time_channels, index if config.attention[index] else None, scale)


def resnet(config: UNetConfig, channels_in: int, channels_out: int, time: int) -> ResnetBlock:
    """A residual block as `config` wants it."""
    return ResnetBlock(
        channels_in, channels_out, groups=config.norm_groups, eps=config.norm_eps, time_channels=time, dropout=config.dropout
    )


def transformer(config: UNetConfig, level: int) -> Transformer | MapAttention:
    """The transformer of a level as `config` wants it; without text plain attention of its places."""
    if not config.context_width:
        return MapAttention(config.channels[level], config.norm_groups, heads=config.level_heads[level], eps=config.norm_eps)
    return Transformer(
        config.channels[level],
        heads=config.level_heads[level],
        depth=config.level_depth[level],
        context_width=config.context_width,
        groups=config.norm_groups,
        linear=config.linear_projection,
        upcast=config.upcast_attention,
        dropout=config.dropout,
        gated=config.gated,
    )
