"""A training step asks the device for one answer, and may run through torch's compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import SIDE, UNET, Pictures
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.config.errors import UserError
from ldm.data.buckets import Buckets
from ldm.data.order import BlockBatches, ShuffledBatches
from ldm.diffusion.batch import Fed
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.distributed.processes import Learners
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.models.gpu_form import channel_last
from ldm.training import optim
from ldm.training.ema import Ema
from ldm.training.log import Log
from ldm.training.loop import Trainer
from ldm.training.settings import Train

BATCH = 4
DATA = Pictures()


def trainer(folder: Path, products: dict[str, Product], **fields: Any) -> Trainer:
    stage = Train(model="diffusion", images=40, batch=BATCH, resolution=SIDE, **fields)
    context = Context(data=DATA, val=DATA, resolution=SIDE, seed=0, total_images=40, products=products)
    torch.manual_seed(1)
    family = LatentDiffusion(network=UNET, defaults=Defaults(steps=3, chunk=2), process=Process(), caption_dropout=0.5).build(context)
    return Trainer(
        stage, family, context, data=DATA, folder=folder / "stage", key="", workers=0, processes=Learners(), log=Log(folder, console=False)
    )


def steps(made: Trainer, count: int) -> list[float]:
    losses = []
    for step in range(count):
        positions = range(step * BATCH, (step + 1) * BATCH)
        batch = DATA.load([p % len(DATA) for p in positions], positions, SIDE, 0, False)
        terms, _, _ = made._update(made.family, batch)
        made.step += 1
        losses.append(float(terms["denoising"]))
    return losses


class Asked(TorchDispatchMode):
    """Counts how often a number is read from a tensor, which on a GPU waits for all work before it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_step_reads_one_number(tmp_path: Path, products: dict[str, Product], micro_batch: int) -> None:
    made = trainer(tmp_path, products, micro_batch=micro_batch)
    steps(made, 1)
    positions = range(BATCH, 2 * BATCH)
    batch = DATA.load([p % len(DATA) for p in positions], positions, SIDE, 0, False)
    with Asked() as asked:
        made._update(made.family, batch)
    assert asked.count == 1  # whether all is finite: an update that is not must not be made


def test_adamw_is_fused() -> None:
    network = torch.nn.Linear(3, 3)
    (made,) = optim.build(optim.AdamW(), [optim.ParameterGroup("model", list(network.parameters()))])
    assert made.defaults["fused"] is True


@pytest.mark.slow
def test_compiled_training_learns_the_same(tmp_path: Path, products: dict[str, Product], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.nn.Module.compile
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend=backend))
    plain, compiled = trainer(tmp_path / "a", products), trainer(tmp_path / "b", products, compile=True)
    assert plain.family.state_dict().keys() == compiled.family.state_dict().keys()
    assert steps(compiled, 3) == pytest.approx(steps(plain, 3), rel=1e-5) and graphs
    for name, value in plain.family.state_dict().items():
        assert torch.allclose(value, compiled.family.state_dict()[name], atol=1e-5), name
    assert "compile" in compiled.stage.identity() and "compile" not in plain.stage.identity()


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, products: dict[str, Product], monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.families.family import Family
    from ldm.training.loop import compile_networks

    family = trainer(tmp_path, products).family
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"compile: no C\+\+ compiler"):
        compile_networks(family, torch.device("cpu"))
    monkeypatch.setattr(type(family), "compilable", Family.compilable)
    with pytest.raises(UserError, match=r"no network that torch.compile takes"):
        compile_networks(family, torch.device("cpu"))


def test_blocks_of_samples_are_shuffled_where_a_stage_asks_for_them(tmp_path: Path, products: dict[str, Product]) -> None:
    made = trainer(tmp_path, products, shuffle_block=64)
    assert isinstance(made.order, BlockBatches) and made.order.block == len(DATA) // BATCH
    told = (tmp_path / "log.jsonl").read_text()
    assert f"{len(DATA)} samples are fewer than batch x shuffle_block (4 x 64); blocks of {len(DATA) // BATCH}" in told
    made.run()
    assert isinstance(trainer(tmp_path / "other", products).order, ShuffledBatches)
    with pytest.raises(UserError, match="shuffle_block: 64, but buckets draws from all over the data"):
        Train(model="diffusion", images=40, resolution=64, shuffle_block=64, buckets=Buckets())
    kinds = [Train(model="diffusion", images=40, resolution=64, shuffle_block=block).identity() for block in (0, 64)]
    assert "shuffle_block" not in kinds[0] and kinds[1]["shuffle_block"] == 64  # runs of before stay what they are


def test_draws_made_ahead_change_no_bit_of_an_update(tmp_path: Path, products: dict[str, Product]) -> None:
    def update(made: Trainer, ahead: bool) -> dict[str, torch.Tensor]:
        asked: dict[Any, Any] = {}
        for step in range(2):
            positions = range(step * BATCH, (step + 1) * BATCH)
            rng = Rng(made.seed, list(positions))
            draws = {draw: make(rng) for draw, make in asked.items()} if ahead else {}
            batch = Fed(batch=DATA.load([p % len(DATA) for p in positions], positions, SIDE, 0, False), draws=draws)
            made._update(made.family, batch, False, asked)
            made.step += 1
        assert {(kind, purpose) for kind, purpose, _ in asked} >= {("normal", "eps"), ("normal", "posterior"), ("uniform", "t")}
        return dict(made.family.state_dict())

    own, other = (update(trainer(tmp_path / name, products, micro_batch=1), name == "ahead") for name in ("now", "ahead"))
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_restored_optimiser_lies_as_its_weights_do() -> None:
    torch.manual_seed(0)
    through, again = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 6, 3)

    def built(network: torch.nn.Conv2d) -> list[torch.optim.Optimizer]:
        return optim.build(optim.AdamW(), [optim.ParameterGroup("model", list(network.parameters()))])

    def step(network: torch.nn.Conv2d, optimizers: list[torch.optim.Optimizer]) -> None:
        network.zero_grad()
        network(torch.arange(100.0).view(1, 4, 5, 5).cos()).square().sum().backward()
        optimizers[0].step()

    first, second = built(through), built(again)
    step(through, first)
    again.load_state_dict(through.state_dict())
    channel_last([again])
    optim.restore_tensors(second, {name: value.clone() for name, value in optim.state_tensors(first).items()})
    assert second[0].state[again.weight]["exp_avg"].stride() == again.weight.stride() != through.weight.stride()
    step(through, first)
    step(again, second)
    torch.testing.assert_close(again.weight, through.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_averages_change_places_with_weights_and_back(kind: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=kind))
    ema = Ema([weight], 0.5)
    ema.averages[0].copy_(torch.tensor([1 / 3, 3.0]))
    own, average = weight.detach().clone(), ema.averages[0].clone()
    with ema.applied():
        assert torch.equal(weight, average.to(kind))
        assert kind != torch.float32 or torch.equal(ema.averages[0], own), "no third copy of all weights"
    assert torch.equal(weight, own) and torch.equal(ema.averages[0], average)
