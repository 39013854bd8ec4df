"""Offload: a step's bits in float32, and in half precision weights, gradients and state where they are said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import SIDE
from safetensors.torch import load_file
from test_loop import BATCH, steps, trainer

from ldm.config.errors import UserError
from ldm.families.family import Product
from ldm.runs.estimate import Needs
from ldm.training import loop
from ldm.training.optim import AdamW, Muon
from ldm.training.settings import Train

HALF: dict[str, Any] = {"precision": "bf16", "offload": True}


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is computed in bf16, whatever this CPU has instructions for."""
    monkeypatch.setattr(loop, "computed_in", lambda precision, device: precision)


@pytest.mark.parametrize("optim", [AdamW, Muon])
def test_in_float32_a_step_has_the_bits_of_one_without(optim: Any, tmp_path: Path, products: dict[str, Product]) -> None:
    fields = {"ema": 0.9, "optim": optim()}
    plain, made = trainer(tmp_path / "a", products, **fields), trainer(tmp_path / "b", products, offload=True, **fields)
    assert steps(made, 3) == steps(plain, 3)
    here, there = made.states.learning.weights(), plain.states.learning.weights()
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there)
    assert made.ema and plain.ema and all(torch.equal(a, b) for a, b in zip(made.ema.averages, plain.ema.averages, strict=True))


def test_in_bf16_matrices_and_their_gradients_are_bf16_and_float32_is_kept(
    halved: None, tmp_path: Path, products: dict[str, Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, products, ema=0.9, **HALF)
    assert made.offload is not None and made.ema is not None
    bring, seen = made.offload.bring_gradients, []

    def watched() -> None:
        seen.extend((p.ndim >= 2, p.dtype, p.grad.dtype) for p in made.family.parameters() if p.grad is not None)
        bring()

    monkeypatch.setattr(made.offload, "bring_gradients", watched)
    before = {name: value.clone() for name, value in made.states.learning.weights().items()}
    losses = steps(made, 4)
    assert all(map(torch.isfinite, map(torch.tensor, losses))) and {kind for kind, _, _ in seen} == {True, False}
    assert all(weight == grad == (torch.bfloat16 if matrix else torch.float32) for matrix, weight, grad in seen)
    assert all(p.grad is None for p in made.family.parameters())
    held = made.states.learning.weights()
    for name, p in made.family.named_parameters():
        assert held[name].dtype == torch.float32 and torch.equal(held[name].to(p.dtype), p), name
    moved = [name for name, value in before.items() if value.is_floating_point() and not torch.equal(held[name], value)]
    # An update of the size of the learning rate is lost in bf16 weights of size one; float32 ones keep it.
    assert len(moved) > len(before) // 2
    assert all(state["exp_avg"].dtype == torch.float32 for optimizer in made.optimizers for state in optimizer.state.values())
    averages = [average.clone() for average in made.ema.averages]
    with made._averaged():
        assert all(p.dtype == torch.float32 for p in made.family.parameters())
        assert all(torch.equal(a, p) for a, p in zip(averages, made.family.averaged(), strict=True))
    assert all(torch.equal(a, own) for a, own in zip(averages, made.ema.averages, strict=True))
    for name, p in made.family.named_parameters():
        assert torch.equal(held[name].to(p.dtype), p), name


def test_a_state_goes_on_with_the_same_bits(halved: None, tmp_path: Path, products: dict[str, Product]) -> None:
    made = trainer(tmp_path, products, ema=0.9, **HALF)
    steps(made, 2)
    made.states.save(made.step, must=True)
    losses = steps(made, 2)
    again = trainer(tmp_path, products, ema=0.9, **HALF)
    assert again.step == 2 and steps(again, 2) == losses
    one, two = made.states.learning.weights(), again.states.learning.weights()
    assert all(torch.equal(one[name], two[name]) for name in one)
    stored = load_file(next((tmp_path / "stage" / "state").glob("images-*")) / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in stored.values() if value.is_floating_point())
    made.processes.wait()


def test_the_product_is_float32(halved: None, tmp_path: Path, products: dict[str, Product]) -> None:
    made = trainer(tmp_path, products, ema=0.9, samples=0, **HALF)
    made.step = made.stage.steps - 1
    steps(made, 1)
    made._finish()
    (file,) = (tmp_path / "stage" / "model").rglob("diffusion_pytorch_model.safetensors")
    found = load_file(file)
    assert made.ema and {value.dtype for value in found.values()} == {torch.float32}
    averages = {tuple(value.shape): value for value in made.ema.averages}
    assert any(torch.equal(value, averages[tuple(value.shape)]) for value in found.values() if tuple(value.shape) in averages)


def test_what_does_not_go_together_is_refused() -> None:
    stage = {"model": "diffusion", "images": 8, "batch": BATCH, "resolution": SIDE, "offload": True}
    with pytest.raises(UserError, match=r"offload: true .* fp16 scales gradients on the device"):
        Train(**stage, precision="fp16")
    with pytest.raises(UserError, match=r"offload: true .* exact: true adds up gradients"):
        Train(**stage, exact=True, micro_batch=1)
    assert "offload" in Train(**stage).identity() and "offload: true holds whole weights; set offload=false" in Train(**stage).unshardable()


def test_the_estimate_counts_what_is_on_the_device(products: dict[str, Product], tmp_path: Path) -> None:
    from ldm.families.family import Footprint
    from ldm.models.cost import Cost

    footprint = Footprint(learned={"unet": 1000}, frozen={}, cost=Cost(forward=1, backward=2, activations=0))
    stage = {"model": "diffusion", "images": 8, "resolution": SIDE}
    whole = Needs(footprint=footprint, stage=Train(**stage, precision="bf16")).memory(1)
    kept = Needs(footprint=footprint, stage=Train(**stage, **HALF)).memory(1)
    assert whole == {"weights": 4000, "gradients": 4000, "optimiser": 8000, "EMA": 4000, "cast weights": 2000}
    assert kept == {"weights": 2000, "gradients": 2000}
