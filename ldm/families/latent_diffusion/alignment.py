"""Representation alignment: states of the denoising network learn to tell what a frozen image tower sees in the clean picture (REPA)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import PositiveFloat, config
from ldm.data.views import EMBEDDING
from ldm.diffusion.batch import Views
from ldm.models.backbone import Denoiser
from ldm.models.vision_tower import Tower

EPS = 0.01  # of the features' mean deviation: those that hardly differ from place to place stay small
TINY = 1e-12


@config
class Alignment:
    """Representation alignment (Yu 2024, arXiv 2410.06940, eq. 8) with the image tower of the model's CLIP, beside the denoising loss."""

    weight: PositiveFloat = 0.5  # lambda, of the mean of 1 - cosine over places


class Aligned(nn.Module):
    """The layer from states to features, which learns too and is thrown away after the stage; it hears the network's block `aligned`.

    As in iREPA (Singh 2025, arXiv 2512.10794) it is one 3x3 convolution, and each feature has mean 0 and deviation 1 over the places of
    a picture: what differs from place to place is what helps. So no picture's loss depends on others of the batch.

    Args:
        network: whose states are aligned.
        tower: the frozen image tower; it is no part of this module.
    """

    def __init__(self, network: Denoiser, tower: Tower) -> None:
        super().__init__()
        self.projection = projection(network.config.aligned_width, tower.network.config.width)
        self._tower = (tower,)
        self._states: list[Tensor] = []
        network.aligned().register_forward_hook(self._hear)

    @property
    def tower(self) -> Tower:
        """The frozen image tower."""
        return self._tower[0]

    def _hear(self, block: nn.Module, told: Any, output: Any) -> None:
        self._states[:] = [output[0] if isinstance(output, tuple) else output]

    def forward(self, views: Views | None, size: tuple[int, int]) -> Tensor:
        """Mean of 1 - cosine, over places and the batch, of the states of the network's last call.

        Args:
            views: of the batch, with the pictures (B,3,H,W) in [0,1].
            size: height and width of the latents that the network was told.

        Raises:
            UserError: where the batch has no pictures.
        """
        picture = (views or {}).get(EMBEDDING)
        if not isinstance(picture, Tensor):
            raise UserError("align: these samples have no pictures, only latents; encode them again for this model, or leave align out")
        with torch.no_grad():
            seen = self.tower(2 * picture.float() - 1)[0].float()  # (B,D,h',w')
            seen = seen - seen.mean((2, 3), keepdim=True)
            spread = seen.square().mean((2, 3), keepdim=True).sqrt()
            seen = seen / (spread + EPS * spread.mean(1, keepdim=True)).clamp_min(TINY)
        told = self.projection(in_places(self._states.pop(), size)).float()  # (B,D,h,w)
        fine = max(told.shape[2:], seen.shape[2:])
        told, seen = (one if one.shape[2:] == fine else F.interpolate(one, fine, mode="bilinear") for one in (told, seen))
        return (1 - F.cosine_similarity(told, seen, dim=1)).mean()


def projection(states: int, features: int) -> nn.Conv2d:
    """States (B,C,h,w) to features (B,D,h,w)."""
    return nn.Conv2d(states, features, 3, padding=1)


def in_places(states: Tensor, size: tuple[int, int]) -> Tensor:
    """States (B,C,h,w) of a map as they are, those (B,N,C) of patches of latents of `size` as a map."""
    if states.dim() == 4:
        return states
    patch = round((size[0] * size[1] / states.shape[1]) ** 0.5)
    return states.transpose(1, 2).unflatten(2, (size[0] // patch, size[1] // patch))
