"""Inpainting: the masks that are drawn in training, and what the network is told of a picture."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, config, plain
from ldm.diffusion.batch import sent
from ldm.diffusion.rng import Rng
from ldm.formats.latent_codec import LatentCodec, full

SIDES = (0.1, 0.7)  # of a rectangle, as shares of the picture's
WIDTHS = (0.03, 0.12)  # of half a stroke, as shares of the longer side
SHOWN = 0.7  # how likely each rectangle and stroke is to be there


@config
class Inpainting:
    """Masks as Stable Diffusion's inpainting models saw them: rectangles and strokes, and at times all of the picture."""

    full: Fraction = 0.25  # share of samples of which nothing is known
    rectangles: Count = 3  # at most
    strokes: Count = 3  # at most

    def __post_init__(self) -> None:
        if not self.rectangles + self.strokes and self.full < 1:
            raise UserError("rectangles and strokes are both 0, so nothing would be new; give one of them, or full: 1")


def channels(codec: LatentCodec) -> int:
    """Input channels of an inpainting network: x, the mask, the known part's latents."""
    return 2 * codec.channels + 1


def masks(asked: Inpainting, rng: Rng, size: tuple[int, int]) -> Tensor:
    """Where pictures of `size` (height, width) are new: (B,H,W) bool, each a function of its sample's address alone.

    No mask is empty: where nothing else is drawn, all is new.
    """
    return rng.made(("masks", str(plain(asked)), size), partial(_masks, asked=asked, size=size))


def _masks(rng: Rng, asked: Inpainting, size: tuple[int, int]) -> Tensor:
    height, width = size
    count = max(1, asked.rectangles + asked.strokes)
    draws = rng.uniform("mask", (count, 7)).float()  # (B,count,7)
    y = ((torch.arange(height) + 0.5) / height)[:, None]
    x = ((torch.arange(width) + 0.5) / width)[None, :]
    long = max(height, width)
    out = torch.zeros(len(draws), height, width, dtype=torch.bool)
    for row, shapes in enumerate(draws):
        for number, (there, a, b, c, d, thick, _) in enumerate(shapes.tolist()):
            if there >= SHOWN:
                continue
            if number < asked.rectangles:
                tall, broad = (SIDES[0] + (SIDES[1] - SIDES[0]) * share for share in (c, d))
                top, left = a * (1 - tall), b * (1 - broad)
                out[row] |= (y >= top) & (y < top + tall) & (x >= left) & (x < left + broad)
            elif number < asked.rectangles + asked.strokes:
                half = WIDTHS[0] + (WIDTHS[1] - WIDTHS[0]) * thick
                out[row] |= (
                    _stroke(
                        y * height / long, x * width / long, (a * height / long, b * width / long), (c * height / long, d * width / long)
                    )
                    < half
                )
    whole = (rng.uniform("mask_full").float() < asked.full) | ~out.any(2).any(1)
    out[whole] = True
    return out


def _stroke(y: Tensor, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """How far every place lies from a straight line between two points."""
    dy, dx = end[0] - start[0], end[1] - start[1]
    along = (((y - start[0]) * dy + (x - start[1]) * dx) / max(dy * dy + dx * dx, 1e-9)).clamp(0, 1)
    return ((y - start[0] - along * dy) ** 2 + (x - start[1] - along * dx) ** 2).sqrt()


@torch.no_grad()
def told(codec: LatentCodec, image: Tensor, mask: Tensor) -> Tensor:
    """What the network is told of pictures (B,3,H,W) in [-1,1] with masks (B,H,W): (B,1+c,h,w), the mask and then the latents that the
    pictures most likely have with grey where they are new, as `ldm.families.latent_diffusion.edits.fill` says it when drawing.
    """
    hidden = sent(mask, image.device)[:, None]
    known = full(codec.moments(image.masked_fill(hidden, 0.0))[0])
    small = F.interpolate(hidden.to(known), size=known.shape[2:])  # every factor-th pixel counts
    return torch.cat([small, known], dim=1)
