"""Denoising trajectory: what a picture looks like while it is drawn, the network's estimate of it at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data.pictures import grid, to_uint8


class Trajectory:
    """The estimates of x0 of the pictures of one call, step after step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[tuple[int, int], Tensor]] = {}  # by picture, by size (of a first pass) and step: (c,h,w)

    def see(self, rows: Sequence[int], step: int, x0: Tensor) -> None:
        """Remember the estimates (B,c,h,w) of some pictures, as `Draws.watch` tells them."""
        for row, own in zip(rows, x0, strict=True):
            self.seen.setdefault(row, {})[own[0].numel(), step] = own.detach().cpu()

    def strip(self, picture: int, decode: Callable[[Tensor], Tensor], columns: int = 10) -> Tensor:
        """The estimates of a picture of the call, decoded, side by side, (H,W,3) uint8; a smaller first pass is enlarged."""
        frames = self.seen[picture]
        images = [decode(frames[key][None]) for key in sorted(frames)]
        side = images[-1].shape[2:]
        return grid(to_uint8(torch.cat([F.interpolate(image, size=side) for image in images])), columns)
