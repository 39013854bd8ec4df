"""Video editing (RAVE, vid2vid): short clips edited as one, their frames side by side in an order that changes at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import Denoise
from ldm.families.draws import Settings, VideoEdit
from ldm.families.latent_diffusion.edits import ROUNDS, begin_from, encoded, from_inverted
from ldm.families.latent_diffusion.engine import Canvas, Edit, Engine


@torch.no_grad()
def restyled(
    engine: Engine, frames: Tensor, clip: VideoEdit, settings: Settings, noise: Tensor, on_step: Callable[[int, int], None] | None = None
) -> Tensor:
    """Frames (F,H,W,3) uint8 drawn anew as one clip, all from the same noise (1,c,h,w).

    `on_step` is told how far it is: steps done and all, of which an inversion takes `ROUNDS` for each step of the drawing.
    """
    before = ROUNDS if clip.source is not None else 0

    def inverting(done: int, total: int) -> None:
        if on_step is not None:
            on_step(done, total + total // ROUNDS)

    def drawing(done: int, total: int) -> None:
        if on_step is not None:
            on_step(before * total + done, (before + 1) * total)

    sheets = together(frames, clip.cells)
    many = len(sheets)
    whole = replace(engine, chunk=many)  # all in one call
    if clip.source is not None:
        start = from_inverted(whole, sheets, clip.source, settings, clip.strength, inverting)
    else:
        start = begin_from(encoded(engine.codec, sheets), clip.strength)
    drawn, _ = whole.draw(
        [clip.prompt] * many,
        [clip.seed + k for k in range(many)],
        settings,
        (sheets.shape[1], sheets.shape[2]),
        negative=clip.negative,
        latents=noise.repeat(many, 1, clip.cells, clip.cells),
        edits=(start, shuffled(clip.cells, clip.seed)),
        on_step=drawing,
    )
    return apart(drawn, clip.cells, len(frames))


def together(frames: Tensor, cells: int) -> Tensor:
    """Frames (F,H,W,3) as sheets (N,cells H,cells W,3) of cells x cells each; the last frame fills the last sheet."""
    many = cells * cells
    padded = torch.cat([frames, frames[-1:].expand(-len(frames) % many, -1, -1, -1)])
    return _sheets(padded.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1).contiguous()


def apart(sheets: Tensor, cells: int, count: int) -> Tensor:
    """The first `count` frames (F,H,W,3) of sheets (N,cells H,cells W,3)."""
    return _cells(sheets.permute(0, 3, 1, 2), cells).permute(0, 2, 3, 1)[:count].contiguous()


def shuffled(cells: int, seed: int = 0) -> Edit:
    """At each step the cells of all sheets change places before the network looks, and go back after (Kara 2024, RAVE, arXiv
    2312.04524): so every frame is drawn beside every other one, and all take on one style.

    All sheets must be in one call of the engine.
    """

    def guide(denoise: Denoise, canvas: Canvas) -> Denoise:
        def consistent(x: Tensor, i: int) -> Tensor:
            frames = _cells(x, cells)
            order = next(Rng(seed, [i]).streams("clip")).permutation(len(frames))
            there = torch.from_numpy(order).to(x.device)
            back = torch.from_numpy(np.argsort(order)).to(x.device)
            return _sheets(_cells(denoise(_sheets(frames[there], cells), i), cells)[back], cells)

        return consistent

    return Edit(guide=guide)


def _sheets(x: Tensor, cells: int) -> Tensor:
    """(N cells^2,C,h,w) to (N,C,cells h,cells w), row after row."""
    _, channels, height, width = x.shape
    parts = x.view(-1, cells, cells, channels, height, width)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, cells * height, cells * width)


def _cells(x: Tensor, cells: int) -> Tensor:
    """The inverse of `_sheets`."""
    count, channels, height, width = x.shape
    parts = x.view(count, channels, cells, height // cells, cells, width // cells)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, height // cells, width // cells)
