"""A run's own CLIP, both towers frozen: similarity and CLIP score of pictures and captions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.diffusion.batch import Text
from ldm.formats.clip_folder import load_tower, save_clip, tower_shape
from ldm.formats.model_folder import whole_clip
from ldm.formats.part import load_weights
from ldm.formats.text_folder import load_text_model, text_builder, text_projection
from ldm.formats.tokenizer_files import load_tokenizer, save_tokenizer
from ldm.models.vision_tower import TowerNetwork
from ldm.text.encoder import TextEncoder


class OwnClip:
    """The CLIP that a run has trained, both towers, frozen: how well pictures show captions.

    With a vision transformer it is stored as transformers' CLIPModel. CLIPModel cannot express a convolutional tower: with one the
    text side is stored as CLIPTextModelWithProjection, and the tower beside it under image_tower/, with logit_scale.

    Args:
        text: the text tower, pooled states (B,D).
        projection: D to E, without bias.
        tower: images to (B,E).
        logit_scale: log of the inverse temperature, a scalar.
        resolution: px, of the squares that the tower has learned from.
    """

    def __init__(self, text: TextEncoder, projection: nn.Linear, tower: TowerNetwork, logit_scale: Tensor, resolution: int) -> None:
        self.text, self.projection, self.tower, self.logit_scale, self.resolution = text, projection, tower, logit_scale, resolution

    @property
    def embedding(self) -> int:
        """Width E of the space that pictures and texts share."""
        return self.projection.out_features

    def networks(self) -> list[nn.Module]:
        """Both towers and the projection."""
        return [self.text.model, self.projection, self.tower]

    def save(self, folder: Path) -> None:
        """config.json, weights and the tokenizer's files in `folder`; of a convolutional tower image_tower/ below it."""
        save_clip(self.text.model, self.projection, self.tower, self.logit_scale, self.resolution, folder)
        save_tokenizer(self.text.tokenizer, folder)

    @staticmethod
    def load(folder: Path, device: str | torch.device = "cpu") -> OwnClip:
        """What `save` has written, the folder clip/ of a model, or another that transformers' CLIPModel opens.

        Raises:
            UserError: naming what is missing or damaged.
        """
        text_builder(folder), tower_shape(folder)  # what is said must make sense before weights are read
        state = load_weights(folder)
        text = TextEncoder.of(load_text_model(folder, state).to(device), load_tokenizer(folder), folder)
        tower, scale, resolution = load_tower(folder, state if whole_clip(folder) else None)
        return OwnClip(text, text_projection(folder, state).to(device), tower.to(device), scale.to(device), resolution)

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
