"""Agreement of pictures with the views that a model was told: the same view taken of what it drew."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.views import ANY, ViewKind, from_picture, parted
from ldm.diffusion.batch import View
from ldm.diffusion.rng import Rng


def error(drawn: Tensor, name: str, told: View, kind: ViewKind) -> float | None:
    """Mean absolute difference, in [0,1], of a view of drawn pictures (N,H,W,3) uint8 and the one that was told; None where a drawn
    picture tells no such view.

    Of classes with colours it is the share of pixels of another class, each read as the class whose colour it is nearest to in hue and
    saturation, or among greys in brightness.
    """
    if not isinstance(told, Tensor):
        return None
    image = drawn.permute(0, 3, 1, 2)
    if kind.form == "classes":
        return _misread(image, told, kind) if kind.colours else None
    if parted(name)[0] not in ANY or parted(name)[0] == "sketch" or kind.form == "embedding":
        return None
    again = from_picture([name], image, Rng(0, range(len(image))))[name]
    assert isinstance(again, Tensor)
    return float((again.float() / 255 - told.float()).abs().mean())


def _misread(image: Tensor, told: Tensor, kind: ViewKind) -> float:
    """Share of pixels of known class that are read as another one."""
    own = _chroma(torch.tensor(kind.colours).float().T[None, :, :, None])  # (1,3,K,1)
    seen = _chroma(image.float())
    away = torch.stack([(seen - own[:, :, k : k + 1]).square().sum(1) for k in range(kind.channels)], 1)  # (N,K,H,W)
    read, known = away.argmin(1), told[:, 0] >= 0
    return float(((read != told[:, 0]) & known).sum() / known.sum().clamp(min=1))


def _chroma(rgb: Tensor) -> Tensor:
    """Two numbers of colour, which brightness scales out of, and little of brightness itself: (N,3,H,W) of RGB in 0..255."""
    mean = rgb.mean(1, keepdim=True)
    most = rgb.amax(1, keepdim=True).clamp(min=1)
    return torch.cat([(rgb[:, :2] - mean) / most, 0.1 * mean / 255], 1)


def bits(colour: NDArray[np.int64]) -> float:
    """Entropy of colours (n,), in bits."""
    _, counts = np.unique(colour, return_counts=True)
    shares = counts / counts.sum() if len(counts) else np.zeros(0)
    return float(-(shares * np.log2(shares)).sum())
