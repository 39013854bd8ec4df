"""The text encoder of a network that reads no text: it has no words and no states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.diffusion.batch import Text
from ldm.models.cost import TextShape
from ldm.models.lora import Part
from ldm.text.encoder import TextEncoder

SHAPE = TextShape("no text encoder", 0, 0, tokens=1, vocabulary=0, positions=0)


class Wordless(TextEncoder):
    """What stands in the place of a text encoder beside an unconditional network: every prompt is one state of no channels."""

    model: nn.Module

    def __init__(self) -> None:
        self.model, self.tokenizer, self.zeros = nn.Module(), None, False
        self.model.register_buffer("place", torch.zeros(0))  # where the network lies
        self.aliases = {}

    width = pooled_width = words_start = 0  # type: ignore[assignment]
    max_tokens, room = 1, 2**20  # type: ignore[assignment]

    @property
    def networks(self) -> dict[Part, Any]:
        """None."""
        return {}

    def words(self, text: str) -> list[int]:
        """None."""
        return []

    def encode(self, prompts: Sequence[str], clip_skip: int = 1) -> Text:
        """A state (B,1,0) of each prompt."""
        return self._states(len(prompts))

    def encode_words(self, rows: Sequence[tuple[int, ...]], clip_skip: int = 1) -> Text:
        """The same."""
        return self._states(len(rows))

    def _states(self, many: int) -> Text:
        place: Tensor = self.model.place  # type: ignore[assignment]
        return Text(tokens=place.new_zeros(many, 1, 0), mask=torch.ones(many, 1, dtype=torch.bool, device=place.device), pooled=None)

    def check_skip(self, clip_skip: int) -> None:
        """There is no layer to choose.

        Raises:
            UserError: for any.
        """
        if clip_skip != 1:
            raise UserError(f"clip_skip: got {clip_skip}, but this model reads no text; leave it out")

    def unheard_skip(self, clip_skip: int) -> str:
        """Nothing was asked for."""
        return ""

    def tokenizers(self) -> dict[str, Any]:
        """None."""
        return {}

    def forget(self) -> None:
        """Nothing is remembered."""


def text_of(folder: Path | None) -> TextEncoder:
    """The text encoder of a folder, or what stands in its place where there is none."""
    return Wordless() if folder is None else TextEncoder.load(folder)
