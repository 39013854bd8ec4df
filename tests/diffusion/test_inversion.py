"""Inversion against diffusers' inverse scheduler, and there and back."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion.inversion import invert
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import ddim
from ldm.diffusion.schedules import Cosine, Flow, ScaledLinear

PROCESSES = [
    Process(),
    Process(schedule=ScaledLinear(zero_terminal_snr=True), target="v"),
    Process(schedule=Cosine(), target="v"),
    Process(schedule=Flow(), target="flow"),
]


def toy(x: Tensor, i: int) -> Tensor:
    return 0.7 * torch.tanh(x.roll(1, -1)) + 0.05 * i


def denoiser(grid: Any) -> Any:
    """Nearly the denoiser of Gaussian data, as a trained network is near that of its own."""

    def denoise(x: Tensor, i: int) -> Tensor:
        a, s = float(grid.alpha[i]), float(grid.sigma[i])
        return a * x + 0.3 * s * torch.tanh(x.roll(1, -1)) + 0.1

    return denoise


def latents() -> Tensor:
    return Rng(3, range(2)).normal("x0", (3, 4, 4)).double()


def test_one_round_is_diffusers() -> None:
    process = Process()  # of v theirs takes eps with the alpha and sigma of the level before
    grid = process.grid(20, "leading")
    config = {**process.scheduler_config(), "timestep_spacing": "leading"}
    made = diffusers.DDIMInverseScheduler.from_config(config)
    made.alphas_cumprod = process.alpha_sigma(torch.arange(1000))[0] ** 2
    made.initial_alpha_cumprod = torch.ones((), dtype=torch.float64)
    made.set_timesteps(20)
    x = latents()
    for t, i in zip(made.timesteps.tolist(), reversed(range(20)), strict=True):
        assert grid.t[i].item() == t
        x = made.step(toy(x, i), t, x, return_dict=False)[0]

    def denoise(x: Tensor, i: int) -> Tensor:
        return process.x0_from(toy(x, i), x, grid.t[i].expand(len(x)))

    got = invert(denoise, latents(), grid.alpha, grid.sigma)
    assert torch.allclose(got, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.schedule.kind}-{p.schedule.zero_terminal_snr}")
def test_there_and_back(process: Process) -> None:
    grid = process.grid(20)
    denoise = denoiser(grid)
    errors = []
    for rounds in (1, 3, 30):
        noise = invert(denoise, latents(), grid.alpha, grid.sigma, rounds)
        back = ddim(denoise, noise, grid.alpha, grid.sigma, Rng(0, range(2)))
        errors.append(float((back - latents()).abs().max()))
    assert errors[2] < 1e-8 and errors[0] > errors[1] > errors[2], errors


def test_no_sample_depends_on_its_neighbours() -> None:
    grid = Process().grid(5)
    denoise = denoiser(grid)
    whole = invert(denoise, latents(), grid.alpha, grid.sigma, 3)
    assert torch.equal(invert(denoise, latents()[1:], grid.alpha, grid.sigma, 3), whole[1:])


def test_rounds_that_lead_away_do_no_harm() -> None:
    grid = Process().grid(10)
    found = [invert(lambda x, i: 8 * torch.sin(40 * x), latents(), grid.alpha, grid.sigma, rounds) for rounds in (1, 30)]
    assert all(x.isfinite().all() for x in found) and float(found[1].std()) < 10 * float(found[0].std())
