"""Masked loss: errors weigh by the picture's mask, so that what is masked out is not learned."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, config
from ldm.diffusion.batch import ImageBatch, MomentBatch


@config
class MaskedLoss:
    """Masked loss by the data's masks (`data.masks`): white is learned, black is not."""

    unmasked: Fraction = 0.0  # weight of what is masked out, beside 1 of the rest (OneTrainer's unmasked weight)
    normalise: bool = False  # divide each picture's loss by its mean weight, so that small parts count as much as large ones


def weigh(asked: MaskedLoss, batch: ImageBatch | MomentBatch, error: Tensor) -> Tensor:
    """The squared errors (B,c,h,w) times each latent pixel's weight, the mean of its mask's pixels but at least `unmasked`.

    Raises:
        UserError: where the batch has no masks.
    """
    if batch.mask is None:
        raise UserError(
            "masked_loss: these latents were encoded without masks; encode them again with data.masks, or leave masked_loss out"
        )
    weight = F.adaptive_avg_pool2d(batch.mask.to(error), (error.shape[2], error.shape[3])).clamp(min=asked.unmasked)  # (B,1,h,w)
    found = error * weight
    return found / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-6) if asked.normalise else found
