"""Guidance: a denoiser made of denoisers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.batch import Cond, cat

Predict = Callable[[Tensor, int, Cond], Tensor]


def guided(
    predict: Predict, cond: Cond, uncond: Cond, scale: float, rescale: float = 0.0
) -> Callable[[Tensor, int], Tensor]:
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
    if scale == 1:
        return lambda x, i: predict(x, i, cond)
    both = cat([uncond, cond])

    def denoise(x: Tensor, i: int) -> Tensor:
        without, told = predict(torch.cat([x, x]), i, both).chunk(2)
        x0 = without + scale * (told - without)
        if rescale:
            x0 = x0 * (rescale * _deviation(told) / _deviation(x0).clamp(min=1e-12) + 1 - rescale)
        return x0

    return denoise


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation over all but the batch, (B, 1, ...)."""
    return x.std(tuple(range(1, x.dim())), keepdim=True)
