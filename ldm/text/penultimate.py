"""Penultimate states: a CLIP read before its last layer and without its last norm, as aMUSEd, MUSE's published form, reads it."""

from __future__ import annotations

from torch import Tensor

from ldm.models.text_tower import TextTower
from ldm.text.encoder import TextEncoder


class PenultimateText(TextEncoder):
    """Text encoder whose states are those after the layer before CLIP's last one (transformers' `hidden_states[-2]`).

    The pooled state is the last layer's, as ever. Any other text encoder than a single CLIP is read at its end.
    """

    @staticmethod
    def of_encoder(text: TextEncoder) -> PenultimateText:
        """The same encoder, read so."""
        return PenultimateText(text.model, text.tokenizer, text.zeros)

    @property
    def pooled_width(self) -> int:
        """Channels of the pooled state; 0: there is none."""
        return super().pooled_width if self.model.config.model_type in ("clip_text_model", "clip_text_pair") else 0

    def _run(self, ids: Tensor, mask: Tensor, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        if not isinstance(self.model, TextTower):
            return super()._run(ids, mask, clip_skip)
        read = len(self.model.encoder.layers) - 1
        states = self.model.hidden(ids, read)
        return states, self.model.finished(self.model.further(states, read), ids).pooler_output
