"""Grounding tokens of objects, each told by a phrase and a box (GLIGEN, arXiv 2301.07093), under diffusers' parameter names."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.diffusion.batch import Cond, Injected, Told
from ldm.models.conditioned import ConditionNetwork

FREQUENCIES, HIDDEN = 8, 512  # GLIGEN's own


class GroundingEmbedding(nn.Module):
    """A token for each object, of its phrase's embedding and its box; for one that is not there, of learned values in their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        places = FREQUENCIES * 2 * 4
        self.linears = nn.Sequential(
            nn.Linear(width + places, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, width)
        )
        self.null_positive_feature = nn.Parameter(torch.zeros(width))
        self.null_position_feature = nn.Parameter(torch.zeros(places))

    def forward(self, box: Tensor, there: Tensor, phrase: Tensor) -> Tensor:
        """Tokens (B,K,D).

        Args:
            box: (B,K,4), left, top, right, bottom as shares of the picture.
            there: (B,K) bool, False for the places in a row that no object takes.
            phrase: (B,K,D), the pooled text of each phrase.
        """
        known = there[..., None]
        place = torch.where(known, box_waves(box).to(phrase), self.null_position_feature)
        return self.linears(torch.cat([torch.where(known, phrase, self.null_positive_feature), place], dim=-1))


def box_waves(box: Tensor) -> Tensor:
    """Sine and cosine of boxes (B,K,4) at eight frequencies from 1 to 100^(7/8): (B,K,64)."""
    frequency = 100 ** (torch.arange(FREQUENCIES, device=box.device) / FREQUENCIES)  # float32, as GLIGEN rounded it
    angle = frequency.to(box)[:, None] * box[:, :, None]  # (B,K,8,4)
    return torch.stack([angle.sin(), angle.cos()], dim=3).flatten(2)


class Grounding(ConditionNetwork):
    """Gated port: tells a U-Net what is where; the weights that read it are the U-Net's own.

    Samples that are not told in training are told that nothing is there, so that this is learned, too: diffusers' pipeline tells
    its guidance so.
    """

    def forward(self, x: Tensor, t: Tensor, cond: Cond, told: Told | None) -> Cond:
        """`cond` with the objects (`ldm.diffusion.batch.Objects`)."""
        if told is None:
            return cond
        objects, strength = told.value, told.strength
        there = objects.there & (strength > 0)[:, None] if self.training else objects.there
        made = replace(objects, there=there, weight=torch.ones_like(strength) if self.training else strength)
        return replace(cond, injected=(cond.injected or Injected()) + Injected(objects=made))
