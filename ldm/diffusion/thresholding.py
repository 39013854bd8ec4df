"""Thresholding: estimates of data that has a range are held in it at every step, so that strong guidance does not burn pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.samplers import Denoise

RATIO = 0.995  # of a picture's values that dynamic thresholding keeps in range; Imagen's


def thresholded(denoise: Denoise, how: str, bound: float) -> Denoise:
    """A denoiser whose estimates lie in [-bound, bound].

    static: values beyond are cut (Ho 2020). dynamic: where more than 1 - RATIO of a picture's values lie beyond, they are cut at that
    quantile and all are drawn back in proportion (Saharia 2022, arXiv 2205.11487, section 2.3).
    """

    def held(x: Tensor, i: int) -> Tensor:
        x0 = denoise(x, i)
        if how == "static":
            return x0.clamp(-bound, bound)
        far = torch.quantile(x0.float().abs().flatten(1), RATIO, dim=1).clamp(min=bound).to(x0).view(-1, *[1] * (x0.dim() - 1))
        return torch.minimum(torch.maximum(x0, -far), far) * (bound / far)

    return held
