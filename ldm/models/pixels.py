"""Pixels as latents: the autoencoder that is none, with which diffusion in pixels (DDPM, ADM, Imagen) is latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from ldm.config.foreign import typed
from ldm.config.schema import PositiveFloat, config, plain
from ldm.models.diffusers_config import CONFIG
from ldm.models.stripes import Stripes

CLASS = "LDMPixels"


@config
class PixelsConfig:
    """Three channels in [-1,1], as they are."""

    scaling_factor: PositiveFloat = 1.0  # what diffusion sees of them is multiplied by it

    in_channels: ClassVar[int] = 3
    latent_channels: ClassVar[int] = 3
    latent_width: ClassVar[int] = 3
    factor: ClassVar[int] = 1
    checkpointing: ClassVar[bool] = False
    class_name: ClassVar[str] = CLASS

    def build(self) -> Pixels:
        """The network, which has no weights."""
        return Pixels(self)

    def to_diffusers(self) -> dict[str, object]:
        """The content of config.json."""
        return {"_class_name": self.class_name, **plain(self)}

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], where: str = CONFIG) -> Self:
        """The configuration behind such a config.json, the file `where`.

        Raises:
            UserError: naming a field that is not known, or makes no sense.
        """
        return typed({name: value for name, value in values.items() if not name.startswith("_")}, cls, where)


class Pixels(nn.Module):
    """Images to themselves and back."""

    factor = 1
    latent_channels = 3

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        self.config = config

    def encode(self, image: Tensor, way: Stripes | None = None) -> Tensor:
        """Images (B,3,H,W) in [-1,1]."""
        return image

    def decode(self, z: Tensor, way: Stripes | None = None) -> Tensor:
        """Images (B,3,H,W)."""
        return z
