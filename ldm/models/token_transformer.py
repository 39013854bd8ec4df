"""Token transformer: a transformer over codes under the parameter names of diffusers' UVit2DModel, in masked or in causal order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Codes, Count, Depth, Width, config
from ldm.models.attention import attention
from ldm.models.embeddings import waves
from ldm.models.transformer import FeedForward

STOCK, OWN = "UVit2DModel", "TokenTransformer"  # what config.json calls it in masked and in causal order
NUMBERS = 5  # that it is told of a picture, as aMUSEd: width, height, left, top (px), and an aesthetic score
AESTHETIC = 6.0  # the score that is told of every picture: what diffusers' AmusedPipeline tells where nothing is said
EPS = 1e-6  # of every norm


@config
class TokenTransformerConfig:
    """Size of a token transformer; the defaults are aMUSEd's (arXiv 2401.01808)."""

    width: Width = 1024  # of a token's state
    layers: Depth = 22  # transformer blocks
    heads: Width = 16  # attention heads; a divisor of width
    inner: Count = 0  # width of the feed-forward layers; 0: 2.75 times the width
    res_blocks: Count | None = (
        None  # convolutions before and after the layers, which tell n places from each edge; null: masked 3, causal 0
    )
    size_channels: Width = 256  # of the waves of each number that is told of a picture's size

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"heads {self.heads} does not divide width {self.width}")


@dataclass(frozen=True, kw_only=True)
class TokenShape:
    """Everything that decides a token transformer's weights."""

    width: Width
    layers: Depth
    heads: Width
    inner: Width
    res_blocks: Count
    size_channels: Width
    codes: Codes  # that it can write
    vocabulary: Codes  # that it can read: the codes, and what stands for one that is not known yet
    context_width: Count  # of the text states that it attends to; 0: to none
    pooled_width: Count  # of the pooled text; 0: it is told none
    positions: Count  # of causal order, as many as a sequence has places; 0: masked order
    small_codes: Count = 0  # that the codes of a smaller picture have, which every place is told; 0: it is told none
    spread: Depth = 1  # so many places of a side lie over one of them

    @staticmethod
    def of(
        size: TokenTransformerConfig,
        *,
        codes: int,
        vocabulary: int,
        context: int,
        pooled: int,
        positions: int,
        small: tuple[int, int] = (0, 1),
    ) -> TokenShape:
        """A configured size with what the other models decide.

        Args:
            small: how many codes a smaller picture's have, and the places of a side over one of them.
        """
        blocks = (0 if positions else 3) if size.res_blocks is None else size.res_blocks
        inner = size.inner or size.width * 11 // 4
        return TokenShape(
            width=size.width,
            layers=size.layers,
            heads=size.heads,
            inner=inner,
            res_blocks=blocks,
            size_channels=size.size_channels,
            codes=codes,
            vocabulary=vocabulary,
            context_width=context,
            pooled_width=pooled,
            positions=positions,
            small_codes=small[0],
            spread=small[1],
        )

    def build(self) -> TokenTransformer:
        """A freshly initialised network."""
        return TokenTransformer(self)

    def to_diffusers(self, side: int) -> dict[str, Any]:
        """The content of config.json; `side` is that of the codes' map."""
        if self.positions or not self.context_width or self.small_codes:
            said = {name: value for name, value in vars(self).items() if self.small_codes or name not in ("small_codes", "spread")}
            return {"_class_name": OWN, "sample_size": side, **said}
        return {
            "_class_name": STOCK,
            "hidden_size": self.width,
            "use_bias": False,
            "hidden_dropout": 0.0,
            "cond_embed_dim": self.pooled_width,
            "micro_cond_encode_dim": self.size_channels,
            "micro_cond_embed_dim": NUMBERS * self.size_channels,
            "encoder_hidden_size": self.context_width,
            "vocab_size": self.vocabulary,
            "codebook_size": self.codes,
            "in_channels": self.width,
            "block_out_channels": self.width,
            "num_res_blocks": self.res_blocks,
            "downsample": False,
            "upsample": False,
            "block_num_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_dropout": 0.0,
            "intermediate_size": self.inner,
            "layer_norm_eps": EPS,
            "ln_elementwise_affine": True,
            "sample_size": side,
        }

    @staticmethod
    def from_diffusers(values: Mapping[str, Any], where: str) -> TokenShape:
        """The shape behind a config.json, the file `where`.

        Raises:
            UserError: for another class, or naming the field whose value this network does not have.
        """
        said = {name: value for name, value in values.items() if not name.startswith("_") and name != "sample_size"}
        if values.get("_class_name") == OWN:
            return typed(said, TokenShape, where)
        if values.get("_class_name") != STOCK:
            raise UserError(f"{where}: _class_name is {values.get('_class_name')!r}; {STOCK} or {OWN} is needed")
        ours = {theirs: own for own, theirs in NAMES.items()}
        found = typed({ours[name]: value for name, value in said.items() if name in ours} | {"positions": 0}, TokenShape, where)
        for name, value in found.to_diffusers(0).items():
            if name in said and said[name] != value:
                raise UserError(f"{where}: {name} is {said[name]!r}; this network has {value!r}")
        return found


NAMES = {  # of a shape's fields in diffusers' config.json
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "res_blocks": "num_res_blocks",
    "size_channels": "micro_cond_encode_dim",
    "codes": "codebook_size",
    "vocabulary": "vocab_size",
    "context_width": "encoder_hidden_size",
    "pooled_width": "cond_embed_dim",
}


@dataclass(frozen=True)
class Told:
    """What the network is told besides codes; `remember` keeps what all steps share."""

    states: Tensor | None  # (B,S,W) text states as its layers see them
    cond: Tensor  # (B,W) after SiLU
    kept: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)  # by module: keys and values, scale and shift
    places: Tensor | None = None  # (B,h*w,W), what every place is told of a smaller picture


@dataclass
class Past:
    """Key-value cache of causal decoding: of every layer the keys and values (B,heads,L,D) of the places that were read."""

    keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    length: int = 0


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), its mean in float32 as in diffusers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(...,W) -> the same."""
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * self.weight


class AdaptiveNorm(nn.Module):
    """A norm whose scale and shift are told."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width, bias=False)
        self.norm = norm

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(B,L,W) -> the same."""
        scale, shift = told.kept.get(self) or self.keep(told)
        return self.norm(x) * (1 + scale)[:, None] + shift[:, None]

    def keep(self, told: Told) -> tuple[Tensor, ...]:
        """Scale and shift (B,W)."""
        return self.linear(told.cond).chunk(2, dim=1)


class Attention(nn.Module):
    """Multi-head attention without biases, to the tokens themselves or to the text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def split(self, x: Tensor) -> Tensor:
        """(B,L,W) -> (B,heads,L,D)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B,S,W) -> two of (B,heads,S,D)."""
        return self.split(self.to_k(source)), self.split(self.to_v(source))

    def forward(self, x: Tensor, keys_values: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
        """(B,L,W) -> the same."""
        out = attention(self.split(self.to_q(x)), keys_values[0], keys_values[1], mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class TextAttention(Attention):
    """Cross-attention to the text."""

    def keep(self, told: Told) -> tuple[Tensor, ...]:
        """Keys and values of the text."""
        assert told.states is not None, "there is no text to attend to"
        return self.keys_values(told.states)

    def look(self, x: Tensor, told: Told) -> Tensor:
        """(B,L,W) -> the same."""
        return self(x, told.kept.get(self) or self.keep(told))


class TokenLayer(nn.Module):
    """Self-attention, attention to the text where there is one, and a gated feed-forward layer."""

    def __init__(self, shape: TokenShape) -> None:
        super().__init__()
        w = shape.width
        self.norm1, self.attn1 = AdaptiveNorm(w, RMSNorm(w)), Attention(w, shape.heads)
        if shape.context_width:
            self.norm2, self.attn2 = AdaptiveNorm(w, RMSNorm(w)), TextAttention(w, shape.heads)
        self.norm3 = AdaptiveNorm(w, nn.LayerNorm(w, eps=EPS, bias=False))
        self.ff = FeedForward(w, 0.0, shape.inner, bias=False)
        self.reads = bool(shape.context_width)

    def forward(self, x: Tensor, told: Told, mask: Tensor | None = None, before: tuple[Tensor, Tensor] | None = None) -> Any:
        """(B,L,W) -> the same, and the keys and values of all places so far.

        Args:
            mask: (L,S) bool, True where a place may be looked at.
            before: keys and values of the places before these.
        """
        h = self.norm1(x, told)
        keys, values = self.attn1.keys_values(h)
        if before is not None:
            keys, values = torch.cat([before[0], keys], 2), torch.cat([before[1], values], 2)
        x = x + self.attn1(h, (keys, values), mask)
        if self.reads:
            x = x + self.attn2.look(self.norm2(x, told), told)
        return x + self.ff(self.norm3(x, told)), (keys, values)


class ResponseNorm(nn.Module):
    """Global response normalisation (arXiv 2301.00808, eq. 3) over a picture's places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B,h,w,W) -> the same."""
        wide = x if x.dtype == torch.float64 else x.float()
        # As torch.linalg.vector_norm, which takes thirty times as long over these dimensions on a CPU; 1e-30: the slope at zeros is none.
        norm = wide.square().sum((1, 2), keepdim=True).add(1e-30).sqrt().to(x.dtype)
        return self.gamma * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNext(nn.Module):
    """ConvNeXt block whose output is scaled and shifted as it is told."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = RMSNorm(width)
        self.channelwise_linear_1 = nn.Linear(width, 4 * width, bias=False)
        self.channelwise_norm = ResponseNorm(4 * width)
        self.channelwise_linear_2 = nn.Linear(4 * width, width, bias=False)
        self.cond_embeds_mapper = nn.Linear(width, 2 * width, bias=False)

    def keep(self, told: Told) -> tuple[Tensor, ...]:
        """Scale and shift (B,W)."""
        return self.cond_embeds_mapper(told.cond).chunk(2, dim=1)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(B,W,h,w) -> the same."""
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.channelwise_linear_2(self.channelwise_norm(F.gelu(self.channelwise_linear_1(h))))
        scale, shift = told.kept.get(self) or self.keep(told)
        return (x + h.permute(0, 3, 1, 2)) * (1 + scale)[:, :, None, None] + shift[:, :, None, None]


class TextBlock(nn.Module):
    """Two cross-attentions to the text, which diffusers has behind each ConvNeXt block."""

    def __init__(self, shape: TokenShape) -> None:
        super().__init__()
        self.norm1, self.attn1 = RMSNorm(shape.width), TextAttention(shape.width, shape.heads)
        self.norm2, self.attn2 = RMSNorm(shape.width), TextAttention(shape.width, shape.heads)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(B,W,h,w) -> the same."""
        h = x.flatten(2).transpose(1, 2)
        h = h + self.attn1.look(self.norm1(h), told)
        h = h + self.attn2.look(self.norm2(h), told)
        return h.transpose(1, 2).unflatten(2, x.shape[2:])


class ConvStack(nn.Module):
    """The convolutions on one side of the layers."""

    def __init__(self, shape: TokenShape) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(ConvNext(shape.width) for _ in range(shape.res_blocks))
        self.attention_blocks = nn.ModuleList(TextBlock(shape) for _ in range(shape.res_blocks))

    def forward(self, x: Tensor, told: Told, height: int) -> Tensor:
        """(B,h*w,W) -> the same."""
        if not len(self.res_blocks):
            return x
        x = x.transpose(1, 2).unflatten(2, (height, -1))
        for block, text in zip(self.res_blocks, self.attention_blocks, strict=True):
            x = text(block(x, told), told)
        return x.flatten(2).transpose(1, 2)


class Pointwise(nn.Conv2d):
    """1x1 convolution over tokens (B,L,C)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,C) -> (B,L,C')."""
        return F.linear(x, self.weight.flatten(1))


class Embed(nn.Module):
    """States of codes."""

    def __init__(self, shape: TokenShape) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(shape.vocabulary, shape.width)
        self.layer_norm = RMSNorm(shape.width)
        self.conv = Pointwise(shape.width, shape.width)

    def forward(self, ids: Tensor) -> Tensor:
        """(B,L) -> (B,L,W)."""
        return self.conv(self.layer_norm(self.embeddings(ids)))


class SmallCodes(nn.Module):
    """What places are told of a smaller picture's codes: each what it makes of the one below it, which differs by the place over that."""

    def __init__(self, shape: TokenShape) -> None:
        super().__init__()
        self.spread = shape.spread
        self.embeddings = nn.Embedding(shape.small_codes, shape.width)
        self.layer_norm = RMSNorm(shape.width)
        self.conv = Pointwise(shape.width, shape.spread**2 * shape.width)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B,h,w) to (B,h*s*w*s,W), row by row of the finer map."""
        height, width = codes.shape[1:]
        x = self.conv(self.layer_norm(self.embeddings(codes.flatten(1)))).view(len(codes), height, width, self.spread, self.spread, -1)
        return x.permute(0, 1, 3, 2, 4, 5).flatten(1, 4)


class Logits(nn.Module):
    """Logits over the codes."""

    def __init__(self, shape: TokenShape) -> None:
        super().__init__()
        self.conv1 = Pointwise(shape.width, shape.width)
        self.layer_norm = RMSNorm(shape.width)
        self.conv2 = Pointwise(shape.width, shape.codes)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,W) -> (B,L,K)."""
        return self.conv2(self.layer_norm(self.conv1(x)))


class Conditions(nn.Module):
    """The pooled text and the numbers of the size as one vector."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C) -> (B,W)."""
        return self.linear_2(F.silu(self.linear_1(x)))


class TokenTransformer(nn.Module):
    """Codes to logits over codes, told a text and a size.

    In masked order every place sees all (`forward`); places are told apart by the convolutions' zero padding. In causal order
    place i sees what stands before it (`sequence`); places are told apart by learned positions.
    """

    def __init__(self, shape: TokenShape) -> None:
        super().__init__()
        self.shape = shape
        w = shape.width
        if shape.context_width:
            self.encoder_proj = nn.Linear(shape.context_width, w, bias=False)
            self.encoder_proj_layer_norm = RMSNorm(w)
        self.embed = Embed(shape)
        self.cond_embed = Conditions(shape.pooled_width + NUMBERS * shape.size_channels, w)
        self.down_block, self.up_block = ConvStack(shape), ConvStack(shape)
        self.project_to_hidden_norm, self.project_from_hidden_norm = RMSNorm(w), RMSNorm(w)
        self.project_to_hidden, self.project_from_hidden = nn.Linear(w, w, bias=False), nn.Linear(w, w, bias=False)
        self.transformer_layers = nn.ModuleList(TokenLayer(shape) for _ in range(shape.layers))
        self.mlm_layer = Logits(shape)
        if shape.positions:
            self.positions = nn.Embedding(shape.positions, w)
        if shape.small_codes:
            self.small = SmallCodes(shape)

    def tables(self) -> frozenset[nn.Parameter]:
        """What has a row for each code or place: embeddings, and the layer of the logits."""
        layers: list[nn.Module] = [self.embed.embeddings, self.mlm_layer.conv2, *([self.positions] if self.shape.positions else [])]
        layers += [self.small.embeddings] if self.shape.small_codes else []
        return frozenset(parameter for layer in layers for parameter in layer.parameters())

    @torch.no_grad()
    def know(self, codebook: Tensor, small: Tensor | None = None) -> None:
        """Begin with codes that are alike where their vectors (K,c) are: the same features in the embedding and in the logits' layer.

        Random Fourier features (Rahimi and Recht 2007) of the vectors, whitened by channel, whose inner products are a Gaussian kernel:
        what is learned of a code then counts for those beside it, which a network that knows codes by their numbers cannot see.

        Args:
            small: the vectors of a smaller picture's codes, where it is told these.
        """
        features = self._features(codebook)
        self.embed.embeddings.weight[: len(features)] = features
        out = self.mlm_layer.conv2.weight
        out[: len(features)] = features[..., None, None] * out.std()
        if small is not None:
            self.small.embeddings.weight[: len(small)] = self._features(small)

    def _features(self, codebook: Tensor) -> Tensor:
        channels, width = codebook.shape[1], self.shape.width
        white = (codebook - codebook.mean(0)) / codebook.std(0, correction=0).clamp_min(1e-6)
        return torch.cos(white @ torch.randn(channels, width) * (2 / channels**0.5) + 2 * torch.pi * torch.rand(width)) * 2**0.5

    def told(self, states: Tensor | None, pooled: Tensor | None, size: Tensor, small: Tensor | None = None) -> Told:
        """What the layers are told.

        Args:
            states: (B,S,context_width) text states; None where it reads none.
            pooled: (B,pooled_width); None where it is told none.
            size: (B,5) as NUMBERS says.
            small: (B,h,w) codes of a smaller picture; None where it is told none.
        """
        weight = self.embed.conv.weight
        numbers = waves(size.flatten(), self.shape.size_channels).view(len(size), -1).to(weight.dtype)
        cond = self.cond_embed(numbers if pooled is None else torch.cat([pooled, numbers], 1))
        seen = None if states is None else self.encoder_proj_layer_norm(self.encoder_proj(states))
        return Told(seen, F.silu(cond), places=None if small is None else self.small(small))

    def remember(self, told: Told) -> Told:
        """The same, with what the layers make of it."""
        for module in self.modules():
            if isinstance(module, AdaptiveNorm | TextAttention | ConvNext):
                told.kept[module] = module.keep(told)
        return told

    def forward(self, codes: Tensor, told: Told) -> Tensor:
        """Masked order: logits (B,h*w,K) of every place of a map of codes (B,h,w)."""
        x = self.embed(codes.flatten(1))
        x = self.down_block(x if told.places is None else x + told.places, told, codes.shape[1])
        x = self.project_to_hidden(self.project_to_hidden_norm(x))
        for layer in self.transformer_layers:
            x = layer(x, told)[0]
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        return self.mlm_layer(self.up_block(x, told, codes.shape[1]))

    def sequence(self, ids: Tensor, told: Told, past: Past | None = None) -> Tensor:
        """Causal order: logits (B,L,K) of what follows each of `ids` (B,L); with `past` after those that it holds, and kept there."""
        start = 0 if past is None else past.length
        places, seen = torch.arange(start, start + ids.shape[1], device=ids.device), torch.arange(start + ids.shape[1], device=ids.device)
        x = self.project_to_hidden(self.project_to_hidden_norm(self.embed(ids))) + self.positions(places)
        mask = None if ids.shape[1] == 1 else places[:, None] >= seen  # (L,S)
        for i, layer in enumerate(self.transformer_layers):
            x, kept = layer(x, told, mask, None if past is None or not start else past.keys_values[i])
            if past is not None:
                past.keys_values[i : i + 1] = [kept]
        if past is not None:
            past.length += ids.shape[1]
        return self.mlm_layer(self.project_from_hidden(self.project_from_hidden_norm(x)))
