"""Autoencoders under diffusers' parameter names: KL (AutoencoderKL) and VQ (VQModel)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Codes, Count, Depth, Finite, Positive, PositiveFloat, Width, config, named
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import precise
from ldm.models.blocks import start_as_identity
from ldm.models.coder import CoderShape, Decoder, Encoder
from ldm.models.diffusers_config import (
    CONFIG,
    KL_PLAIN,
    LEVEL_NAMES,
    VQ_PLAIN,
    kl_from_diffusers,
    kl_to_diffusers,
    names_of,
    require_buildable,
    vq_from_diffusers,
    vq_to_diffusers,
)
from ldm.models.stripes import Stripes

DEAD = 0.01  # a code with less than this share of the mean use counts as unused
SEARCH_BYTES = 64 * 2**20  # of distances that the nearest-code search holds at a time


@named("kl")
@config
class KLConfig:
    """What an autoencoder with a Gaussian posterior is made of; the defaults are Stable Diffusion's (f8)."""

    in_channels: Width = 3  # channels of the image that is encoded
    out_channels: Width = 3  # channels of the image that comes back
    channels: tuple[Width, ...] = (128, 256, 512, 512)  # width of each level; all but the last halve the size
    layers: Depth = 2  # residual blocks per level on the way down (one more on the way up)
    attention: tuple[bool, ...] | None = None  # which levels attend to themselves; None: no level
    middle_attention: bool = True  # the lowest resolution attends to itself between its last two blocks
    latent_channels: Width = 4  # channels of the latents
    norm_groups: Width = 32  # groups of every GroupNorm
    quant_conv: bool = True  # a 1x1 convolution after the encoder
    post_quant_conv: bool = True  # a 1x1 convolution before the decoder
    scaling_factor: PositiveFloat = 1.0  # what diffusers' pipelines multiply latents by
    shift_factor: Finite | None = None  # what diffusers' pipelines subtract from latents before that
    latents_mean: tuple[Finite, ...] | None = None  # what they subtract instead, for each channel
    latents_std: tuple[PositiveFloat, ...] | None = None  # what they divide by then, for each channel, besides scaling_factor
    force_upcast: bool = False  # run it in float32 under float16, in which it overflows (XL's)
    sample_size: Positive = 32  # px, side of the images that diffusers' tiling assumes
    logvar_start: float = field(default=-6.0, compare=False)  # posterior log-variance of a fresh network
    zero_residuals: bool = field(default=False, compare=False)  # fresh residual blocks are the identity
    checkpointing: bool = field(default=False, compare=False)  # recompute each level in the backward pass

    def __post_init__(self) -> None:
        _check(self.channels, self.attention, self.norm_groups, self.layers)
        for name, other in (("latents_mean", "latents_std"), ("latents_std", "latents_mean")):
            value = getattr(self, name)
            if value is None:
                continue
            if len(value) != self.latent_channels:
                raise UserError(f"{name} has {len(value)} numbers; it needs {self.latent_channels}, one for each of latent_channels")
            if getattr(self, other) is None:
                raise UserError(f"{name} stands without {other}; give both, or neither")
            if self.shift_factor:
                raise UserError(f"{name} and shift_factor ({self.shift_factor:g}) are both subtracted from latents; leave one out")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return 1 << (len(self.channels) - 1)

    @property
    def latent_width(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    @property
    def stated(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation that the configuration states of each latent channel: (z - mean) / std is what a diffusion sees."""
        mean = self.latents_mean or (self.shift_factor or 0.0,) * self.latent_channels
        return mean, tuple(std / self.scaling_factor for std in self.latents_std or (1.0,) * self.latent_channels)

    @property
    def levels(self) -> tuple[bool, ...]:
        """Which levels attend to themselves."""
        return self.attention or (False,) * len(self.channels)

    def build(self) -> KLAutoencoder:
        """A freshly initialised network."""
        return KLAutoencoder(self)

    def to_diffusers(self) -> dict[str, object]:
        """The content of diffusers' config.json."""
        return kl_to_diffusers(self)

    @classmethod
    def from_diffusers(cls, values: Mapping[str, object], where: str = CONFIG) -> KLConfig:
        """The configuration behind an AutoencoderKL's config.json, the file `where`.

        Raises:
            UserError: for a field whose value this network does not have.
        """
        return typed(kl_from_diffusers(values, where), cls, where, names_of(KL_PLAIN) | LEVEL_NAMES)


@named("vq")
@config
class VQConfig:
    """What an autoencoder with a codebook is made of; the defaults are latent diffusion's f4 (arXiv 2112.10752), but for
    a smaller codebook, which short runs can fill."""

    in_channels: Width = 3  # channels of the image that is encoded
    out_channels: Width = 3  # channels of the image that comes back
    channels: tuple[Width, ...] = (128, 256, 512)  # width of each level; all but the last halve the size
    layers: Depth = 2  # residual blocks per level on the way down (one more on the way up)
    attention: tuple[bool, ...] | None = None  # which levels attend to themselves; None: no level
    middle_attention: bool = True  # the lowest resolution attends to itself between its last two blocks
    latent_channels: Width = 3  # channels between the encoder and the 1x1 convolution before the codebook
    code_channels: Count = 0  # width of a code, which is what diffusion sees; 0: as latent_channels
    codes: Codes = 1024  # entries of the codebook
    norm: Literal["group", "spatial"] = "group"  # the decoder's norms; spatial: told the codes (arXiv 2209.09002)
    norm_groups: Width = 32  # groups of every GroupNorm
    scaling_factor: PositiveFloat = 1.0  # what diffusers' pipelines multiply latents by
    sample_size: Positive = 32  # px, informs diffusers only
    zero_residuals: bool = field(default=False, compare=False)  # fresh residual blocks are the identity
    checkpointing: bool = field(default=False, compare=False)  # recompute each level in the backward pass

    def __post_init__(self) -> None:
        _check(self.channels, self.attention, self.norm_groups, self.layers)
        if self.norm == "spatial" and self.code_width != self.latent_channels:
            raise UserError(
                f"code_channels is {self.code_channels}, but norm=spatial reads codes of latent_channels "
                f"({self.latent_channels}); make them equal"
            )

    @property
    def levels(self) -> tuple[bool, ...]:
        """Which levels attend to themselves."""
        return self.attention or (False,) * len(self.channels)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return 1 << (len(self.channels) - 1)

    @property
    def latent_width(self) -> int:
        """Channels of the latents, that is of a code."""
        return self.code_width

    @property
    def code_width(self) -> int:
        """Channels of a code."""
        return self.code_channels or self.latent_channels

    def build(self) -> VQAutoencoder:
        """A freshly initialised network."""
        return VQAutoencoder(self)

    def to_diffusers(self) -> dict[str, object]:
        """The content of diffusers' config.json."""
        return vq_to_diffusers(self)

    @classmethod
    def from_diffusers(cls, values: Mapping[str, object], where: str = CONFIG) -> VQConfig:
        """The configuration behind a VQModel's config.json, the file `where`.

        Raises:
            UserError: for a field whose value this network does not have.
        """
        return typed(vq_from_diffusers(values, where), cls, where, names_of(VQ_PLAIN) | LEVEL_NAMES)


class KLAutoencoder(nn.Module):
    """Images to a Gaussian over latents, and latents to images (arXiv 1312.6114; arXiv 2112.10752)."""

    def __init__(self, config: KLConfig) -> None:
        super().__init__()
        self.config = config
        moments = 2 * config.latent_channels
        self.encoder, self.decoder = _coders(config, moments, False)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else None
        latent = config.latent_channels
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.post_quant_conv else None
        last = self.encoder.conv_out if self.quant_conv is None else self.quant_conv
        assert last.bias is not None
        with torch.no_grad():
            last.weight[latent:] = 0
            last.bias[latent:] = config.logvar_start

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return self.config.factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last convolution, where the adversarial loss is balanced."""
        return self.decoder.conv_out.weight

    def encode(self, image: Tensor, way: Stripes | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, each (B,c,h,w), of images (B,3,H,W) in [-1,1]; on `way` if large."""
        moments = self.encoder(image) if way is None else way.encode(self.encoder, image)  # (B,2c,h,w)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor, way: Stripes | None = None) -> Tensor:
        """Images (B,3,H,W), about [-1,1], of latents (B,c,h,w); on `way` if they are large."""
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z) if way is None else way.decode(self.decoder, z)


class VQAutoencoder(nn.Module):
    """Images to a map of codebook entries and back (van den Oord 2017, arXiv 1711.00937; Esser 2021, arXiv 2012.09841).

    `quantize(z)` is its codebook, see `Codebook.forward`.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _coders(config, config.latent_channels, config.norm == "spatial")
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.quantize = Codebook(config.codes, config.code_width)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return self.config.factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, that is of a code."""
        return self.config.code_width

    @property
    def last_layer(self) -> Tensor:
        """The weights of the decoder's last convolution, where the adversarial loss is balanced."""
        return self.decoder.conv_out.weight

    @property
    def codebook(self) -> Tensor:
        """The codes, (codes,c)."""
        return self.quantize.embedding.weight

    def encode(self, image: Tensor, way: Stripes | None = None) -> Tensor:
        """Latents (B,c,h,w), not quantised, of images (B,3,H,W) in [-1,1]; on `way` if they are large."""
        return self.quant_conv(self.encoder(image) if way is None else way.encode(self.encoder, image))

    def decode(self, z: Tensor, way: Stripes | None = None, quantise: bool = True) -> Tensor:
        """Images (B,3,H,W), about [-1,1], of latents (B,c,h,w), snapped to the codebook unless they are already."""
        if quantise:
            z = self.quantize(z)[0].to(z.dtype)
        told = z if self.config.norm == "spatial" else None
        z = self.post_quant_conv(z)
        return self.decoder(z, told) if way is None else way.decode(self.decoder, z, told)


class Codebook(nn.Module):
    """The entries that latents are snapped to."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Snap latents to their nearest codes.

        Args:
            z: (B,c,h,w).

        Returns:
            The codes' values (B,c,h,w), whose gradient goes straight to `z`; their numbers (B,h,w) int64; the two terms
            of arXiv 1711.00937, eq. 3, as means over all values: "codebook" pulls the codes, "commitment" the latents.
        """
        numbers = self.nearest(z)  # (B,h,w)
        chosen = F.embedding(numbers, self.embedding.weight).permute(0, 3, 1, 2)  # (B,c,h,w)
        terms = {"codebook": F.mse_loss(chosen, z.detach()), "commitment": F.mse_loss(z, chosen.detach())}
        return z + (chosen - z).detach(), numbers, terms

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Numbers (B,h,w) of the codes with the least Euclidean distance to latents (B,c,h,w), in float32 at least."""
        with torch.autocast(z.device.type, enabled=False):
            dtype = torch.promote_types(z.dtype, torch.float32)
            places = z.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)  # (N,c)
            codes = self.embedding.weight.to(dtype)  # (K,c)
            half = 0.5 * codes.square().sum(1)  # (K,)
            step = max(1, SEARCH_BYTES // (len(codes) * codes.element_size()))
            # |z - e|^2 / 2 without |z|^2, which does not depend on the code.
            found = [torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in places.split(step)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])


def code_use(usage: Tensor) -> tuple[Tensor, Tensor]:
    """Share of codes in use, and perplexity exp(entropy), of how often each code is used (codes,)."""
    share = (usage >= DEAD * usage.mean()).float().mean()
    chance = usage.to(precise(usage.device)) / usage.sum().clamp_min(1e-12)
    return share, torch.special.entr(chance).sum().exp().float()


@torch.no_grad()
def redraw_dead(codebook: Tensor, usage: Tensor, latest: Tensor, rng: Rng, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """New values for the codes that are hardly used.

    Args:
        codebook: (codes,c).
        usage: (codes,), how often each is used of late.
        latest: (N,c), encoder outputs, which the new values are drawn from: this process's of `world` equal shares, in their order.
        rng: the first position's stream is used.
        rank: which of the shares.

    Returns:
        A drawn value for every code (codes,c), 0 where it is of another process's share, and which codes should take it
        (codes,) bool.
    """
    stream = next(iter(rng.streams("redraw_codes")))
    codes, places = len(codebook), len(latest) * world
    chosen = torch.from_numpy(stream.choice(places, codes, replace=places < codes)).to(latest.device) - rank * len(latest)
    own = (chosen >= 0) & (chosen < len(latest))
    fresh = torch.where(own[:, None], latest[chosen.clamp(0, len(latest) - 1)].to(codebook.dtype), 0)
    return fresh, usage < DEAD * usage.mean()


def fold_latent_stats(
    config: KLConfig, state: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> tuple[KLConfig, dict[str, Tensor]]:
    """An autoencoder whose latents are (latents - mean) / std of another's: a scaling factor of 1 suits it.

    The statistics move into the 1x1 convolutions on both sides of the latents, which are made where there were
    none. The log-variance falls by 2 log std, so the posterior is the same Gaussian on the new scale.

    Args:
        config: of the other.
        state: its state dict.
        mean: per latent channel.
        std: per latent channel, positive.

    Returns:
        The configuration and the state dict.
    """
    channels = config.latent_channels
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f"latent statistics: {channels} means and positive deviations are needed, got {mean} and {std}")
    made = dict(state)
    shift, scale = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)

    weight, bias = _one_by_one(state, "quant_conv", 2 * channels)  # (2c,2c), (2c,)
    factor = torch.cat([1 / scale, torch.ones_like(scale)])
    offset = torch.cat([shift / scale, 2 * scale.log()])
    _put(made, "quant_conv", factor[:, None] * weight, factor * bias - offset, state)

    weight, bias = _one_by_one(state, "post_quant_conv", channels)  # (c,c), (c,)
    _put(made, "post_quant_conv", weight * scale, weight @ shift + bias, state)
    usual = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
    return replace(config, quant_conv=True, post_quant_conv=True, **usual), made  # type: ignore[arg-type]


def _one_by_one(state: Mapping[str, Tensor], name: str, channels: int) -> tuple[Tensor, Tensor]:
    """Weight matrix and bias of a 1x1 convolution in float64; the identity where there is none."""
    if f"{name}.weight" not in state:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    return state[f"{name}.weight"].cpu().double().flatten(1), state[f"{name}.bias"].cpu().double()


def _put(made: dict[str, Tensor], name: str, weight: Tensor, bias: Tensor, state: Mapping[str, Tensor]) -> None:
    like = state["decoder.conv_in.weight"]
    made[f"{name}.weight"] = weight[:, :, None, None].to(like)
    made[f"{name}.bias"] = bias.to(like)


def _coders(config: KLConfig | VQConfig, encoded: int, told: bool) -> tuple[Encoder, Decoder]:
    shape = CoderShape(
        channels=config.channels,
        layers=config.layers,
        attention=config.levels,
        middle_attention=config.middle_attention,
        groups=config.norm_groups,
        checkpointing=config.checkpointing,
    )
    latent = config.latent_channels
    encoder = Encoder(config.in_channels, encoded, shape)
    decoder = Decoder(latent, config.out_channels, shape, code_channels=latent if told else 0)
    if config.zero_residuals:
        start_as_identity(encoder)
        start_as_identity(decoder)
    return encoder, decoder


def _check(channels: Sequence[int], attention: Sequence[bool] | None, groups: int, layers: int) -> None:
    require_buildable(channels, layers)
    if attention is not None and len(attention) != len(channels):
        raise UserError(f"attention has {len(attention)} entries for the {len(channels)} levels of channels {channels}")
    for width in channels:
        if width % groups:
            raise UserError(f"norm_groups {groups} does not divide {width} of channels {channels}")
