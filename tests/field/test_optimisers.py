"""Optimisers by name from kept libraries go on exactly, are refused where they cannot work, and rates follow closed forms."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_snapshot import trainer

from ldm.config.errors import UserError
from ldm.config.manual import describe
from ldm.config.schema import build, plain
from ldm.distributed.launcher import Launched
from ldm.families.family import ParameterGroup
from ldm.runs import launch_checks
from ldm.training import checkpoint, optim
from ldm.training.checkpoint import Meta
from ldm.training.library_optimisers import imported
from ldm.training.rate import Rate, lr_factor
from ldm.training.settings import Train

KINDS = ["adamw", "muon", "adafactor", "lion", "prodigy", "schedule_free", "adamw_8bit"]
LIBRARY = KINDS[2:]


def settings(kind: str, **fields: Any) -> Train:
    given = {"model": "a", "images": 8, "resolution": 8, "ema": 0, "optim": {"kind": kind, **fields}}
    return build(given, Train, "test")


def made(kind: str, **fields: Any) -> tuple[list[torch.nn.Parameter], list[torch.optim.Optimizer]]:
    """Two players: matrices of 4,096 values (8 bits), a convolution, a bias; one that has no gradient yet."""
    drawn = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (32, 16, 3, 3), (64,), (64, 64), (16,)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=drawn)) for shape in shapes]
    groups = [ParameterGroup("model", parameters[:3]), ParameterGroup("discriminator", parameters[3:], 2.0)]
    return parameters, optim.build(settings(kind, **fields).optim, groups)


def steps(parameters: list[torch.nn.Parameter], optimizers: list[torch.optim.Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        drawn = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(parameters):
            grad = torch.randn(parameter.shape, generator=drawn)
            parameter.grad = None if number >= 3 and step < 2 else grad + parameter.detach()
        optim.set_lr(optimizers, lr_factor(Rate(warmup_images=3), step, 9))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_stored_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    """Through the files of a checkpoint, with what libraries count in their groups and keep as plain numbers."""
    parameters, optimizers = made(kind)
    steps(parameters, optimizers, 0, 5)
    tensors = {"model": {str(i): p.detach().clone() for i, p in enumerate(parameters)}, "optimizer": optim.state_tensors(optimizers)}
    checkpoint.save_state(tmp_path, 5, tensors, Meta(key="", step=5, images=5), 1)
    steps(parameters, optimizers, 5, 9)
    (found,) = checkpoint.states(tmp_path)
    stored, _ = checkpoint.load_state(found)
    again, others = made(kind)
    assert not optim.unfit(others, stored["optimizer"])
    for i, parameter in enumerate(again):
        parameter.data.copy_(stored["model"][str(i)])
    optim.restore_tensors(others, stored["optimizer"])
    steps(again, others, 5, 9)
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))
    left, right = optim.state_tensors(optimizers), optim.state_tensors(others)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", LIBRARY)
def test_each_does_what_its_library_does(kind: str) -> None:
    """With one group and no decay: the library's own optimiser, called as its page says."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    said = settings(kind, weight_decay=0.0).optim
    (mine,) = optim.build(said, [ParameterGroup("model", [ours])])
    calls = {
        "adafactor": lambda: torch.optim.Adafactor([theirs], lr=said.lr),
        "lion": lambda: imported(said).Lion([theirs], lr=said.lr, betas=(0.9, 0.99)),
        "prodigy": lambda: imported(said).Prodigy([theirs]),
        "schedule_free": lambda: imported(said).AdamWScheduleFree([theirs], lr=said.lr, betas=(0.9, 0.999)),
        "adamw_8bit": lambda: imported(said).optim.AdamW8bit([theirs], lr=said.lr, weight_decay=0.0),
    }
    other: Any = calls[kind]()
    if kind == "schedule_free":
        other.train()
    for step in range(4):
        grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        other.step()
    assert torch.equal(ours, theirs) and not torch.equal(ours, weight)


def test_8_bits_are_8_bits() -> None:
    parameters, optimizers = made("adamw_8bit")
    steps(parameters, optimizers, 0, 3)
    state = optim.state_tensors(optimizers)
    assert state["0.0.state1"].dtype == torch.uint8 and float(state["0.0.step:int"]) == 3


@pytest.mark.slow
def test_schedule_free_samples_and_saves_its_average_and_trains_on_to_the_bit(tmp_path: Path) -> None:
    said: dict[str, Any] = {"ema": 0, "optim": settings("schedule_free", lr=1e-2).optim, "save_every_images": 12, "save_beside": False}
    made = trainer(tmp_path, **said)
    made.run()
    held = [p.detach().clone() for p in made.family.parameters()]
    with made._averaged():
        product = {name: value.clone() for name, value in made.family.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(made.family.parameters(), held, strict=True))
    saved = load_file(tmp_path / "stage/model/all.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in product.items())
    for optimizer in made.optimizers:  # the library's own way to the average
        optimizer.eval()  # type: ignore[attr-defined]
    assert all(torch.equal(value, product[name]) for name, value in made.family.state_dict().items())
    again = trainer(tmp_path, **said)
    assert again.step == 3
    again.run()
    assert all(torch.equal(a, b) for a, b in zip(again.family.parameters(), held, strict=True))


def test_a_player_has_its_own_estimate() -> None:
    parameters, optimizers = made("prodigy")
    assert len(optimizers) == 2
    steps(parameters, optimizers, 0, 60)
    estimates = [optimizer.param_groups[0]["d"] for optimizer in optimizers]
    assert all(one > 1e-6 for one in estimates) and estimates[0] != estimates[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optim": {"kind": "schedule_free"}, "ema": 0.9}, r"ema: 0\.9, but optim\.kind: schedule_free averages .*; set ema=0"),
        ({"optim": {"kind": "schedule_free", "schedule": "cosine"}, "ema": 0}, r"schedule: cosine, but schedule_free has none"),
        ({"optim": {"cycles": 3}}, r"cycles: has no effect with schedule constant; it is of cosine_restarts"),
        ({"optim": {"schedule": "cosine_restarts"}}, r"cycles: is needed with schedule cosine_restarts"),
        ({"optim": {"schedule": "polynomial"}}, r"power: is needed with schedule polynomial"),
        ({"optim": {"kind": "lions"}}, r"optim\.kind: got 'lions'.*lion"),
    ],
)
def test_what_has_no_effect_or_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build({"model": "a", "images": 8, "resolution": 8, **fields}, Train, "test")


@pytest.mark.parametrize("kind", LIBRARY)
def test_sharding_is_refused_and_a_missing_library_is_one_line_before_any_work(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = settings(kind)
    assert any(f"optim.kind: {kind} " in line for line in stage.unshardable())
    run: Any = SimpleNamespace(mirror="", stages={"tune": stage}, trained=lambda stage: SimpleNamespace(shards=lambda: True))
    with pytest.raises(UserError, match=rf"stages\.tune\.optim\.kind: {kind} .*use adamw"):
        launch_checks.shares(run, Launched(by="test", world=2, sharded=True))
    assert not list(launch_checks.missing(run, torch.device("cpu")))
    monkeypatch.setattr(launch_checks, "find_spec", lambda name: None)
    told = list(launch_checks.missing(run, torch.device("cpu")))
    if kind == "adafactor":
        assert not told
        return
    assert told == [
        f"stages.tune.optim.kind: {kind} needs the package {stage.optim.package[1]}, which is not installed here;"
        " pip install 'ldm-train[optimisers]'"
    ]
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UserError, match=r"optim\.kind: needs the package .*ldm-train\[optimisers\]"):
        optim.build(stage.optim, [ParameterGroup("model", [torch.nn.Parameter(torch.zeros(2, 2))])])


def test_a_foreign_state_is_told() -> None:
    parameters, optimizers = made("adamw")
    steps(parameters, optimizers, 0, 3)
    for key in ("0.99.exp_avg", "1.0.exp_avg", "0.g7.d", "x", "0.0.", "0.0.step:list"):
        assert "belongs to nothing here" in optim.unfit(optimizers, {key: torch.zeros(1)})
    assert not optim.unfit(optimizers, optim.state_tensors(optimizers))


# Rates


def theirs(name: str, total: int, **more: Any) -> list[float]:
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=total, **more)
    found = []
    for _ in range(total + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
def test_cosine_with_restarts_is_diffusers(cycles: int) -> None:
    ours = [lr_factor(Rate(schedule="cosine_restarts", cycles=cycles), images, 100) for images in range(101)]
    assert ours == pytest.approx(theirs("cosine_with_restarts", 100, num_cycles=cycles), abs=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.5])
def test_polynomial_is_diffusers(power: float) -> None:
    rate = Rate(schedule="polynomial", power=power, final_lr=1e-7)  # where theirs ends, whatever the peak
    ours = [lr_factor(rate, images, 100) for images in range(101)]
    assert ours == pytest.approx(theirs("polynomial", 100, power=power), abs=1e-9)


def test_rates_in_closed_form() -> None:
    restarts = Rate(schedule="cosine_restarts", cycles=2, warmup_images=20, final_lr=0.1)
    assert lr_factor(restarts, 60, 100) == pytest.approx(1.0)  # the second peak, half of the way after the warm-up
    assert lr_factor(restarts, 40, 100) == pytest.approx(0.55) and lr_factor(restarts, 100, 100) == pytest.approx(0.1)
    polynomial = Rate(schedule="polynomial", power=2.0, decay_from=0.5)
    assert [lr_factor(polynomial, images, 100) for images in (0, 50, 75, 100)] == pytest.approx([1, 1, 0.25, 0])
    linear = Rate(schedule="linear")
    assert [lr_factor(linear, i, 100) for i in range(101)] == [
        lr_factor(Rate(schedule="polynomial", power=1.0), i, 100) for i in range(101)
    ]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 100)) for i in range(101)]
    assert [lr_factor(Rate(schedule="cosine"), i, 100) for i in range(101)] == pytest.approx(cosine)


def test_new_fields_change_no_key_and_every_field_says_what_it_is() -> None:
    found = settings("adamw").identity()["optim"]
    assert set(found) == {"kind", "lr", "betas", "weight_decay", "warmup_images", "schedule", "decay_from", "final_lr", "clip"}
    told = describe(Train)
    for name in ("warmup_images", "cycles", "power", "clip"):
        assert told.count(f"optim.{name} ") >= 1
    assert "gradient norm limit of each parameter group" in told and isinstance(plain(settings("lion")), dict)
