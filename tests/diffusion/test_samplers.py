"""Every sampler against its diffusers scheduler, and against Gaussian data, whose exact denoiser is a formula.

diffusers' schedulers run here on our float64 tables and our noise. Where they stay in float64 (DDPM, DDIM, PNDM, UniPC)
the agreement is to 1e-9, where they round x to float32 (DPMSolver, Euler, Heun, flow matching) to 1e-5. What differs:

- DDIM, DDPM and PNDM take N // n as the distance of levels, so there n must divide N on trailing grids;
- PNDM extrapolates what the network predicts, ours eps, whatever the network predicts: it is given eps here;
- HeunDiscrete works on x/alpha: our heun is compared there (alpha = 1), and by its order on variance preserving grids;
- FlowMatchEuler shifts the end of its default grid twice: where there is a shift, its sigmas are given by hand;
- DPMSolver and UniPC round Karras' t, ours are fractional: the toy network is told the same t in both.
"""

from __future__ import annotations

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import SAMPLERS, heun
from ldm.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear

SHAPE = (3, 4, 4)
EXACT, FLOAT32 = {"rtol": 1e-9, "atol": 1e-9}, {"rtol": 1e-5, "atol": 1e-5}
STOCHASTIC = ("ddpm", "euler_a", "dpmpp_2m_sde")
PATHS = [
    Process(),
    Process(schedule=Linear(), target="v"),
    Process(schedule=ScaledLinear(zero_terminal_snr=True), target="v"),
    Process(schedule=Cosine()),
    Process(schedule=Cosine(zero_terminal_snr=True), target="v"),
    Process(schedule=Flow(), target="flow"),
    Process(schedule=Flow(shift=3.0), target="flow"),
]


def path_label(process):
    return f"{process.schedule.kind}-{process.schedule.zero_terminal_snr}-{getattr(process.schedule, 'shift', '')}"


def toy(x, t):
    """A smooth stand-in for a network: any function of x and t does."""
    return torch.tanh(0.7 * x + 0.4 * x.roll(1, -1)) + 0.1 * math.cos(t / 150)


def noise(batch=2):
    return Rng(7, range(batch)).normal("init", SHAPE).double()


def ours(name, process, grid, x, *, eta=0.0):
    """Our sampler with the toy network."""
    t = grid.t.tolist()

    def denoise(x, i):
        return process.x0_from(toy(x, t[i]), x, grid.t[i].expand(len(x)))

    return SAMPLERS[name].run(denoise, x, grid.alpha, grid.sigma, Rng(11, range(len(x))), eta=eta)


def scheduler(kind, process, steps, **changes):
    """A diffusers scheduler of this process, on our float64 table."""
    values = {**process.scheduler_config(), **changes}
    values.pop("_class_name")
    made = kind.from_config(values)
    if not isinstance(process.schedule, Flow):
        made.alphas_cumprod = process.alpha_sigma(torch.arange(1000))[0] ** 2
    made.set_timesteps(steps)
    return made


class Fed:
    """Hands diffusers the noise that ours draws, step by step."""

    def __init__(self, batch):
        self.rng, self.step = Rng(11, range(batch)), 0

    def __call__(self, shape, **_):
        drawn = self.rng.normal(f"step{self.step}", shape[1:]).double()
        self.step += 1
        return drawn


def theirs(made, x, times, monkeypatch=None, **step_options):
    """diffusers' loop with the toy network; `times` are what the network is told, call by call."""
    if monkeypatch is not None:
        monkeypatch.setattr(f"{type(made).__module__}.randn_tensor", Fed(len(x)))
    for t, told in zip(made.timesteps, times, strict=True):
        output = toy(made.scale_model_input(x, t) if hasattr(made, "scale_model_input") else x, told)
        x = made.step(output, t, x, return_dict=False, **step_options)[0]
    return x


# Against diffusers


@pytest.mark.parametrize("process", [Process(), Process(target="v"), PATHS[2], PATHS[3]], ids=path_label)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddim_is_diffusers(process, spacing):
    made = scheduler(diffusers.DDIMScheduler, process, 20, timestep_spacing=spacing)
    grid = process.grid(20, spacing)
    assert grid.t.tolist() == made.timesteps.tolist()
    x = noise()
    wanted = theirs(made, x, grid.t.tolist())
    assert torch.allclose(ours("ddim", process, grid, SAMPLERS["ddim"].start(x, grid)), wanted, **EXACT)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_stochastic_ddim_is_diffusers(eta, monkeypatch):
    made = scheduler(diffusers.DDIMScheduler, Process(), 20)
    grid, x = Process().grid(20), noise()
    wanted = theirs(made, x, grid.t.tolist(), monkeypatch, eta=eta)
    assert torch.allclose(ours("ddim", Process(), grid, x, eta=eta), wanted, **EXACT)


@pytest.mark.parametrize("process", [Process(), Process(target="v"), Process(target="x0")], ids=lambda p: p.target)
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_ddpm_is_diffusers(process, spacing, monkeypatch):
    made = scheduler(diffusers.DDPMScheduler, process, 25, timestep_spacing=spacing)
    grid, x = process.grid(25, spacing), noise()
    wanted = theirs(made, x, grid.t.tolist(), monkeypatch)
    assert torch.allclose(ours("ddpm", process, grid, x), wanted, **EXACT)


@pytest.mark.parametrize("steps", [2, 4, 20])
@pytest.mark.parametrize("process", [Process(), Process(target="v")], ids=lambda p: p.target)
def test_plms_is_diffusers(process, steps):
    made = scheduler(diffusers.PNDMScheduler, process, steps, skip_prk_steps=True)
    grid, x = process.grid(steps), noise()
    t = grid.t.tolist()
    made.register_to_config(prediction_type="epsilon")
    wanted = x
    for at, told in zip(made.timesteps, [t[0], t[1], *t[1:]], strict=True):  # the second point is asked twice
        eps = process.eps_from(toy(wanted, told), wanted, torch.tensor([told]))
        wanted = made.step(eps, at, wanted, return_dict=False)[0]
    assert torch.allclose(ours("plms", process, grid, x), wanted, **EXACT)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras"])
def test_euler_is_diffusers(spacing):
    changes = {"use_karras_sigmas": True, "timestep_spacing": "linspace"} if spacing == "karras" else {"timestep_spacing": spacing}
    process = Process(target="v")
    made, grid = scheduler(diffusers.EulerDiscreteScheduler, process, 20, **changes), process.grid(20, spacing)
    assert torch.allclose(grid.sigma / grid.alpha, made.sigmas.double(), rtol=1e-5)
    x = noise()
    wanted = theirs(made, x / grid.alpha[0], grid.t.tolist())
    assert torch.allclose(ours("euler", process, grid, x), wanted, **FLOAT32)


@pytest.mark.parametrize("process", [Process(), Process(target="v")], ids=lambda p: p.target)
def test_euler_a_is_diffusers(process, monkeypatch):
    made, grid = scheduler(diffusers.EulerAncestralDiscreteScheduler, process, 20), process.grid(20)
    x = noise()
    wanted = theirs(made, x / grid.alpha[0], grid.t.tolist(), monkeypatch)
    assert torch.allclose(ours("euler_a", process, grid, x), wanted, **FLOAT32)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_heun_is_diffusers_on_x_over_alpha(spacing):
    changes = {"use_karras_sigmas": True, "timestep_spacing": "linspace"} if spacing == "karras" else {"timestep_spacing": spacing}
    made, grid = scheduler(diffusers.HeunDiscreteScheduler, Process(), 12, **changes), Process().grid(12, spacing)
    t, ratio = grid.t.tolist(), grid.sigma / grid.alpha
    x = noise() / grid.alpha[0]
    wanted = theirs(made, x, [t[0], *np.repeat(t[1:], 2)])

    def denoise(y, i):
        return y - ratio[i] * toy(y / (1 + ratio[i] ** 2).sqrt(), t[i])

    assert torch.allclose(heun(denoise, x, torch.ones(13), ratio, Rng(0, range(2))), wanted, **FLOAT32)


def test_heun_is_diffusers_on_the_flow_path():
    process = Process(schedule=Flow(), target="flow")
    made, grid = diffusers.FlowMatchHeunDiscreteScheduler(), process.grid(12, "linspace")
    made.set_timesteps(12)
    t, x = grid.t.tolist(), noise()
    wanted = theirs(made, x, [t[0], *np.repeat(t[1:], 2)])
    assert torch.allclose(ours("heun", process, grid, x), wanted, **FLOAT32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_euler_on_the_flow_path_is_diffusers(name, shift):
    process = Process(schedule=Flow(shift=shift), target="flow")
    made, x = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), noise()
    grids = {"trailing": {"sigmas": np.linspace(1, 1 / 20, 20)}}
    if shift == 1:
        grids["linspace"] = {"num_inference_steps": 20}
    for spacing, options in grids.items():
        made.set_timesteps(**options)
        grid = process.grid(20, spacing)
        assert torch.allclose(grid.t, made.timesteps, rtol=1e-6)
        assert torch.allclose(ours(name, process, grid, x), theirs(made, x, grid.t.tolist()), **FLOAT32)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("process", [Process(), Process(target="v"), Process(target="x0")], ids=lambda p: p.target)
def test_dpmpp_2m_is_diffusers(process, spacing):
    made = scheduler(diffusers.DPMSolverMultistepScheduler, process, 20, use_karras_sigmas=spacing == "karras")
    grid, x = process.grid(20, spacing), noise()
    wanted = theirs(made, x, grid.t.tolist())
    assert torch.allclose(ours("dpmpp_2m", process, grid, x), wanted, **FLOAT32)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_dpmpp_2m_sde_is_diffusers(spacing, monkeypatch):
    changes = {"use_karras_sigmas": spacing == "karras", "algorithm_type": "sde-dpmsolver++"}
    made = scheduler(diffusers.DPMSolverMultistepScheduler, Process(), 20, **changes)
    grid, x = Process().grid(20, spacing), noise()
    wanted = theirs(made, x, grid.t.tolist(), monkeypatch)
    assert torch.allclose(ours("dpmpp_2m_sde", Process(), grid, x), wanted, **FLOAT32)


@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("process", [Process(), Process(target="v")], ids=lambda p: p.target)
def test_unipc_is_diffusers(process, spacing):
    made = scheduler(diffusers.UniPCMultistepScheduler, process, 20, use_karras_sigmas=spacing == "karras")
    grid, x = process.grid(20, spacing), noise()
    made.sigmas = grid.sigma / grid.alpha  # its own are float32
    wanted = theirs(made, x, grid.t.tolist())
    assert torch.allclose(ours("unipc", process, grid, x), wanted, **EXACT)


def test_the_exported_flow_scheduler_samples_as_unipc():
    process = Process(schedule=Flow(shift=3.0), target="flow")
    made = diffusers.UniPCMultistepScheduler.from_config(process.scheduler_config())
    made.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    grid, x = process.grid(20), noise()
    wanted = theirs(made, x, grid.t.tolist())
    assert torch.allclose(ours("unipc", process, grid, x), wanted, atol=1e-4)  # theirs begins 1e-6 short of pure noise


# Against Gaussian data x0 ~ N(mean, spread^2)

MEAN, SPREAD = 0.8, 0.3


def gaussian(alpha, sigma, mean=MEAN):
    """The exact denoiser E[x0 | x]."""
    a, s = alpha.tolist(), sigma.tolist()

    def denoise(x, i):
        return mean + a[i] * SPREAD**2 / (a[i] ** 2 * SPREAD**2 + s[i] ** 2) * (x - a[i] * mean)

    return denoise


def deviation(alpha, sigma):
    return math.sqrt(alpha**2 * SPREAD**2 + sigma**2)


def error_of_flow(name, alpha, sigma):
    """How far a deterministic sampler ends from the exact solution of the probability flow, in deviations there."""
    start, end = (float(alpha[0]), float(sigma[0])), (float(alpha[-1]), float(sigma[-1]))
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    x = start[0] * MEAN + deviation(*start) * z
    got = SAMPLERS[name].run(gaussian(alpha, sigma), x, alpha, sigma, Rng(0, [0]))
    return ((got - end[0] * MEAN).div(deviation(*end)) - z).abs().max().item()


def deviation_of_samples(name, alpha, sigma, **options):
    """The exact deviation of a sampler's results on Gaussian data: it is linear in x and in each step's noise."""
    n = len(alpha) - 1

    class Units:
        def normal(self, purpose, shape):
            return torch.eye(n + 1)[int(purpose.removeprefix("step")) + 1]  # sample k + 1 hears the noise of step k alone

    x = torch.zeros(n + 1, dtype=torch.float64)
    x[0] = deviation(float(alpha[0]), float(sigma[0]))
    got = SAMPLERS[name].run(gaussian(alpha, sigma, mean=0.0), x, alpha, sigma, Units(), **options)
    return got.square().sum().sqrt().item()


@pytest.mark.parametrize("circle", [True, False], ids=["variance-preserving", "flow"])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("plms", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_deterministic_samplers_converge_with_their_order(name, order, circle):
    errors = []
    for n in (64, 128, 256):
        share = torch.linspace(0.95, 0.05, n + 1, dtype=torch.float64)  # smooth, and both ends short of the singular ones
        alpha, sigma = ((share * math.pi / 2).cos(), (share * math.pi / 2).sin()) if circle else (1 - share, share)
        errors.append(error_of_flow(name, alpha, sigma))
    for coarse, fine in itertools.pairwise(errors):
        assert order - 0.15 < math.log2(coarse / fine), errors
    assert errors[-1] < {1: 2e-2, 2: 5e-4}[order]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers_have_the_datas_spread(name):
    errors = []
    for n in (50, 100, 200):
        ratio = torch.logspace(math.log10(60.0), -2, n, dtype=torch.float64)
        alpha = torch.cat([1 / (1 + ratio**2).sqrt(), torch.ones(1)])
        sigma = torch.cat([ratio * alpha[:-1], torch.zeros(1)])
        errors.append(abs(deviation_of_samples(name, alpha, sigma) - SPREAD))
    assert errors[0] > 1.7 * errors[1] > 1.7**2 * errors[2], errors  # of order 1 or better
    assert errors[-1] < 0.06 * SPREAD


def test_ddim_between_has_the_datas_spread():
    grid = Process(schedule=Cosine()).grid(500)
    for eta in (0.0, 0.3, 1.0):
        assert deviation_of_samples("ddim", grid.alpha, grid.sigma, eta=eta) == pytest.approx(SPREAD, rel=0.02)


@pytest.mark.parametrize("process", PATHS, ids=path_label)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "lcm"])  # whose network is no denoiser
def test_every_sampler_walks_every_path(name, process):
    for spacing in ("trailing", "linspace", "karras", "leading", "exponential"):
        grid = process.grid(100, spacing)
        if name in STOCHASTIC:
            assert deviation_of_samples(name, grid.alpha, grid.sigma) == pytest.approx(SPREAD, rel=0.25), spacing
        else:
            assert error_of_flow(name, grid.alpha, grid.sigma) < 0.3, spacing


@pytest.mark.parametrize("process", PATHS, ids=path_label)
@pytest.mark.parametrize("name", SAMPLERS)
def test_one_and_two_steps_are_finite(name, process):
    for steps in (1, 2, 3):
        grid = process.grid(steps, SAMPLERS[name].spacing)
        x = SAMPLERS[name].start(noise(), grid).reshape(2, -1)
        got = SAMPLERS[name].run(gaussian(grid.alpha, grid.sigma), x, grid.alpha, grid.sigma, Rng(0, range(2)))
        assert got.isfinite().all() and (got - MEAN).abs().max() < 7 * SPREAD


@given(x0=st.floats(-3, 3), steps=st.integers(1, 12), path=st.sampled_from(PATHS), name=st.sampled_from(list(SAMPLERS)))
@settings(max_examples=60, deadline=None)
def test_a_single_datum_is_always_found(x0, steps, path, name):
    grid = path.grid(steps, SAMPLERS[name].spacing)
    x = SAMPLERS[name].start(torch.tensor([[0.7], [-1.2]], dtype=torch.float64), grid)
    got = SAMPLERS[name].run(lambda x, i: torch.full_like(x, x0), x, grid.alpha, grid.sigma, Rng(0, [0, 1]))
    assert torch.allclose(got, torch.full_like(got, x0), atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50])
@pytest.mark.parametrize("process", PATHS[:5], ids=path_label)
def test_lcm_is_diffusers(process, steps, monkeypatch):
    # With their timestep_scaling of 10 the boundary condition mixes up to 7e-6 of x into x0, which ours leaves out.
    for scaling, tolerance in ((1e12, 1e-9), (10.0, 1e-4)):
        made = scheduler(diffusers.LCMScheduler, process, steps, timestep_scaling=scaling, rescale_betas_zero_snr=False)
        grid = process.grid(steps, "lcm")
        assert grid.t.tolist() == made.timesteps.tolist()
        if process.schedule.zero_terminal_snr and process.target == "epsilon":
            continue
        wanted = theirs(made, noise(), grid.t.tolist(), monkeypatch)
        got = ours("lcm", process, grid, SAMPLERS["lcm"].start(noise(), grid))
        assert torch.allclose(got, wanted, rtol=tolerance, atol=tolerance)


def test_lcm_finds_the_data_with_a_consistent_network():
    """The end of the probability flow from x, which is what such a network is distilled to say."""
    for steps in (1, 2, 4, 8):
        grid = Process().grid(steps, "lcm")
        n, a, s = steps, grid.alpha.tolist(), grid.sigma.tolist()
        x = torch.zeros(n + 1, dtype=torch.float64)
        x[0] = deviation(a[0], s[0])

        class Units:
            def normal(self, purpose, shape, n=n):
                return torch.eye(n + 1)[int(purpose.removeprefix("step")) + 1]

        got = SAMPLERS["lcm"].run(lambda x, i, a=a, s=s: SPREAD / deviation(a[i], s[i]) * x, x, grid.alpha, grid.sigma, Units())
        assert got.square().sum().sqrt().item() == pytest.approx(SPREAD)


# What all of them promise


def test_ddpm_is_euler_a_and_ddim_is_euler():
    grid, x = Process().grid(10), noise()
    assert torch.allclose(ours("ddpm", Process(), grid, x), ours("euler_a", Process(), grid, x), **EXACT)
    assert torch.equal(ours("ddim", Process(), grid, x), ours("euler", Process(), grid, x))


@pytest.mark.parametrize("name", SAMPLERS)
def test_neighbours_do_not_matter_and_the_type_is_kept(name):
    grid, entry = Process().grid(4, SAMPLERS[name].spacing), SAMPLERS[name]
    start = entry.start(Rng(7, [5, 6, 9]).normal("init", SHAPE), grid)

    def run(x, positions):
        return entry.run(lambda x, i: torch.tanh(x), x, grid.alpha, grid.sigma, Rng(0, positions), eta=0.5)

    whole = run(start, [5, 6, 9])
    assert whole.dtype == torch.float32
    assert torch.equal(run(start[1:2], [6]), whole[1:2])


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_reported_and_evaluations_counted(name):
    grid, seen, asked = Process().grid(6, SAMPLERS[name].spacing), [], []

    def denoise(x, i):
        asked.append(i)
        return 0.5 * x

    def after_step(x, i):
        seen.append(i)
        return x

    SAMPLERS[name].run(denoise, noise(), grid.alpha, grid.sigma, Rng(0, range(2)), after_step=after_step)
    corrected = [1, 2, 3, 4, 5] if name == "unipc" else []
    assert sorted(seen) == sorted([1, 2, 3, 4, 5, 6, *corrected])
    twice = {"heun": [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], "plms": [0, 1, 1, 2, 3, 4, 5]}
    assert asked == twice.get(name, list(range(6)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_put_in_place_after_a_step_goes_on(name):
    grid, met = Process().grid(6, SAMPLERS[name].spacing), []

    def denoise(x, i):
        met.append((i, float(x[0, 0, 0, 0])))
        return 0.5 * x

    def after_step(x, i):
        return torch.cat([torch.full_like(x[:, :1], 10.0 + i), x[:, 1:]], dim=1)

    x = SAMPLERS[name].run(denoise, noise(), grid.alpha, grid.sigma, Rng(0, range(2)), after_step=after_step)
    assert (x[:, 0] == 16).all() and (x[:, 1:] != 16).all()
    first = dict(reversed(met))  # the first question at each level; heun's and plms' second is before the step's end
    level = {i: value for i, value in met} if name in ("heun", "plms") else first
    assert all(value == 10 + i for i, value in level.items() if i > (1 if name == "plms" else 0))


def test_noise_is_the_start_of_a_variance_preserving_path():
    x = noise()
    for spacing in ("leading", "karras"):
        assert torch.allclose(SAMPLERS["ddim"].start(x, Process().grid(20, spacing)), x, **EXACT)
    flow = Process(schedule=Flow(), target="flow")
    assert torch.equal(SAMPLERS["ddim"].start(x, flow.grid(20)), x)
    assert SAMPLERS["ddim"].start(x, flow.grid(20, "leading")).std() < x.std()
