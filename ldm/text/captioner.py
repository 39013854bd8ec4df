"""Pretrained captioners: BLIP, GIT, and vision encoders with a language model (ViT-GPT2), from a folder that transformers wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.config.errors import UserError, first_line
from ldm.config.foreign import short
from ldm.formats.part import CONFIG, read_json

KINDS = ("blip", "git", "vision-encoder-decoder")  # that write about a picture alone, without being asked anything
CHUNK = 8  # pictures per call, padded: floating-point results depend on the shape, so it is fixed
LONGEST = 1024  # px of a picture's longer side, before the model's own processor sees it
TOKENS = 64  # of a caption, at most, where its generation_config.json says nothing


def is_pretrained(folder: Path) -> bool:
    """Whether a folder is one of transformers: its config.json names a model_type."""
    return (folder / CONFIG).is_file() and "model_type" in read_json(folder / CONFIG)


class PretrainedCaptioner:
    """A captioner of transformers, with its own picture processor and tokenizer; captions as its generation_config.json says."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer

    @classmethod
    def load(cls, folder: Path, device: str) -> PretrainedCaptioner:
        """The captioner in a folder; nothing is fetched, no pickle is read, and no code of the folder's is run.

        Raises:
            UserError: for another kind of model, or files that are missing or cannot be read.
        """
        kind = read_json(folder / CONFIG).get("model_type")
        if kind not in KINDS:
            raise UserError(f"{folder}: a model of type {short(kind)}; captioners are {', '.join(KINDS)}")
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        try:
            model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"{folder}: cannot be read ({first_line(error)})") from None
        model.eval()
        torch.nn.Module.to(model, device)
        return cls(model, processor, tokenizer)

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, px, that it takes a picture of these sides in: as it is, if it is not very large."""
        scale = min(1.0, LONGEST / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def write(self, pictures: Sequence[np.ndarray], seeds: Sequence[int]) -> list[str]:
        """A caption for each picture (H,W,3) uint8; nothing is drawn at random."""
        import torch

        found: list[str] = []
        own = self.model.generation_config
        limit = {} if own.max_new_tokens or own.max_length else {"max_new_tokens": TOKENS}
        for start in range(0, len(pictures), CHUNK):
            part = list(pictures[start : start + CHUNK])
            padded = part + [part[-1]] * (CHUNK - len(part))
            device, kind = self.model.device, self.model.dtype
            pixels = self.processor(images=padded, return_tensors="pt").pixel_values.to(device, kind)
            with torch.no_grad():
                ids = self.model.generate(pixel_values=pixels, do_sample=False, **limit)
            found += self.tokenizer.batch_decode(ids, skip_special_tokens=True)[: len(part)]
        return [" ".join(one.split()) for one in found]
