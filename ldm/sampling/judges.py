"""Who chooses the best of several pictures of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.formats.part import read_json

SCENES = "scenes"


class Judge(Protocol):
    """How well pictures show prompts."""

    def scores(self, pictures: Tensor, prompts: Sequence[str]) -> list[float]:
        """The more the better, for pictures (N,H,W,3) uint8 of N prompts; each by itself."""


def judge_of(name: str, device: str | torch.device = "cpu") -> Judge:
    """The exact checker of the built-in scenes ("scenes"), or a CLIP in transformers' layout (a folder).

    Raises:
        UserError: if there is no such judge.
    """
    if name == SCENES:
        return SceneJudge()
    if not name:
        raise UserError("best: who chooses? Give --judge scenes (the built-in scenes' checker) or --judge FOLDER of a CLIP")
    return ClipJudge.load(Path(name), device)


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


class ClipJudge:
    """Cosine similarity of a CLIP's embeddings of picture and prompt (Radford 2021, arXiv 2103.00020)."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, device: str | torch.device = "cpu") -> None:
        self.model = model.to(device).eval()
        self.tokenizer, self.processor = tokenizer, processor

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> ClipJudge:
        """A CLIPModel with its tokenizer in a folder; nothing is fetched.

        Raises:
            UserError: if there is none, or it cannot be read.
        """
        if not (folder / "config.json").is_file() or read_json(folder / "config.json").get("model_type") != "clip":
            raise UserError(f"judge: {folder}: no CLIP here; a folder that transformers' CLIPModel opens is needed, or the word scenes")
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True)
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"judge: {folder}: cannot be read ({str(error).strip().splitlines()[0][:200]})") from None
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
        device = next(self.model.parameters()).device
        found = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            values = self.processor(images=picture.numpy(), return_tensors="pt").pixel_values.to(device)
            words = self.tokenizer(
                [prompt], truncation=True, max_length=self.model.config.text_config.max_position_embeddings, return_tensors="pt"
            ).to(device)
            seen = self.model(pixel_values=values, **words)
            found.append(float(torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)))
        return found
