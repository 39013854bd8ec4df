"""Pixels in the place of an autoencoder: diffusion in them is the same family, without an encoder to train or to load."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch

from ldm.config.schema import PositiveFloat, config
from ldm.families.family import Found, ModelConfig, Product
from ldm.families.pretrained import encoding_of
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder, load_codec
from ldm.formats.part import save_part
from ldm.models.cost import Cost
from ldm.models.pixels import PixelsConfig


@config
class PixelAutoencoder(ModelConfig):
    """Pixels, as DDPM, ADM and Imagen diffuse them (Ho 2020, arXiv 2006.11239): nothing is trained and nothing is lost."""

    kind: Literal["pixels"] = "pixels"
    scaling_factor: PositiveFloat = 1.0  # what [-1,1] is multiplied by; 1 as everyone has it, 2 for about unit variance

    adopts = True
    answers = frozenset({"reconstruct"})
    encodes = True

    def elsewhere(self) -> str:
        """They are there already."""
        return "pixels"

    def find(self, path: str, note: Callable[[str], None]) -> Found:
        """Nothing to look for."""
        return Found(path, Path(), hashlib.sha256(f"pixels {self.scaling_factor}".encode()).hexdigest())

    def adopt(self, found: Found, target: Path) -> None:
        """vae/, whose config.json says what it is."""
        save_part(self.latent_network(print).to_diffusers(), {}, target / "vae")

    def latent_network(self, note: Callable[[str], None]) -> PixelsConfig:
        """The network that makes latents."""
        return PixelsConfig(scaling_factor=self.scaling_factor)

    def encoding(self, side: int, note: Callable[[str], None]) -> tuple[Cost, int]:
        """Nothing, and the bytes of a cached image."""
        return encoding_of(self.latent_network(note), side)

    def encoder(self, product: Path, device: torch.device) -> LatentCodec:
        """The codec that changes nothing but the scale."""
        return load_codec(autoencoder_folder(product)).to(device)

    def measured(self, products: Mapping[str, Product], scratch: Path, story: Mapping[str, object], device: torch.device) -> LatentCodec:
        """The same, which reconstructs."""
        return self.encoder(products["model"].folder, device)
