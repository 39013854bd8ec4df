"""A palette in the place of an autoencoder: the colours that k-means finds in the training pictures, for transformers over pixels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ldm.config.schema import Codes, config
from ldm.data.dataset import DataSet
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng, mix
from ldm.families.family import Context, Family, Footprint, ModelConfig, Product, Terms, TrainingStage
from ldm.families.pretrained import encoding_of
from ldm.formats.latent_codec import LatentCodec, Statistics, autoencoder_folder, load_codec, save_codec
from ldm.models import cost
from ldm.models.cost import Cost
from ldm.models.palette import Palette, PaletteConfig

PIXELS = 2**18  # that colours are looked for among, at most
ROUNDS = 30  # of k-means


@config
class PaletteAutoencoder(ModelConfig):
    """A palette, as Image GPT reads pictures by (Chen 2020): a pixel's code is the number of its nearest colour.

    The colours are those of k-means over the pictures that its stage sees.
    """

    kind: Literal["palette"] = "palette"
    codes: Codes = 64  # colours

    answers = frozenset({"reconstruct"})
    encodes = True
    has_codes = True

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """The colours, and the search for the nearest of each pixel."""
        learned, encode, decode = cost.autoencoder(self.latent_network(note), side, side)
        return Footprint(learned={"palette": learned}, frozen={}, cost=encode + decode)

    def latent_network(self, note: Callable[[str], None]) -> PaletteConfig:
        """The network that makes latents."""
        return PaletteConfig(codes=self.codes)

    def encoding(self, side: int, note: Callable[[str], None]) -> tuple[Cost, int]:
        """Next to nothing, and the values of a cached image."""
        return encoding_of(self.latent_network(note), side)

    def encoder(self, product: Path, device: torch.device) -> LatentCodec:
        """The codec of a finished stage's product."""
        return load_codec(autoencoder_folder(product)).to(device)

    def measured(self, products: Mapping[str, Product], scratch: Path, story: Mapping[str, object], device: torch.device) -> LatentCodec:
        """The same, which reconstructs."""
        return self.encoder(products["model"].folder, device)

    def build(self, context: Context) -> PaletteFamily:
        """The family, with the colours of the first training pictures, as many as the stage sees."""
        network = PaletteConfig(codes=self.codes).build()
        with torch.no_grad():
            network.codebook.copy_(
                found(pixels(context.data, context.total_images, context.resolution, context.seed), self.codes, context.seed)
            )
        return PaletteFamily(network)


class PaletteFamily(Family):
    """A palette; its stage tells how far pixels lie from their colours, and changes nothing more."""

    def __init__(self, network: Palette) -> None:
        super().__init__()
        self.network = network

    def loss(self, batch: ImageBatch, rng: Rng) -> tuple[Terms, Terms]:
        """The error that k-means has made small: the mean squared distance of values in [-1,1] and their colours'."""
        return {"palette": self.network.quantize(batch.image)[2]["codebook"]}, {}

    def idle(self) -> list[nn.Parameter]:
        """All: k-means has found the colours."""
        return list(self.network.parameters())

    def preview(self, batch: ImageBatch, seed: int) -> Tensor:
        """Pictures and what their colours make of them, in turn (N,3,H,W)."""
        return torch.stack([batch.image, self.network.decode(batch.image)], 1).flatten(0, 1)

    def save(self, folder: Path) -> None:
        """vqvae/, whose weights are the colours."""
        save_codec(folder / "vqvae", self.network, Statistics((0.0,) * 3, (1.0,) * 3, 0, 0))


def pixels(data: DataSet, images: int, resolution: int, seed: int) -> np.ndarray:
    """Values (N,3) in [-1,1] of pixels of the first `images` pictures, float64, at most PIXELS of them, the same number of each."""
    count = min(images, len(data))
    each, side = max(1, PIXELS // count), resolution**2
    places = np.random.default_rng(mix(seed, "palette"))
    parts = []
    for start in range(0, count, 64):
        index = list(range(start, min(start + 64, count)))
        values = data.load(index, index, resolution, seed, False).image.flatten(2).transpose(1, 2).double().numpy()  # (B,H*W,3)
        chosen = [one if side <= each else one[places.choice(side, each, replace=False)] for one in values]
        parts.append(np.concatenate(chosen))
    return np.concatenate(parts)[:PIXELS]


def found(values: np.ndarray, codes: int, seed: int) -> Tensor:
    """Colours (codes,3) of values (N,3) by k-means, begun with k-means++ (Arthur 2007); where there are no more colours than codes, these.

    Colours that are too many repeat the first one, whose number is taken.
    """
    from scipy.cluster.vq import kmeans2

    colours = np.unique(values, axis=0)
    if len(colours) > codes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of clusters that stay empty
            colours = kmeans2(values, codes, iter=ROUNDS, minit="++", seed=mix(seed, "k-means") % 2**32)[0]
        colours = colours[np.lexsort(colours.T)]
    rows = np.concatenate([colours, np.repeat(colours[:1], codes - len(colours), 0)])
    return torch.from_numpy(rows).float()
