"""Latent codec: a frozen autoencoder with its latent statistics; pixels to latents of unit variance, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import short
from ldm.formats.atomic import write_json
from ldm.formats.part import AGAIN, CONFIG, content_hash, load_module, load_weights, read_config, read_json, save_part
from ldm.models.autoencoder import KLAutoencoder, KLConfig, VQAutoencoder, VQConfig
from ldm.models.dc_autoencoder import CLASS as DC
from ldm.models.dc_autoencoder import DCAutoencoder, DCConfig
from ldm.models.palette import CLASS as PALETTE
from ldm.models.palette import Palette, PaletteConfig
from ldm.models.pixels import CLASS as PIXELS
from ldm.models.pixels import Pixels, PixelsConfig
from ldm.models.stripes import Stripes

STATISTICS = "latents.json"
AUTOENCODERS = ("vae", "vqvae")  # folders of a model that hold one
Codec = KLConfig | VQConfig | DCConfig | PixelsConfig
Network = KLAutoencoder | VQAutoencoder | DCAutoencoder | Pixels
# By diffusers' names, which has none for pixels and palettes.
KINDS: dict[str, type[Codec]] = {"AutoencoderKL": KLConfig, "VQModel": VQConfig, DC: DCConfig, PIXELS: PixelsConfig, PALETTE: PaletteConfig}
TILE = 512  # px
AGREE = 0.8  # latents that agree less are another model's


@dataclass(frozen=True)
class Statistics:
    """Latent statistics: mean and standard deviation of each latent channel, measured over images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int  # how many they were measured on; 0: taken from the file, not measured
    resolution: int  # px

    def to_dict(self) -> dict[str, object]:
        """As it stands in latents.json and in the log."""
        return {"mean": list(self.mean), "std": list(self.std), "images": self.images, "resolution": self.resolution}

    @staticmethod
    def read(file: Path, channels: int) -> Statistics:
        """The statistics in a latents.json.

        Raises:
            UserError: if it does not tell a mean and a positive deviation for each of `channels`.
        """
        values = read_json(file)
        try:
            mean, std = (tuple(float(value) for value in values[name]) for name in ("mean", "std"))
            found = Statistics(mean, std, int(values["images"]), int(values["resolution"]))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{file}: tells no latent statistics ({type(error).__name__}: {error}); {AGAIN}") from None
        if not len(mean) == len(std) == channels or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise UserError(f"{file}: {channels} means and positive deviations are needed, got {mean} and {std}; {AGAIN}")
        return found


class LatentCodec(nn.Module):
    """Latent codec: encodes images to normalised latents and decodes them.

    Args:
        network: KL, VQ, DC, or pixels as they are.
        statistics: of the raw latents.
        hash: of the autoencoder's folder; latents and diffusion models remember it and refuse any other.

    Larger pictures than `tile` x `tile` go through the network one at a time and in stripes, which gives the same numbers;
    smaller ones are decoded as many at a time as have so many pixels together. A tile of 0: everything at once.
    """

    tile = TILE
    turn: Callable[[], None] = staticmethod(lambda: None)  # told before the network is used
    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, statistics: Statistics, hash: str = "") -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.statistics = statistics
        self.hash = hash
        self.register_buffer("mean", torch.tensor(statistics.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std).view(1, -1, 1, 1), persistent=False)

    @property
    def factor(self) -> int:
        """Downsampling factor: image pixels per latent pixel."""
        return self.network.factor

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.network.latent_channels

    @property
    def bound(self) -> float | None:
        """No value of a picture's latents lies further from 0; None: there is no such number."""
        return self.network.config.scaling_factor if isinstance(self.network, Pixels) else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        return next(self.network.parameters(), self.mean).dtype

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised posterior mean and deviation (B,c,h,w) of images (B,3,H,W) in [-1,1]; no deviation for VQ."""
        self.turn()
        way = self._way(image, image.shape[2] * image.shape[3])
        with self._upcast():
            parts = [self._moments(part, way) for part in (image.split(1) if way else (image,))]
        std = [part for _, part in parts if part is not None]
        return torch.cat([mean for mean, _ in parts]), torch.cat(std) if std else None

    def _moments(self, image: Tensor, way: Stripes | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(self.network, KLAutoencoder):  # no posterior
            return (full(self.network.encode(image, way)) - self.mean) / self.std, None
        mean, logvar = self.network.encode(image, way)
        return (full(mean) - self.mean) / self.std, (0.5 * full(logvar)).exp() / self.std

    @property
    def codes(self) -> int:
        """Entries of its codebook; 0: it has none."""
        return len(self.network.codebook) if isinstance(self.network, VQAutoencoder | Palette) else 0

    @property
    def vectors(self) -> Tensor:
        """Its codebook (codes,c); of an autoencoder without one (0,0)."""
        return self.network.codebook.detach() if isinstance(self.network, VQAutoencoder | Palette) else torch.empty(0, 0)

    @torch.no_grad()
    def encode_codes(self, image: Tensor) -> Tensor:
        """Numbers (B,h,w) int64 of the codes of images (B,3,H,W) in [-1,1]."""
        assert isinstance(self.network, VQAutoencoder | Palette), "only a VQ autoencoder or a palette has codes"
        return self.network.quantize.nearest(self.moments(image)[0] * self.std + self.mean)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images (B,3,H,W), about [-1,1], of codes' numbers (B,h,w)."""
        assert isinstance(self.network, VQAutoencoder | Palette), "only a VQ autoencoder or a palette has codes"
        z = nn.functional.embedding(codes, self.network.codebook).permute(0, 3, 1, 2)
        self.turn()
        return self.network.decode(z, self._way(z, codes[0].numel() * self.factor**2), quantise=False)

    @torch.no_grad()
    def reconstruct(self, image: Tensor) -> Tensor:
        """Reconstruction, in [-1,1], of images (B,3,H,W) in [-1,1]."""
        return self.decode(self.moments(image)[0]).float().clamp(-1, 1)

    def decode(self, latent: Tensor) -> Tensor:
        """Images (B,3,H,W), about [-1,1], of normalised latents (B,c,h,w)."""
        self.turn()
        pixels = latent.shape[2] * latent.shape[3] * self.factor**2
        way, together = self._way(latent, pixels), max(1, self.tile**2 // pixels) if self.tile else len(latent)
        z = (latent * self.std + self.mean).to(self.dtype)
        with self._upcast():
            return torch.cat([self.network.decode(part, way) for part in z.split(together)])

    def _upcast(self) -> AbstractContextManager[Any]:
        """No autocast to float16 around a network that is said to overflow in it (`force_upcast`, as of Stable Diffusion XL's)."""
        config, kind = self.network.config, self.mean.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return torch.autocast(kind, enabled=False) if half and isinstance(config, KLConfig) and config.force_upcast else nullcontext()

    def _way(self, x: Tensor, pixels: int) -> Stripes | None:
        """How pictures of so many pixels go through the network; None: at once."""
        learning = torch.is_grad_enabled() and x.requires_grad
        return Stripes(self.tile**2) if self.tile and pixels > self.tile**2 and not learning else None


def full(x: Tensor) -> Tensor:
    """x as float32 where it is of a half type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def alike(model: LatentCodec, *others: LatentCodec) -> tuple[LatentCodec, float]:
    """Of autoencoders of one shape that whose latents of a picture are most like the model's, and how alike these are.

    Of equals it is the first, and so it is where none agrees to `AGREE`.

    A finetuned autoencoder has the latents of the one that it was made of. The weights of a model's own may hold its
    statistics, so that what a file states is no guide.

    Returns:
        The autoencoder and its agreement: 1 less the mean square of the difference over that of the model's latents; 1: equal.
    """
    side = max(64, 8 * model.factor)
    picture = torch.rand(1, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    picture = nn.functional.interpolate(2 * picture - 1, (side, side), mode="bicubic", align_corners=False).clamp(-1, 1)

    def latents(one: LatentCodec) -> Tensor:
        return one.moments(picture.to(one.mean.device, one.dtype))[0].double()

    own = latents(model)
    found = [1 - float((latents(one) - own).square().mean() / own.square().mean().clamp_min(1e-12)) for one in others]
    found = [value if math.isfinite(value) else -math.inf for value in found]
    best = max(found)
    return others[found.index(best) if best >= AGREE else 0], best


def save_codec(folder: Path, network: Network, statistics: Statistics) -> None:
    """Save the autoencoder in diffusers' layout, with latents.json beside it."""
    config = network.config.to_diffusers()
    save_part(config, dict(network.state_dict()), folder)
    write_json(folder / STATISTICS, statistics.to_dict())


def pixels() -> LatentCodec:
    """Pixels as they are, of a model that has no autoencoder."""
    return LatentCodec(Pixels(PixelsConfig()), Statistics((0.0,) * 3, (1.0,) * 3, 0, 0))


def autoencoder_folder(folder: Path) -> Path:
    """vae/ or vqvae/ below a product or model folder; the folder itself where it is one of these.

    Raises:
        UserError: if there is none.
    """
    for name in AUTOENCODERS:
        if (folder / name).is_dir():
            return folder / name
    if (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("_class_name") in KINDS:
        return folder
    raise UserError(f"{folder}: no autoencoder here; a folder named vae or vqvae was expected")


def load_codec(folder: Path) -> LatentCodec:
    """Load the autoencoder of a folder (AutoencoderKL, VQModel or AutoencoderDC) with its latent statistics.

    Without latents.json the folder's scaling_factor, shift_factor, latents_mean and latents_std stand for them.

    Raises:
        UserError: if the folder holds something else, or its weights do not fit its configuration.
    """
    config, statistics = read_codec(folder)
    build: Callable[[], Network] = config.build
    return LatentCodec(load_module(build, load_weights(folder), folder), statistics, content_hash(folder))


def read_codec(folder: Path) -> tuple[Codec, Statistics]:
    """What an autoencoder's folder says of it, weights aside.

    Raises:
        UserError: naming the field that has no value of a kind that is known here.
    """
    values = read_config(folder)
    config = codec_config(values, folder)
    channels = config.latent_width
    if (folder / STATISTICS).exists():
        return config, Statistics.read(folder / STATISTICS, channels)
    if isinstance(config, KLConfig):
        return config, Statistics(*config.stated, 0, 0)
    return config, Statistics((0.0,) * channels, (1 / config.scaling_factor,) * channels, 0, 0)


def codec_config(values: dict[str, Any], folder: Path) -> Codec:
    """The configuration behind an autoencoder's config.json in a folder, by its `_class_name`.

    Raises:
        UserError: for another class, or naming the field that makes no sense.
    """
    kind = values.get("_class_name")
    if not isinstance(kind, str) or kind not in KINDS:
        *most, last = KINDS
        raise UserError(f"{folder}: an {', '.join(most)} or {last} was expected, but its config.json says {short(kind)}")
    return KINDS[kind].from_diffusers(values, str(folder / CONFIG))
