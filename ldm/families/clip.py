"""A small CLIP learned from the run's own captions: its text tower tells the UNet what to draw, and both towers score pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ldm.config.schema import Count, Fraction, Positive, config, plain
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.families.family import Context, Family, Footprint, ModelConfig, Terms, TrainingStage
from ldm.formats.model_folder import OWN_CLIP
from ldm.models import cost
from ldm.models.cost import TextShape
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.vision_tower import TowerConfig, TowerShape
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.own_clip import OwnClip

MAX_SCALE = math.log(100)  # of logit_scale, as CLIP bounds it


@config
class Clip(ModelConfig):
    """Text and image towers trained with the contrastive loss of CLIP (Radford 2021, arXiv 2103.00020), from nothing."""

    kind: Literal["clip"] = "clip"
    text: SmallText = SmallText()  # the text tower
    tower: TowerConfig = ImageTowerConfig()  # the image tower: conv, a small convolutional network, or vit, a vision transformer
    vocabulary: Positive = 4096  # size of the byte-pair vocabulary, 512 of it single bytes, learned from the captions
    tokenizer_captions: Positive = 4000  # how many captions the vocabulary is learned from
    temperature: Fraction = 0.07  # at the start; it is learned
    tokenizer_seed: Count = 0  # which captions

    encodes_text = True
    has_tower = True
    refuses: ClassVar[Mapping[str, str]] = {
        **{option: why for option, why in ModelConfig.refuses.items() if option != "tags"},
        "exact": "learns from pairs of the whole batch, which depend on how many processes there are",
    }

    def text_shape(self, note: Callable[[str], None], width: int = 768) -> TextShape:
        """Its text tower."""
        small = self.text
        return TextShape(
            "own", small.width, small.layers, small.max_tokens, self.vocabulary, small.max_tokens, embedding=self.tower.embedding
        )

    def image_tower(self, side: int, note: Callable[[str], None]) -> TowerShape:
        """Its own."""
        return self.tower.shape(side)

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """A patch of the image tower's."""
        return self.tower.step

    def identity(self) -> dict[str, Any]:
        """All; which tower only where it is not the usual one."""
        found = plain(self)
        return {**found, "tower": {name: value for name, value in found["tower"].items() if (name, value) != ("kind", "conv")}}

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the text tower, which is what other models read."""
        return self.text_shape(note, width).parameters

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """Both towers, the projection and the temperature."""
        with torch.device("meta"):
            tower = self.tower.fresh(side)
        text = self.text_shape(note)
        shared = text.width * self.tower.embedding + 1
        learned = {"text encoder": text.parameters, "image tower": sum(p.numel() for p in tower.parameters() if p.requires_grad) + shared}
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
        self.tower = config.tower.fresh(resolution)
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

    def compilable(self) -> list[nn.Module]:
        """Both towers."""
        return [self.tower, self.text_model]

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text tower reads."""
        return cut_captions(captions, lambda: self.tokenizer, TextEncoder(self.text_model, self.tokenizer).room)

    def finish(self, context: Context) -> dict[str, Any]:
        """Image-to-caption retrieval among 100 held-out pairs (chance 0.01)."""
        count = min(100, len(context.val))
        if not count:
            return {}
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
