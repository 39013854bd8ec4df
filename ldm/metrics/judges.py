"""Judges: rank several pictures of a prompt, by a CLIP or by the scenes' exact checker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.config.errors import UserError, first_line
from ldm.config.files import at_home
from ldm.formats.model_folder import own_clip, root_of, whole_clip
from ldm.formats.part import read_json
from ldm.text.own_clip import OwnClip

SCENES, OWN = "scenes", "own"
CHUNK = 64  # pictures or captions at a time


class Judge(Protocol):
    """How well pictures show prompts."""

    def scores(self, pictures: Tensor, prompts: Sequence[str]) -> list[float]:
        """The more the better, for pictures (N,H,W,3) uint8 of N prompts; each by itself."""


def judge_of(name: str, model: Path | str, device: str | torch.device = "cpu") -> Judge:
    """By name: "scenes", the built-in scenes' exact checker; "own", the CLIP of the model's own run; or a folder that CLIPModel opens.

    Raises:
        UserError: if there is no such judge.
    """
    if name == SCENES:
        return SceneJudge()
    if name == OWN:
        return OwnJudge.load(model, device)
    return ClipJudge.load(at_home(name), device)


def has_clip(model: Path) -> bool:
    """Whether a folder is a run or model with a CLIP of its own run, and not itself a CLIP."""
    return not whole_clip(model) and own_clip(model / "model" if (model / "model").is_dir() else model) is not None


class SceneJudge:
    """The share of a caption's facts that the scenes' exact checker finds in a picture."""

    def scores(self, pictures: Tensor, prompts: Sequence[str]) -> list[float]:
        """From 0 to 1.

        Raises:
            UserError: for a prompt that is no caption of a scene.
        """
        import numpy as np

        from ldm.data.scenes.captions import parse
        from ldm.metrics.adherence import ATTRIBUTES, score

        targets = []
        for prompt in prompts:
            try:
                targets.append(parse(prompt))
            except ValueError:
                raise UserError(f"judge: {prompt[:60]!r} is no caption of a scene; choose among its pictures by a CLIP folder") from None
        graded = score(pictures.numpy(), targets)
        facts = np.stack([graded[name] for name in (*ATTRIBUTES, "bind", "rel", "count", "strict", "bg")])
        return [float(value) for value in np.nanmean(facts, axis=0)]


class OwnJudge:
    """Cosine similarity of picture and prompt by the CLIP that the model's own run has trained."""

    def __init__(self, clip: OwnClip, device: str | torch.device) -> None:
        self.clip, self.device = clip, device

    @classmethod
    def load(cls, model: Path | str, device: str | torch.device = "cpu") -> OwnJudge:
        """The CLIP in a model's folder, found by any name that `root_of` takes.

        Raises:
            UserError: if the model has none, or it cannot be read.
        """
        folder = root_of(model, note=lambda text: None)  # who draws with it is told
        clip = own_clip(folder)
        if clip is None:
            raise UserError(f"judge: {folder} has no clip/, no CLIP of its own run; give --judge scenes or the FOLDER of a CLIP")
        return cls(OwnClip.load(clip, device), device)

    def scores(self, pictures: Tensor, prompts: Sequence[str]) -> list[float]:
        """From -1 to 1."""
        return [float(value) for value in self.clip.similarity(self._images(pictures), prompts)]

    def similarities(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarities (N,M) of N pictures with each of M prompts."""
        told = torch.cat([self.clip.embed_captions(prompts[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)])
        return torch.cat([self.clip.embed_images(self._images(some)) @ told.T for some in pictures.split(CHUNK)]).cpu()

    def _images(self, pictures: Tensor) -> Tensor:
        return pictures.to(self.device).permute(0, 3, 1, 2) / 127.5 - 1  # (N,3,H,W)


class ClipJudge:
    """Cosine similarity of a CLIP's embeddings of picture and prompt (Radford 2021, arXiv 2103.00020)."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, device: str | torch.device = "cpu") -> None:
        self.model = model.to(device).eval()
        self.tokenizer, self.processor = tokenizer, processor

    @staticmethod
    def check(folder: Path) -> None:
        """Raises UserError where no CLIPModel is."""
        if not (folder / "config.json").is_file() or read_json(folder / "config.json").get("model_type") != "clip":
            raise UserError(f"judge: {folder}: no CLIP here; a folder that transformers' CLIPModel opens is needed, or own or scenes")

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ClipJudge:
        """A CLIPModel with its tokenizer in a folder; nothing is fetched.

        Raises:
            UserError: if there is none, or it cannot be read.
        """
        cls.check(folder)
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"judge: {folder}: cannot be read ({first_line(error)})") from None
        settings: Any = model.config.vision_config
        side = settings.image_size
        if (folder / "preprocessor_config.json").is_file():
            processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        else:
            processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return cls(model, tokenizer, processor, device)

    @torch.no_grad()
    def scores(self, pictures: Tensor, prompts: Sequence[str]) -> list[float]:
        """From -1 to 1."""
        return [float(self._seen(picture) @ self._told(prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]

    @torch.no_grad()
    def similarities(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine similarities (N,M) of N pictures with each of M prompts."""
        seen, told = torch.stack([self._seen(one) for one in pictures]), torch.stack([self._told(one) for one in prompts])
        return (seen @ told.T).cpu()

    def _seen(self, picture: Tensor) -> Tensor:
        """The embedding (E,) of a picture, of length 1."""
        values = self.processor(images=picture.numpy(), return_tensors="pt").pixel_values.to(self.model.device)
        found: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=values).pooler_output)[0]
        return torch.nn.functional.normalize(found, dim=0)

    def _told(self, prompt: str) -> Tensor:
        """The embedding (E,) of a prompt, of length 1."""
        most = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer([prompt], truncation=True, max_length=most, return_tensors="pt").to(self.model.device)
        found: Tensor = self.model.text_projection(self.model.text_model(**words).pooler_output)[0]
        return torch.nn.functional.normalize(found, dim=0)
