"""DDIM inversion, from data back to noise: what ddim without added noise must begin with so that it ends at a given x0."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.samplers import Denoise


def invert(denoise: Denoise, x0: Tensor, alpha: Tensor, sigma: Tensor, rounds: int = 1) -> Tensor:
    """x at noise level 0 from which ddim's steps lead to x0.

    One round is ddim's inversion (Song 2020, arXiv 2010.02502, section 4.3): eps at a level is taken to be that at the cleaner
    level before, which is right for infinitely many steps. Further rounds solve each step as a fixed point (Pan 2023, arXiv
    2309.04907), so that few steps lead back too. With a, s at the level sought and a', s' at the one that is known, a step says

        x = a/a' x' + (s - a s'/a') eps(x)      or, the same,      x = s/s' x' + (a - s a'/s') x0(x)

    and the one that shrinks an error more, were the data Gaussian of unit variance, is repeated: x0 where it is noisy.

    Args:
        denoise: as samplers take it.
        x0: (B, ...) at the clean end.
        alpha: (n+1,).
        sigma: (n+1,).
        rounds: evaluations for each step; the same number for all samples, so that none depends on its neighbours.
    """
    a, s = alpha.tolist(), sigma.tolist()
    x = x0
    for i in reversed(range(len(a) - 1)):
        known = x
        through_x0 = s[i + 1] > 0 and a[i] * (s[i] * a[i + 1] / s[i + 1] - a[i]) < s[i] * (s[i] - a[i] * s[i + 1] / a[i + 1])
        least: Tensor | None = None  # (B, 1, ...) how far the best x so far leads past the level that is known
        best = known
        for again in range(rounds):
            clean = denoise(x, i)
            eps = (x - a[i] * clean) / s[i]
            miss = (a[i + 1] * clean + s[i + 1] * eps - known).square().flatten(1).sum(1).view(-1, *[1] * (x.dim() - 1))
            if through_x0 and (again or a[i] == 0):
                x = s[i] / s[i + 1] * (known - a[i + 1] * clean) + a[i] * clean
            else:
                x = a[i] / a[i + 1] * known + (s[i] - a[i] * s[i + 1] / a[i + 1]) * eps
            # Where rounds lead away, as they may with a network that is no denoiser, the best of them counts.
            best = x if least is None else torch.where(miss <= least, x, best)
            least = miss if least is None else torch.minimum(miss, least)
        x = best
    return x
