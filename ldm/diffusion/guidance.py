"""Classifier-free guidance, by one or several conditions: a denoiser made of denoisers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.batch import Cond, cat

Predict = Callable[[Tensor, int, Cond], Tensor]


def guided(predict: Predict, cond: Cond, uncond: Cond, scale: float, rescale: float = 0.0) -> Callable[[Tensor, int], Tensor]:
    """Classifier-free guidance: away from `uncond`, through `cond` (Ho 2022, arXiv 2207.12598, eq. 6).

    x0 = x0_uncond + scale (x0_cond - x0_uncond). At a given x, x0 is linear in epsilon, v and flow, so this is the same
    guidance whatever the network predicts. Both halves are one call of the network on 2B samples, `uncond` first; at
    scale 1 `uncond` drops out, and only `cond` is asked.

    `rescale` in [0,1] draws the estimate's deviation back to that of x0_cond (Lin 2023, arXiv 2305.08891, eq. 15, 16),
    because large scales spread the values and wash pictures out. The paper rescales what the network predicts; here it
    is always x0, where the spread is seen: then it means the same for every target, and it leaves no noise behind, as a
    shrunken epsilon would. At zero terminal SNR, where the paper needs it most, v = -x0 and the two agree.

    Args:
        predict: (x (B, ...), i, cond) -> x0 (B, ...) at grid point i.
        scale: 1 is no guidance; 0 is `uncond` alone; less than 0 is away from `cond`.
        rescale: 0 is none.
    """
    return composed(predict, lambda i: (uncond, cond), torch.ones(1, 1), lambda i: scale, rescale)


def composed(
    predict: Predict, told: Callable[[int], tuple[Cond, ...]], weights: Tensor, scale: Callable[[int], float], rescale: float = 0.0
) -> Callable[[Tensor, int], Tensor]:
    """Guidance by K conditions at once, each of which may change from step to step (Liu 2022, arXiv 2206.01714, eq. 11).

    x0 = x0_uncond + scale sum_k weight_k (x0_k - x0_uncond). With one condition of weight 1 it is `guided`.

    Args:
        told: i -> `uncond` and the K conditions at grid point i; the same objects where nothing has changed, so that what
            a network remembers of them serves on.
        weights: (K,B) or (K,1).
        scale: i -> the guidance at grid point i.
    """
    parts = len(weights)
    single = parts == 1 and bool((weights == 1).all())
    joined: dict[tuple[int, ...], tuple[tuple[Cond, ...], Cond]] = {}  # with the parts, or their ids might come again

    def all_of(conds: tuple[Cond, ...]) -> Cond:
        key = tuple(map(id, conds))
        if key not in joined:
            joined[key] = (conds, cat(conds))
        return joined[key][1]

    def denoise(x: Tensor, i: int) -> Tensor:
        conds, strength = told(i), scale(i)
        if single and strength == 1:
            return predict(x, i, conds[1])
        without, *estimates = predict(torch.cat([x] * (1 + parts)), i, all_of(conds)).chunk(1 + parts)
        shares = weights.to(x).view(parts, -1, *[1] * (x.dim() - 1))
        away = estimates[0] - without
        if not single:
            away = torch.stack([share * (x0 - without) for share, x0 in zip(shares, estimates, strict=True)]).sum(0)
        x0 = without + strength * away
        if rescale:
            aim = estimates[0] if single else without + away
            x0 = x0 * (rescale * _deviation(aim) / _deviation(x0).clamp(min=1e-12) + 1 - rescale)
        return x0

    return denoise


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation over all but the batch, (B, 1, ...)."""
    return x.std(tuple(range(1, x.dim())), keepdim=True)
