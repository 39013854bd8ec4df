"""Safety checker, an optional filter: looks at every finished picture for concepts, with weights that the user has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.errors import UserError, first_line
from ldm.formats.part import read_json

CLASS = "StableDiffusionSafetyChecker"


class SafetyFilter:
    """Stable Diffusion's checker: a CLIP image tower and the embeddings of concepts that pictures must stay away from.

    It lets some pictures through that it should not, and withholds some that are harmless; how many depends on its weights, and
    no figures are promised here.
    """

    def __init__(self, checker: Any, processor: Any, device: str | torch.device = "cpu") -> None:
        self.checker = checker.to(device).eval()
        self.processor = processor

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> SafetyFilter:
        """The checker in a folder of diffusers' layout, or in safety_checker/ below it; nothing is fetched.

        Raises:
            UserError: if there is none, or it cannot be read.
        """
        own = folder / "safety_checker" if (folder / "safety_checker").is_dir() else folder
        if not (own / "config.json").is_file():
            raise UserError(f"safety: {folder}: no safety checker here; a folder with its config.json and weights is needed")
        said = read_json(own / "config.json").get("architectures") or ["nothing"]
        if said[0] != CLASS:
            raise UserError(f"safety: {own}: a {CLASS} was expected, but its config.json says {said[0]!r}")
        if not list(own.glob("*.safetensors")):
            raise UserError(f"safety: {own}: no weights in safetensors here; pickled ones are not read")
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        kind: Any = StableDiffusionSafetyChecker
        try:
            checker, told = kind.from_pretrained(own, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"safety: {own}: cannot be read ({first_line(error)})") from None
        if missing := sorted(told["missing_keys"]):
            raise UserError(f"safety: {own}: {missing[0]} and {len(missing) - 1} more weights are missing; copy it again")
        places = [
            place
            for place in (own, folder / "feature_extractor", own.parent / "feature_extractor")
            if (place / "preprocessor_config.json").is_file()
        ]
        side = read_json(own / "config.json")["vision_config"]["image_size"]
        processor = (
            CLIPImageProcessor.from_pretrained(places[0], local_files_only=True)
            if places
            else CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        )
        return cls(checker, processor, device)

    @torch.no_grad()
    def flagged(self, pictures: Tensor) -> list[bool]:
        """Which of pictures (N,H,W,3) uint8 show a concept; each is looked at alone."""
        import numpy as np

        found = []
        for picture in pictures:
            values = self.processor(images=picture.numpy(), return_tensors="pt").pixel_values
            values = values.to(next(self.checker.parameters()))
            _, said = self.checker(clip_input=values, images=np.zeros((1, 1, 1, 3), np.float32))
            found.append(bool(said[0]))
        return found
