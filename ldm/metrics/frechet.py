"""Fréchet distance of image sets in a fixed random feature space: no weights to download, the same on every machine.

Random convolutional features stand in for Inception's (arXiv 2208.09218 finds them defensible). The figures compare models on
the same data and number of images; they are not comparable with FID from elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

FILTERS = (24, 32, 40)
SIDE = 64  # px, to which all images are brought


def weights() -> list[Tensor]:
    """The three layers' filters, drawn once and for all (Philox, key 0), scaled as He 2015."""
    rng = np.random.Generator(np.random.Philox(key=0))
    found, before = [], 3
    for count in FILTERS:
        drawn = rng.standard_normal((count, before, 3, 3)) * np.sqrt(2 / (before * 9))
        found.append(torch.from_numpy(drawn))
        before = count
    return found


@torch.no_grad()
def features(images: Tensor) -> NDArray[np.float64]:
    """Mean and deviation of every filter of three 3x3 stride-2 layers, (N,192), of images (N,3,H,W) in [-1,1]."""
    layers, rows = weights(), []
    for part in images.split(256):
        x = part.cpu().double()
        if x.shape[-2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        columns = []
        for weight in layers:
            x = F.relu(F.conv2d(x, weight, stride=2, padding=1))
            columns += [x.mean((2, 3)), x.std((2, 3), unbiased=False)]
        rows.append(torch.cat(columns, 1).numpy())
    return np.concatenate(rows)


def standardise(reference: NDArray, *others: NDArray) -> list[NDArray]:
    """All sets with the mean and deviation of each feature over the reference taken away.

    A feature that is the same in the whole reference keeps its scale: its deviation is rounding error.
    """
    mean, std = reference.mean(0), reference.std(0)
    std = np.where(std > 1e-9 * (1 + np.abs(mean)), std, 1)
    return [(values - mean) / std for values in (reference, *others)]


def distance(a: NDArray, b: NDArray) -> float:
    """|m - n|² + tr(S + T - 2 (S T)^½) between Gaussians fitted to two sets of features (Dowson and Landau 1982).

    The trace of the root is the sum of singular values of S^½ T^½, which needs no root of a non-symmetric matrix.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError("two images at least are needed on either side")
    gap = a.mean(0) - b.mean(0)
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.linalg.svd(_root(s) @ _root(t), compute_uv=False).sum()
    return max(0.0, float(gap @ gap + np.trace(s) + np.trace(t) - 2 * cross))


def _root(matrix: NDArray) -> NDArray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
