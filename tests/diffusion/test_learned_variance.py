"""Learned variance: closed forms on Gaussian data, the bound against torch's distributions, ddpm's steps against diffusers'."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.diffusion.learned_variance import share_of, variational
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import SAMPLERS, ancestral
from ldm.diffusion.schedules import Cosine, Linear

S = 0.3  # deviation of the Gaussian data


def best_x0(x: Tensor, a: float, s: float) -> Tensor:
    """E[x0 | x] of data N(0, S^2)."""
    return a * S**2 / (a**2 * S**2 + s**2) * x


def best_share(a: float, s: float, a_next: float, s_next: float) -> float:
    """How far the true variance of x' given x lies on the way, in the logarithm, from the posterior's to the step's."""
    beta = s**2 - (a / a_next) ** 2 * s_next**2
    posterior = beta * (s_next / s) ** 2
    left = 1 / (1 / S**2 + (a / s) ** 2)  # of x0 given x
    true = posterior + (a_next * (1 - (a * s_next / (a_next * s)) ** 2)) ** 2 * left
    return (math.log(true) - math.log(posterior)) / (math.log(beta) - math.log(posterior))


@pytest.mark.parametrize("steps", [3, 10])
def test_the_true_variance_gives_gaussian_data_its_deviation_in_any_number_of_steps(steps: int) -> None:
    process = Process(schedule=Cosine(), target="v")
    grid = process.grid(steps)
    a, s = grid.alpha.tolist(), grid.sigma.tolist()
    now = [0]

    def denoise(x: Tensor, i: int) -> Tensor:
        now[0] = i
        return best_x0(x, a[i], s[i])

    at_levels: list[float] = []

    def reached(x: Tensor, i: int) -> Tensor:
        at_levels.append(float(x.std()))
        return x

    def share() -> Tensor:
        i = now[0]
        return torch.tensor(best_share(a[i], s[i], a[i + 1], s[i + 1]) if s[i + 1] else 0.0)

    rng = Rng(0, [0])
    noise = rng.normal("init", (20_000,)) * math.hypot(a[0] * S, s[0])
    ancestral(share)(denoise, noise, grid.alpha, grid.sigma, rng, after_step=reached)
    wanted = [math.hypot(a[i] * S, s[i]) for i in range(1, steps)]
    assert at_levels[:-1] == pytest.approx(wanted, rel=0.02)
    fixed: list[float] = []
    SAMPLERS["ddpm"].run(denoise, noise, grid.alpha, grid.sigma, rng, after_step=lambda x, i: fixed.append(float(x.std())) or x)
    assert max(1 - f / w for f, w in zip(fixed[:-1], wanted, strict=True)) > 0.02


def test_its_steps_are_those_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(schedule=Linear(), target="epsilon")
    grid, rng = process.grid(8), Rng(3, [1, 2])
    x, outputs = rng.normal("x", (3, 4, 4)), [rng.normal(f"net{i}", (6, 4, 4)) for i in range(8)]
    theirs = diffusers.DDPMScheduler(variance_type="learned_range", timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(8)
    noises = iter([rng.normal(f"step{i}", (3, 4, 4)) for i in range(7)] + [torch.zeros(2, 3, 4, 4)])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(noises))
    want = x
    for t, output in zip(theirs.timesteps, outputs, strict=True):
        want = theirs.step(output, t, want).prev_sample
    said: list[Any] = []

    def denoise(x: Tensor, i: int) -> Tensor:
        output, variance = outputs[i].chunk(2, dim=1)
        said[:] = [share_of(variance)]
        return process.x0_from(output, x, grid.t[i].expand(2))

    got = ancestral(lambda: said[0])(denoise, x, grid.alpha, grid.sigma, rng)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_the_bound_is_the_divergence_of_the_posterior_from_the_step() -> None:
    process, rng = Process(schedule=Cosine(), target="v"), Rng(0, range(4))
    x0, said, share = (rng.normal(name, (3, 2, 2)) for name in ("x0", "said", "share"))
    t = torch.tensor([1.0, 7.0, 400.0, 999.0])
    found = variational(process, x0, said, t, share, None)
    for row, time in enumerate(t.tolist()):
        (a, s), (a1, s1) = (tuple(map(float, process.alpha_sigma(torch.tensor(when)))) for when in (time, time - 1))
        beta, x = 1 - (a / a1) ** 2, torch.zeros(3, 2, 2)
        posterior = beta * (s1 / s) ** 2
        means = [a1 * beta / s**2 * clean + a / a1 * (s1 / s) ** 2 * x for clean in (x0[row], said[row])]
        log = share[row] * math.log(beta) + (1 - share[row]) * math.log(posterior)
        want = kl_divergence(Normal(means[0], math.sqrt(posterior)), Normal(means[1], (0.5 * log).exp())).mean()
        assert float(found[row]) == pytest.approx(float(want), rel=2e-3, abs=1e-6)


def test_the_likelihood_of_the_last_step_is_one_over_all_values_of_a_pixel() -> None:
    process = Process(schedule=Cosine(), target="v")
    values = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)
    for centre, share in ((0.013, 0.9), (-1.0, 0.2), (1.2, 1.0)):
        told = torch.full_like(values, centre), torch.full_like(values, share)
        nats = variational(process, values, told[0], torch.zeros(256), told[1], 1 / 255)
        assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-4)
    assert not variational(process, values, values, torch.zeros(256), values, None).any()


def test_the_bound_is_least_at_the_true_variance_and_teaches_nothing_else() -> None:
    process, rng = Process(schedule=Cosine(), target="v"), Rng(1, [0])
    t = torch.tensor([40.0])
    (a, s), (a1, s1) = (tuple(map(float, process.alpha_sigma(torch.tensor(when)))) for when in (40.0, 39.0))
    x0 = S * rng.normal("x0", (100_000,))
    said = best_x0(a * x0 + s * rng.normal("eps", (100_000,)), a, s).requires_grad_()
    share = torch.tensor(best_share(a, s, a1, s1), requires_grad=True)
    slope, none = torch.autograd.grad(variational(process, x0, said, t, share.expand_as(x0), None).mean(), [share, said], allow_unused=True)
    assert none is None
    beside = variational(process, x0, said, t, (share.detach() + 0.3).expand_as(x0), None).mean()
    least = variational(process, x0, said, t, share.detach().expand_as(x0), None).mean()
    assert float(beside) > float(least) and abs(float(slope)) < 0.01 * float(beside - least) / 0.3 + 1e-5
