"""A palette as an autoencoder: the code of a pixel is the number of its nearest colour (Image GPT)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ldm.config.schema import Codes, config
from ldm.models.autoencoder import Codebook
from ldm.models.pixels import Pixels, PixelsConfig
from ldm.models.stripes import Stripes

CLASS = "LDMPalette"


@config
class PaletteConfig(PixelsConfig):
    """Three channels in [-1,1], each pixel one of so many colours."""

    codes: Codes = 64  # colours

    class_name: ClassVar[str] = CLASS

    def build(self) -> Palette:
        """The network, whose weights are the colours."""
        return Palette(self)


class Palette(Pixels):
    """Images to maps of colours and back; `quantize` has the colours."""

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__(config)
        self.quantize = Codebook(config.codes, 3)

    @property
    def codebook(self) -> Tensor:
        """The colours, (codes,3) in [-1,1]."""
        return self.quantize.embedding.weight

    def decode(self, z: Tensor, way: Stripes | None = None, quantise: bool = True) -> Tensor:
        """Images (B,3,H,W), each pixel the nearest colour unless it is one already."""
        return self.quantize(z)[0].to(z.dtype) if quantise else z
