"""A run's own CLIP, both towers frozen: similarity and CLIP score of pictures and captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import short
from ldm.diffusion.batch import Text
from ldm.formats.model_folder import IMAGE_TOWER
from ldm.formats.part import AGAIN, CONFIG, load_module, load_weights, read_config, save_part
from ldm.formats.text_folder import load_text_model, load_text_projection, save_text_model
from ldm.formats.tokenizer_files import load_tokenizer, save_tokenizer
from ldm.models.image_tower import ImageTower, ImageTowerConfig
from ldm.text.encoder import TextEncoder


def load_image_tower(folder: Path) -> tuple[ImageTower, Tensor, int]:
    """The image side of a run's own CLIP: the tower, logit_scale (log of the inverse temperature) and the resolution in px it learned at.

    Raises:
        UserError: naming what is missing or damaged.
    """
    config = read_config(folder)
    network, resolution = ImageTowerConfig.from_dict(config, str(folder / CONFIG)), config.get("resolution")
    if type(resolution) is not int or not 0 < resolution < 2**16:
        raise UserError(f"{folder / CONFIG}: resolution is {short(resolution)}; a whole number of px from 1 on is needed; {AGAIN}")
    state = load_weights(folder)
    scale = state.pop("logit_scale", None)
    if scale is None or scale.numel() != 1 or not scale.is_floating_point():
        raise UserError(f"{folder}: logit_scale, one number, is missing; {AGAIN}")
    return load_module(network.build, state, folder).eval().requires_grad_(False), scale, resolution


class OwnClip:
    """The CLIP that a run has trained, both towers, frozen: how well pictures show captions.

    The text side is stored as transformers' CLIPTextModelWithProjection. The image side is a small convolutional tower, which
    CLIPModel's vision transformer cannot express, so it is stored beside it under image_tower/, with logit_scale.

    Args:
        text: the text tower, pooled states (B,D).
        projection: D to E, without bias.
        tower: images to (B,E).
        logit_scale: log of the inverse temperature, a scalar.
        resolution: px, of the squares that the tower has learned from.
    """

    def __init__(self, text: TextEncoder, projection: nn.Linear, tower: ImageTower, logit_scale: Tensor, resolution: int) -> None:
        self.text, self.projection, self.tower, self.logit_scale, self.resolution = text, projection, tower, logit_scale, resolution

    @property
    def embedding(self) -> int:
        """Width E of the space that pictures and texts share."""
        return self.projection.out_features

    def networks(self) -> list[nn.Module]:
        """Both towers and the projection."""
        return [self.text.model, self.projection, self.tower]

    def save(self, folder: Path) -> None:
        """config.json, weights and tokenizer of the text side in `folder`, image_tower/ below it."""
        save_text_model(self.text.model, folder, self.projection)
        save_tokenizer(self.text.tokenizer, folder)
        config = {**self.tower.config.to_dict(), "resolution": self.resolution}
        save_part(config, {**self.tower.state_dict(), "logit_scale": self.logit_scale}, folder / IMAGE_TOWER)

    @staticmethod
    def load(folder: Path, device: str | torch.device = "cpu") -> OwnClip:
        """What `save` has written, the folder clip/ of a model.

        Raises:
            UserError: naming what is missing or damaged.
        """
        text = TextEncoder.of(load_text_model(folder).to(device), load_tokenizer(folder), folder)
        tower, scale, resolution = load_image_tower(folder / IMAGE_TOWER)
        return OwnClip(text, load_text_projection(folder).to(device), tower.to(device), scale.to(device), resolution)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit-length embeddings of captions (B,E)."""
        pooled = self.text.encode(captions).pooled
        assert pooled is not None  # a CLIP has one
        return nn.functional.normalize(self.projection(pooled), dim=-1)

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> Text:
        """States (B,L,D) of captions, with their embeddings (B,E) of any length as the pooled text."""
        text = self.text.encode(captions)
        assert text.pooled is not None
        return replace(text, pooled=self.projection(text.pooled))

    def embedded(self, image: Tensor) -> Tensor:
        """Embeddings (B,E) of images, whose values have unit variance: their length is sqrt(E)."""
        return math.sqrt(self.embedding) * self.embed_images(image)

    @torch.no_grad()
    def embed_images(self, image: Tensor) -> Tensor:
        """Unit-length embeddings (B,E) of images (B,3,H,W) in [-1,1], seen as in training: resized to cover a square and cropped."""
        side, shape = self.resolution, image.shape[-2:]
        if min(shape) != side:
            covering = [round(length * side / min(shape)) for length in shape]
            image = nn.functional.interpolate(image, covering, mode="bicubic", antialias=True).clamp(-1, 1)
        top, left = ((length - side) // 2 for length in image.shape[-2:])
        return self.tower(image[..., top : top + side, left : left + side])

    def logits(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        """Scaled similarities (N,M) of N images with M captions; their softmax over captions says which one an image shows."""
        return self.logit_scale.exp() * self.embed_images(image) @ self.embed_captions(captions).T

    def similarity(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine similarities (B,) in [-1,1] of images (B,3,H,W) in [-1,1] with a caption each."""
        return (self.embed_images(image) * self.embed_captions(captions)).sum(1)

    def score(self, image: Tensor, captions: Sequence[str]) -> Tensor:
        """CLIP scores (B,) from 0 to 100: max(100 cos, 0) (Hessel 2021, arXiv 2104.08718); comparable for one CLIP alone."""
        return (100 * self.similarity(image, captions)).clamp(min=0)
