"""Clips edited as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from finished_model import SIDE

from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.engine import Canvas
from ldm.families.latent_diffusion.family import load
from ldm.families.latent_diffusion.video_editing import apart, shuffled, together


def test_frames_come_back_from_their_sheets() -> None:
    frames = torch.randint(0, 256, (7, 8, 6, 3), dtype=torch.uint8)
    for cells in (1, 2, 3):
        sheets = together(frames, cells)
        assert sheets.shape == (-(-7 // cells**2), 8 * cells, 6 * cells, 3)
        assert torch.equal(apart(sheets, cells, 7), frames)
    assert torch.equal(together(frames, 2)[0, :8, 6:], frames[1]) and torch.equal(together(frames, 2)[1, 8:, 6:], frames[6])


def test_what_looks_at_frames_alone_sees_no_difference_and_neighbours_change() -> None:
    x = torch.randn(2, 4, 8, 8)
    canvas = Canvas((0, 1), Process().grid(5), x, Rng(0, [0, 1]))
    guide = shuffled(2, seed=3).guide
    assert guide is not None
    assert torch.allclose(guide(lambda x, i: 2 * x.tanh(), canvas)(x, 0), 2 * x.tanh())
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor, i: int) -> torch.Tensor:
        seen.append(x)
        return x

    for i in range(3):
        assert torch.equal(guide(look, canvas)(x, i), x)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert all(torch.equal(s.flatten().sort().values, x.flatten().sort().values) for s in seen)


def test_a_network_that_sees_neighbours_mixes_all_frames(kl_model: Path) -> None:
    family = load(kl_model)
    engine, settings = replace(family.engine(), chunk=2), family.settings(Wanted(steps=4, sampler="ddim", guidance=1.0))

    def drawn(noise: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            sheets = engine.draw(["a ring"] * 2, [0, 0], settings, (2 * SIDE, 2 * SIDE), latents=noise, edits=(shuffled(2),))[1]
        return torch.stack([s for sheet in sheets for s in (sheet[:, :4, :4], sheet[:, :4, 4:], sheet[:, 4:, :4], sheet[:, 4:, 4:])])

    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    other = noise.clone()
    other[0, :, :4, :4] += 1  # one frame of eight
    moved = (drawn(noise) - drawn(other)).abs().amax((1, 2, 3)) > 0
    assert moved.sum() >= 6  # of the eight, in four steps
