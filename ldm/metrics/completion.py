"""Completion: whether a picture of which the upper half is shown is completed to the scene that it is of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.scenes.geometry import HALF_HEIGHT
from ldm.data.scenes.spec import Specs

LEAST = 0.25  # share of an object's height that must be shown for its facts to be known


def hidden(height: int, width: int) -> Tensor:
    """True (1,H,W) in the lower half."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, height // 2 :] = True
    return mask


def shown(specs: Specs) -> NDArray[np.float64]:
    """The share (N,K) of each object's height that lies in the upper half, 1 where there is no object."""
    half = HALF_HEIGHT[specs.shape] * specs.side
    return np.where(specs.shape >= 0, np.clip((0.5 - specs.y + half) / np.maximum(2 * half, 1e-9), 0, 1), 1.0)


def tellable(specs: Specs) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Scenes (N,) whose objects are all shown at least in part, and those of them that the border cuts at least one of."""
    share = shown(specs)
    told, cut = np.asarray((share >= LEAST).all(1)), np.asarray((share <= 1 - LEAST).any(1))
    return told, told & cut


def error(made: Tensor, true: Tensor) -> float:
    """PSNR, dB, of the lower half of pictures (N,H,W,3) uint8."""
    low = made.shape[1] // 2
    away = (made[:, low:].double() - true[:, low:].double()).square().mean() / 255**2
    return float(-10 * torch.log10(away.clamp_min(1e-10)))
