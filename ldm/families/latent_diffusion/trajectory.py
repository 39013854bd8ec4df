"""What a picture looks like while it is drawn: the network's estimate of it at every step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.pictures import grid, to_uint8
from ldm.diffusion.samplers import Denoise
from ldm.families.latent_diffusion.engine import Canvas, Edit
from ldm.formats.latent_codec import LatentCodec


class Film:
    """The estimates of x0 of the pictures of one call, step after step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[tuple[int, int], Tensor]] = {}  # by picture, by size (of a first pass) and step: (c,h,w)

    def edit(self) -> Edit:
        """The edit that watches and changes nothing."""

        def guide(denoise: Denoise, canvas: Canvas) -> Denoise:
            def watched(x: Tensor, i: int) -> Tensor:
                x0 = denoise(x, i)
                for row, own in zip(canvas.rows, x0, strict=True):
                    self.seen.setdefault(row, {})[own[0].numel(), int(i)] = own.detach().cpu()
                return x0

            return watched

        return Edit(guide=guide)

    @torch.no_grad()
    def strip(self, picture: int, codec: LatentCodec, columns: int = 10) -> Tensor:
        """The estimates of a picture of the call, decoded, side by side, (H,W,3) uint8; a smaller first pass is enlarged."""
        frames = self.seen[picture]
        device = next(codec.network.parameters()).device
        images = [codec.decode(frames[key][None].to(device)).float() for key in sorted(frames)]
        side = images[-1].shape[2:]
        return grid(to_uint8(torch.cat([F.interpolate(image, size=side) for image in images])), columns)
