"""A small CLIP learned from the run's own captions: its text tower tells the UNet what to draw, and both towers score pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, Positive, config
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.families.family import Context, Family, Footprint, ModelConfig, Terms, TrainingStage
from ldm.formats.model_folder import IMAGE_TOWER, OWN_CLIP
from ldm.formats.part import AGAIN, load_module, load_part, save_part
from ldm.formats.text_folder import load_text_model, load_text_projection, load_tokenizer, save_text_model, save_tokenizer
from ldm.models import cost
from ldm.models.cost import TextShape
from ldm.models.image_tower import ImageTower, ImageTowerConfig
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer

MAX_SCALE = math.log(100)  # of logit_scale, as CLIP bounds it


@config
class Clip(ModelConfig):
    """Text and image towers trained with the contrastive loss of CLIP (Radford 2021, arXiv 2103.00020), from nothing."""

    kind: Literal["clip"] = "clip"
    text: SmallText = SmallText()  # the text tower
    tower: ImageTowerConfig = ImageTowerConfig()  # the image tower
    vocabulary: Positive = 4096  # size of the byte-pair vocabulary, 512 of it single bytes, learned from the captions
    tokenizer_captions: Positive = 4000  # how many captions the vocabulary is learned from
    temperature: Fraction = 0.07  # at the start; it is learned
    tokenizer_seed: Count = 0  # which captions

    refuses = ModelConfig.refuses | {"exact": "learns from pairs of the whole batch, which depend on how many processes there are"}

    def text_shape(self, note: Callable[[str], None], width: int = 768) -> TextShape:
        """Its text tower."""
        small = self.text
        return TextShape("own", small.width, small.layers, small.max_tokens, self.vocabulary, small.max_tokens)

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> int:
        """Of the text tower, which is what other models read."""
        return self.text_shape(note).parameters

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """Both towers, the projection and the temperature."""
        with torch.device("meta"):
            tower = self.tower.build()
        text = self.text_shape(note)
        shared = text.width * self.tower.embedding + 1
        learned = {"text encoder": text.parameters, "image tower": cost.count(tower) + shared}
        return Footprint(learned=learned, frozen={}, cost=text.cost + cost.tower(tower, side))

    def build(self, context: Context) -> ClipFamily:
        """The family, ready to train."""
        count = min(self.tokenizer_captions, len(context.data))
        index = list(range(count))
        captions = context.data.captions(index, index, self.tokenizer_seed)
        tokenizer = train_tokenizer(captions, self.vocabulary, self.text.max_tokens)
        return ClipFamily(self, TextEncoder(small_clip_text(self.text, tokenizer), tokenizer), context.resolution)


class ClipFamily(Family):
    """Both towers with open_clip's contrastive loss."""

    def __init__(self, config: Clip, text: TextEncoder, resolution: int) -> None:
        super().__init__()
        from open_clip.loss import ClipLoss

        self.config, self.resolution = config, resolution
        self.tokenizer = text.tokenizer
        self.text_model = text.model.train().requires_grad_(True)
        self.tower = config.tower.build()
        self.projection = nn.Linear(config.text.width, config.tower.embedding, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self._clip_loss = ClipLoss

    def loss(self, batch: ImageBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Symmetric cross-entropy of image-to-text and text-to-image matching over all ranks' pairs."""
        text = TextEncoder(self.text_model, self.tokenizer)
        pooled = text.forward_train(list(batch.caption), batch.image.device)  # (B,D)
        words = nn.functional.normalize(self.projection(pooled).float(), dim=-1)  # (B,E)
        pictures = self.tower(batch.image)  # (B,E)
        scale = self.logit_scale.clamp(max=MAX_SCALE).exp()
        contrast = self._clip_loss(local_loss=True, gather_with_grad=True, rank=self.ranks.rank, world_size=self.ranks.world)
        loss = contrast(pictures, words, scale)
        with torch.no_grad():
            best = (pictures @ words.T).argmax(1)
            right = (best == torch.arange(len(best), device=best.device)).float().mean()
        return {"contrastive": loss}, {"match_in_batch": right, "logit_scale": scale.detach()}

    def finish(self, context: Context) -> dict[str, Any]:
        """Image-to-caption retrieval among 100 held-out pairs (chance 0.01)."""
        count = min(100, len(context.val))
        index = list(range(count))
        batch = context.val.load(index, index, context.resolution, context.seed, False).to(context.device)
        with torch.no_grad():
            text = TextEncoder(self.text_model, self.tokenizer)
            words = nn.functional.normalize(self.projection(text.forward_train(list(batch.caption), context.device)), dim=-1)
            found = (self.tower(batch.image) @ words.T).argmax(1).cpu()
        # Equal captions are equally right.
        right = [batch.caption[int(f)] == batch.caption[i] for i, f in enumerate(found)]
        return {"retrieval_at_1": sum(right) / count, "retrieval_of": count}

    def save(self, folder: Path) -> None:
        """text_encoder/ and tokenizer/ as a pipeline reads them; clip/ with both towers for scores and the perceptual loss."""
        text = TextEncoder(self.text_model, self.tokenizer)
        text.save(folder)
        scale = self.logit_scale.detach().clamp(max=MAX_SCALE)
        OwnClip(text, self.projection, self.tower, scale, self.resolution).save(folder / OWN_CLIP)


def load_image_tower(folder: Path) -> tuple[ImageTower, Tensor, int]:
    """The image side of a run's own CLIP: the tower, logit_scale (log of the inverse temperature) and the resolution in px it learned at.

    Raises:
        UserError: naming what is missing or damaged.
    """
    config, state = load_part(folder)
    try:
        network, resolution, scale = ImageTowerConfig.from_dict(config), int(config["resolution"]), state.pop("logit_scale")
    except KeyError as error:
        raise UserError(f"{folder}: {error.args[0]} is missing; {AGAIN}") from None
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
        text = TextEncoder(load_text_model(folder).to(device), load_tokenizer(folder))
        tower, scale, resolution = load_image_tower(folder / IMAGE_TOWER)
        return OwnClip(text, load_text_projection(folder).to(device), tower.to(device), scale.to(device), resolution)

    @torch.no_grad()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Unit-length embeddings of captions (B,E)."""
        pooled = self.text.encode(captions).pooled
        assert pooled is not None  # a CLIP has one
        return nn.functional.normalize(self.projection(pooled), dim=-1)

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
