"""The process against diffusers' schedules, hand-computed weights and its own inverses."""

from __future__ import annotations

import itertools
import math

import diffusers
import numpy as np
import pydantic
import pytest
import torch

from ldm.config.errors import UserError
from ldm.diffusion.batch import Noised
from ldm.diffusion.process import LCM_LEVELS, SPACINGS, LogitNormal, MinSnr, Power, Process, UniformTime, eps_of, target_of, x0_of
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear

DISCRETE = [
    Linear(),
    ScaledLinear(),
    Cosine(),
    Linear(zero_terminal_snr=True),
    ScaledLinear(zero_terminal_snr=True),
    Cosine(zero_terminal_snr=True),
]
PROCESSES = [
    *[
        Process(schedule=s, target=target)
        for s in DISCRETE
        for target in ("epsilon", "v", "x0")
        if not (s.zero_terminal_snr and target == "epsilon")
    ],
    *[Process(schedule=Flow(shift=shift), target=target) for shift in (1.0, 3.0) for target in ("flow", "x0")],
]


def label(process):
    s = process.schedule
    return f"{s.kind}{'-zero' if s.zero_terminal_snr else ''}-{process.target}"


def output_for(process, x0, eps, t):
    """What a perfect network would say."""
    alpha, sigma = (v.to(x0.dtype).view(-1, 1, 1, 1) for v in process.alpha_sigma(t))
    return {"epsilon": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[process.target]


def test_stable_diffusions_published_values():
    alpha, sigma = Process().alpha_sigma(torch.tensor([0, 499, 999]))
    assert torch.allclose(alpha**2, torch.tensor([0.99915000, 0.27766965, 0.00466010]).double(), atol=1e-7)
    assert (sigma / alpha)[0].item() == pytest.approx(0.029167, abs=1e-6)
    assert (sigma / alpha)[-1].item() == pytest.approx(14.6146, abs=1e-4)


@pytest.mark.parametrize("schedule", DISCRETE, ids=lambda s: f"{s.kind}-{s.zero_terminal_snr}")
def test_tables_are_diffusers(schedule):
    process = Process(schedule=schedule, target="v")
    theirs = diffusers.DDIMScheduler.from_config(process.scheduler_config()).alphas_cumprod.double()
    alpha, sigma = process.alpha_sigma(torch.arange(1000))
    assert torch.allclose(alpha**2, theirs, atol=3e-6)  # theirs is a float32 product of 1000 factors
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1000).double(), atol=1e-14)
    assert (alpha[1:] < alpha[:-1]).all()
    assert (alpha[-1].item() == 0) == schedule.zero_terminal_snr


@pytest.mark.parametrize("process", PROCESSES, ids=label)
def test_target_round_trip_in_float32(process):
    rows = [0, 1, 17, 500, 998, 999]
    t = torch.tensor(rows, dtype=torch.float32) if process.target != "flow" else torch.tensor([0, 1e-3, 17, 500, 999.5, 1000])
    x0, eps = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in process.alpha_sigma(t))
    x = alpha * x0 + sigma * eps
    output = output_for(process, x0, eps, t)
    lost = (sigma / alpha).amax((1, 2, 3)) if process.target == "epsilon" else torch.ones(6)
    error = (process.x0_from(output, x, t) - x0).abs().amax((1, 2, 3))
    assert (error <= 1e-6 * (1 + lost)).all(), error  # epsilon loses sigma/alpha in rounding x, whoever computes it
    if process.target != "x0":
        assert torch.allclose(process.eps_from(output, x, t), eps, atol=2e-6)
    else:
        some = sigma.flatten() > 0.1
        assert torch.allclose(process.eps_from(output, x, t)[some], eps[some], atol=2e-5)


@pytest.mark.parametrize("target", ["epsilon", "v", "x0", "flow"])
def test_every_target_is_inverted_on_every_path(target):
    angle = torch.linspace(0.01, 1.55, 50, dtype=torch.float64)
    for alpha, sigma in ((angle.cos(), angle.sin()), (1 - angle / 1.6, angle / 1.6), (torch.ones(50).double(), 9 * angle)):
        x0, eps = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        p, q = target_of(target, alpha, sigma)
        x, output = alpha * x0 + sigma * eps, p * x0 + q * eps
        for (p, q), wanted in ((x0_of(target, alpha, sigma), x0), (eps_of(target, alpha, sigma), eps)):
            assert torch.allclose(p * x + q * output, wanted, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=label)
def test_noise_agrees_with_its_own_inverse(process):
    x0 = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    rng = Rng(3, range(16))
    noised = process.noise(x0, rng)
    assert isinstance(noised, Noised) and noised.x.dtype == noised.target.dtype == noised.weight.dtype == torch.float32
    eps = rng.normal("eps", x0.shape[1:])
    assert torch.allclose(noised.target, output_for(process, x0, eps, noised.t), atol=1e-6)
    some = process.alpha_sigma(noised.t)[0] > 0.1
    assert torch.allclose(process.x0_from(noised.target, noised.x, noised.t)[some], x0[some], atol=1e-5)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    x0 = torch.randn(6, 2, 3, 3)
    whole, part = Process().noise(x0, Rng(0, range(6))), Process().noise(x0[4:5], Rng(0, [4]))
    assert torch.equal(whole.x[4:5], part.x) and torch.equal(whole.t[4:5], part.t)


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_offset_noise_is_equal_all_over_a_channel(target):
    x0, rng = torch.zeros(4000, 2, 4, 4), Rng(0, range(4000))
    plain, moved = Process(target=target).noise(x0, rng), Process(target=target, offset_noise=0.5).noise(x0, rng)
    gain = plain.x[:, 0, 0, 0] / rng.normal("eps", (2, 4, 4))[:, 0, 0, 0]  # sigma
    offset = (moved.x - plain.x) / gain[:, None, None, None]
    assert torch.equal(moved.t, plain.t) and torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-4)
    found = offset[:, :, 0, 0]
    assert abs(found.std() - 0.5) < 0.02 and abs(found.mean()) < 0.02 and abs(np.corrcoef(found.numpy().T)[0, 1]) < 0.06
    # The network is to say this noise, too.
    eps = rng.normal("eps", (2, 4, 4)) + found[:, :, None, None]
    assert torch.allclose(moved.target, output_for(Process(target=target), x0, eps, moved.t), atol=1e-3)
    assert torch.equal(Process(offset_noise=0.0).noise(x0, rng).x, Process().noise(x0, rng).x)


def test_v_and_noised_input_are_diffusers():
    theirs = diffusers.DDIMScheduler.from_config(Process(target="v").scheduler_config())
    x0, rng = torch.randn(8, 2, 3, 3), Rng(0, range(8))
    noised, eps = Process(target="v").noise(x0, rng), rng.normal("eps", (2, 3, 3))
    assert torch.allclose(noised.x, theirs.add_noise(x0, eps, noised.t.long()), atol=1e-5)
    assert torch.allclose(noised.target, theirs.get_velocity(x0, eps, noised.t.long()), atol=1e-5)


def test_min_snr_weights_by_hand():
    for target in ("epsilon", "v", "x0"):
        process = Process(target=target, weighting=MinSnr(gamma=5.0))
        t = torch.tensor([5, 120, 500, 999])
        alpha, sigma = process.alpha_sigma(t)
        for snr, weight in zip(((alpha / sigma) ** 2).tolist(), process.weight(t).tolist(), strict=True):
            least = min(snr, 5.0)
            assert weight == pytest.approx({"epsilon": least / snr, "v": least / (snr + 1), "x0": least}[target])


def test_min_snr_weights_at_named_snr():
    flow = Process(schedule=Flow(), target="flow", weighting=MinSnr(gamma=5.0))
    # sigma 1/3: snr 4, x0's error is a third of the output's: 4/9; sigma 1/4: snr 9, capped: 5/16
    assert torch.allclose(flow.weight(torch.tensor([1000 / 3, 250.0], dtype=torch.float64)), torch.tensor([4 / 9, 5 / 16]).double())
    ends = torch.tensor([0.0, 1000.0])
    assert flow.weight(ends).tolist() == [0.0, 0.0]
    sample = Process(schedule=Flow(), target="x0", weighting=MinSnr(gamma=5.0))
    assert sample.weight(ends).tolist() == [5.0, 0.0]


def test_min_snr_at_zero_terminal_snr_is_finite():
    process = Process(schedule=ScaledLinear(zero_terminal_snr=True), target="v", weighting=MinSnr())
    weight = process.weight(torch.arange(1000))
    assert weight.isfinite().all() and weight[-1] == 0 and weight.max() < 1


def test_uniform_weight_is_one():
    assert Process().weight(torch.tensor([0, 999])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("density", "below"),
    [
        (UniformTime(), lambda u: u),
        (Power(power=0.0), lambda u: u),
        (Power(power=2.0), lambda u: u**3),
        (LogitNormal(), lambda u: 0.5 * (1 + math.erf(math.log(u / (1 - u)) / 2**0.5))),
        (LogitNormal(mean=1.0, std=0.5), lambda u: 0.5 * (1 + math.erf((math.log(u / (1 - u)) - 1) / 0.5 / 2**0.5))),
    ],
)
def test_densities_have_their_distribution(density, below):
    warped = density.warp((torch.arange(10000, dtype=torch.float64) + 0.5) / 10000)
    assert ((warped >= 0) & (warped < 1)).all()
    for u in (0.1, 0.3, 0.5, 0.8):
        assert (warped < u).double().mean().item() == pytest.approx(below(u), abs=2e-4)
    assert density.warp(torch.zeros(1).double()).item() == 0.0
    t = Process(density=density).noise(torch.zeros(500, 1), Rng(0, range(500))).t
    assert t.min() >= 0 and t.max() <= 999 and torch.equal(t, t.round())


def test_flow_shift_moves_times_as_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).timesteps.flip(0)
    assert np.allclose(Flow(shift=3.0).time(np.arange(1000.0)), theirs, atol=1e-3)
    u = torch.rand(100, dtype=torch.float64)
    assert torch.allclose(Flow(shift=3.0).draw(u) / 1000, 3 * u / (1 + 2 * u))


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 50, 333, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_times_are_diffusers(steps, spacing):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=0 if steps == 1000 else 1)
    theirs.set_timesteps(steps)
    wanted = theirs.timesteps.tolist()
    if spacing == "linspace" and steps == 1:
        wanted = [999]  # theirs would start at the clean end
    assert Process().grid(steps, spacing).t.tolist() == wanted


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("steps", [2, 10, 30])
def test_levels_by_their_ratio_are_diffusers(steps, spacing):
    config = {**Process().scheduler_config(), f"use_{spacing}_sigmas": True}
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
    theirs.alphas_cumprod = Process().alpha_sigma(torch.arange(1000))[0] ** 2  # their own is float32
    theirs.set_timesteps(steps)
    grid = Process().grid(steps, spacing)
    assert torch.allclose(grid.sigma / grid.alpha, theirs.sigmas.double(), rtol=3e-6)
    assert torch.allclose(grid.t.round().double(), theirs.timesteps.double(), atol=1.0)  # theirs are rounded, sigmas not


@pytest.mark.parametrize("process", PROCESSES, ids=label)
def test_grids_fall_to_the_clean_end(process):
    for spacing, steps in itertools.product(SPACINGS, (1, 2, 3, 19, 100)):
        steps = min(steps, LCM_LEVELS) if spacing == "lcm" else steps
        grid = process.grid(steps, spacing)
        assert grid.t.shape == (steps,) and grid.alpha.shape == grid.sigma.shape == (steps + 1,)
        assert (grid.alpha[-1].item(), grid.sigma[-1].item()) == (1.0, 0.0)
        ratio = grid.sigma / grid.alpha
        assert (ratio[1:] < ratio[:-1]).all() and (grid.sigma[:-1] > 0).all()
        alpha, sigma = process.alpha_sigma(grid.t)  # what x0_from will use
        assert torch.equal(alpha, grid.alpha[:-1]) and torch.equal(sigma, grid.sigma[:-1])
        if spacing != "leading":
            assert grid.t[0].item() == (1000.0 if process.schedule.kind == "flow" else 999.0)


@pytest.mark.parametrize("schedule", [*DISCRETE, Flow(shift=2.0)], ids=lambda s: f"{s.kind}-{s.zero_terminal_snr}")
def test_time_at_inverts_alpha_sigma(schedule):
    t = np.array([0.0, 0.25, 3.5, 400.75, 998.0, 998.5])
    alpha, sigma = schedule.alpha_sigma(torch.from_numpy(t))
    assert np.allclose(schedule.time_at((sigma / alpha).numpy()), t, atol=1e-6)


def test_zero_terminal_karras_does_not_waste_steps_on_noise():
    grid = Process(schedule=ScaledLinear(zero_terminal_snr=True), target="v").grid(10, "karras")
    assert grid.alpha[0].item() == 0 and (grid.sigma / grid.alpha)[1].item() == pytest.approx(80, rel=1e-3)


@pytest.mark.parametrize("steps", [0, 1001])
def test_too_many_steps_are_refused(steps):
    with pytest.raises(UserError, match=f"steps: got {steps}.*1 to 1000"):
        Process().grid(steps, "trailing")


def test_an_unknown_spacing_is_refused():
    with pytest.raises(UserError, match=r"spacing: got 'kerras'.*trailing, leading"):
        Process().grid(5, "kerras")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": ScaledLinear(zero_terminal_snr=True), "target": "epsilon"}, "zero_terminal_snr=true.*target=v"),
        ({"schedule": Flow(), "target": "epsilon"}, "target=flow or x0"),
        ({"schedule": Flow(), "target": "v"}, "target=flow or x0"),
        ({"target": "flow"}, "schedule.kind=flow"),
    ],
)
def test_targets_that_a_schedule_cannot_have_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Process(**values)


@pytest.mark.parametrize("made", [Linear, ScaledLinear])
def test_falling_betas_are_refused(made):
    with pytest.raises(UserError, match="beta_start"):
        made(beta_start=0.5, beta_end=0.1)


def test_words_make_a_process():
    made = pydantic.TypeAdapter(Process).validate_python(
        {"schedule": {"kind": "flow", "shift": 3}, "target": "flow", "density": {"kind": "logit_normal"}}
    )
    assert made == Process(schedule=Flow(shift=3.0), target="flow", density=LogitNormal())


# diffusers' files


@pytest.mark.parametrize("process", PROCESSES, ids=label)
def test_scheduler_config_comes_back(process):
    values = process.scheduler_config()
    assert Process.from_scheduler_config(values) == process
    theirs = getattr(diffusers, values["_class_name"]).from_config(values)
    again = Process.from_scheduler_config({**theirs.config, "_class_name": values["_class_name"]})
    assert again == process
    assert hasattr(theirs, "init_noise_sigma") and hasattr(theirs, "scale_model_input")  # StableDiffusionPipeline calls them


def test_stable_diffusion_1_file():
    values = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert Process.from_scheduler_config(values) == Process()


def test_stable_diffusion_2_v_file():
    values = {
        "_class_name": "DDIMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    assert Process.from_scheduler_config(values) == Process(target="v")


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("DDPMScheduler", Process(schedule=Linear())),
        ("HeunDiscreteScheduler", Process(schedule=Linear(beta_start=0.00085, beta_end=0.012))),
        ("FlowMatchEulerDiscreteScheduler", Process(schedule=Flow(), target="flow")),
        ("FlowMatchHeunDiscreteScheduler", Process(schedule=Flow(), target="flow")),
    ],
)
def test_absent_fields_have_the_classes_defaults(name, process):
    assert Process.from_scheduler_config({"_class_name": name}) == process
    full = {**getattr(diffusers, name)().config, "_class_name": name}
    assert Process.from_scheduler_config(full) == process


def test_a_flow_on_another_solver_is_read():
    values = {
        "_class_name": "DPMSolverMultistepScheduler",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
        "prediction_type": "flow_prediction",
    }
    assert Process.from_scheduler_config(values) == Process(schedule=Flow(shift=3.0), target="flow")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "score"}, "score"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr"),
    ],
)
def test_files_that_say_something_else_are_refused_by_name(values, named):
    with pytest.raises(UserError, match=named):
        Process.from_scheduler_config(values)
