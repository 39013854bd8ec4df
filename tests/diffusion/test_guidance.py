"""Guidance by hand, and against diffusers' rescale."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.diffusion.batch import Cond, Text
from ldm.diffusion.guidance import composed, guided
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedules import ScaledLinear


def said(value, batch=3):
    """A condition whose tokens all say `value`."""
    tokens = torch.full((batch, 2, 4), float(value))
    return Cond(text=Text(tokens=tokens, mask=torch.ones(batch, 2, dtype=torch.bool)), size=torch.zeros(batch, 6))


def predict(x, i, cond):
    """A stand-in for network and inverse that depends on all it is told."""
    told = cond.text.tokens[:, 0, 0].view(-1, 1, 1, 1)
    return torch.tanh(x * (1 + 0.3 * told)) + 0.1 * told + 0.01 * i


def x_of(batch=3):
    return torch.randn(batch, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 3.0, 7.5])
def test_the_formula(scale):
    x, cond, uncond = x_of(), said(1), said(0)
    a, b = predict(x, 4, uncond), predict(x, 4, cond)
    assert torch.allclose(guided(predict, cond, uncond, scale)(x, 4), a + scale * (b - a), atol=1e-12)


def test_one_call_of_both_halves():
    calls = []

    def watch(x, i, cond):
        calls.append((len(x), i, cond.text.tokens[:, 0, 0].tolist(), len(cond.size)))
        return predict(x, i, cond)

    guided(watch, said(1), said(0), 2.0)(x_of(), 5)
    assert calls == [(6, 5, [0, 0, 0, 1, 1, 1], 6)]


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scale_one_asks_only_for_the_condition(rescale):
    calls = []

    def watch(x, i, cond):
        calls.append(len(x))
        return predict(x, i, cond)

    x = x_of()
    assert torch.equal(guided(watch, said(1), said(0), 1.0, rescale)(x, 2), predict(x, 2, said(1)))
    assert calls == [3]


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_is_diffusers_on_x0(rescale):
    x, cond, uncond = x_of(), said(1), said(0)
    plain = guided(predict, cond, uncond, 6.0)(x, 0)
    wanted = rescale_noise_cfg(plain, predict(x, 0, cond), rescale)
    assert torch.allclose(guided(predict, cond, uncond, 6.0, rescale)(x, 0), wanted, atol=1e-12)


def test_full_rescale_gives_the_conditions_deviation():
    x, cond = x_of(), said(1)
    got = guided(predict, cond, said(0), 9.0, 1.0)(x, 0)
    assert torch.allclose(got.std((1, 2, 3)), predict(x, 0, cond).std((1, 2, 3)), atol=1e-12)


def test_a_flat_estimate_survives_rescale():
    flat = guided(lambda x, i, cond: torch.zeros_like(x), said(1), said(0), 3.0, 1.0)(x_of(), 0)
    assert torch.equal(flat, torch.zeros_like(flat))


@pytest.mark.parametrize("target", ["v", "x0"])
def test_at_pure_noise_it_is_the_papers_rescale_of_the_prediction(target):
    process = Process(schedule=ScaledLinear(zero_terminal_snr=True), target=target)
    x, t = x_of(), torch.full((3,), 999.0)

    def network(x, cond):
        return predict(x, 0, cond)

    def estimate(x, i, cond):
        return process.x0_from(network(x, cond), x, t[:1].expand(len(x)))

    a, b = network(x, said(0)), network(x, said(1))
    prediction = rescale_noise_cfg(a + 5 * (b - a), b, 0.7)
    wanted = process.x0_from(prediction, x, t)
    assert torch.allclose(guided(estimate, said(1), said(0), 5.0, 0.7)(x, 0), wanted, atol=1e-12)


@pytest.mark.parametrize("target", ["epsilon", "v", "x0"])
def test_guiding_x0_is_guiding_the_prediction(target):
    process = Process(target=target)
    x, t = x_of(), torch.tensor([3.0, 400.0, 950.0])
    a, b = predict(x, 0, said(0)), predict(x, 0, said(1))
    wanted = process.x0_from(a + 4 * (b - a), x, t)
    got = guided(lambda x, i, c: process.x0_from(predict(x, 0, c), x, t.repeat(2)), said(1), said(0), 4.0)(x, 0)
    assert torch.allclose(got, wanted, atol=1e-9)


def test_a_guided_denoiser_drives_a_sampler():
    grid = Process().grid(5)
    denoise = guided(predict, said(1), said(0), 3.0, 0.5)
    x = SAMPLERS["dpmpp_2m"].run(denoise, x_of(), grid.alpha, grid.sigma, Rng(0, range(3)))
    assert x.shape == (3, 2, 4, 4) and x.isfinite().all()


def test_several_conditions_add_up():
    x, conds = x_of(), (said(0), said(1), said(-2))
    weights = torch.tensor([[1.0, 0.5, -1.0], [0.25, 0.0, 2.0]])
    none, one, two = (predict(x, 3, c) for c in conds)
    share = weights.double().view(2, 3, 1, 1, 1)
    wanted = none + 4.0 * (share[0] * (one - none) + share[1] * (two - none))
    assert torch.allclose(composed(predict, lambda i: conds, weights, lambda i: 4.0)(x, 3), wanted, atol=1e-12)


def test_conditions_and_scale_of_each_step():
    x, cat, dog, nothing = x_of(), said(1), said(2), said(0)
    calls = []

    def watch(x, i, cond):
        calls.append((i, id(cond), len(x)))
        return predict(x, i, cond)

    denoise = composed(watch, lambda i: (nothing, cat if i < 2 else dog), torch.ones(1, 1), lambda i: 1.0 if i == 3 else 5.0)
    found = [denoise(x, i) for i in range(4)]
    wanted = [guided(predict, cat if i < 2 else dog, nothing, 1.0 if i == 3 else 5.0)(x, i) for i in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert calls[0][1] == calls[1][1] != calls[2][1] and [n for _, _, n in calls] == [6, 6, 6, 3]
