"""Held-out loss by noise level: what is measured, that it costs no bit of the training, and that all of it is told."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import SIDE, UNET, Pictures
from safetensors.torch import load_file

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Cosine, Flow
from ldm.distributed.processes import Learners
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.runs.report import report
from ldm.runs.run import Run
from ldm.training.held_out import HeldOutLoss, LossByLevel
from ldm.training.log import Log, read
from ldm.training.loop import Trainer
from ldm.training.settings import BINS, Train

DATA = Pictures(30)
FLOW = Process(schedule=Flow(shift=2.0), target="flow")


class HeldOut(Pictures):
    """Other pictures than those that are trained on."""

    def load(self, index: Any, position: Any, resolution: int, seed: int, flip: bool) -> Any:
        """As `Pictures.load`."""
        return super().load([i + 1000 for i in index], position, resolution, seed, flip)


def trainer(folder: Path, products: dict[str, Product], process: Process = FLOW, *, val: int = 5, **fields: Any) -> Trainer:
    stage = Train(**{"model": "diffusion", "images": 40, "batch": 4, "resolution": SIDE, "samples": 0, **fields})
    context = Context(data=DATA, val=HeldOut(val), resolution=SIDE, seed=3, total_images=40, products=products)
    torch.manual_seed(1)
    network = replace(UNET, dropout=0.1)
    family = LatentDiffusion(network=network, defaults=Defaults(steps=2, chunk=2), process=process, caption_dropout=0.5).build(context)
    log = Log(folder, console=False)
    return Trainer(stage, family, context, data=DATA, folder=folder / "stage", key="", workers=0, processes=Learners(), log=log)


def levels(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read(folder / "log.jsonl") if "loss_by_level" in line]


def measuring(made: Trainer, samples: int, **fields: Any) -> HeldOutLoss:
    options = {"seed": 3, "own": 0, "processes": made.processes, "whole": True, **fields}
    return HeldOutLoss(made.family, DATA, HeldOut(5), stage=replace(made.stage, held_out=samples), **options)


@pytest.mark.parametrize("process", [FLOW, Process(schedule=Cosine(), target="v")])
def test_it_is_the_mean_weighted_error_at_the_levels(tmp_path: Path, products: dict[str, Product], process: Process) -> None:
    made = trainer(tmp_path, products, process)
    made.family.eval()
    seen = measuring(made, 16)
    found = seen.measure(nullcontext)
    assert found is not None and found.samples == 16
    family: Any = made.family
    wanted: list[list[float]] = [[] for _ in range(BINS)]
    sigmas: list[list[float]] = [[] for _ in range(BINS)]
    for k in range(16):  # one by one, from the definitions
        rng = Rng(seen.seed, [k])
        batch = HeldOut(5).load([k % 5], [k], SIDE, 0, False)
        with torch.no_grad():
            mean, std = family.codec.moments(batch.image)
            x0 = mean + std * rng.normal("posterior", mean.shape[1:])
            t = process.schedule.draw((k % BINS + rng.uniform("level")) / BINS).float()
            alpha, sigma = (v.float().view(1, 1, 1, 1) for v in process.alpha_sigma(t))
            eps = rng.normal("eps", x0.shape[1:])
            target = eps - x0 if process.target == "flow" else alpha * eps - sigma * x0
            cond = family.encode(batch, rng).cond
            output = family.denoiser(alpha * x0 + sigma * eps, t, cond)
        wanted[k % BINS].append(float((output - target).square().mean()))
        sigmas[k % BINS].append(float(sigma))
    assert found.held_out == pytest.approx([np.mean(v) for v in wanted], rel=1e-4)
    assert found.sigma == pytest.approx([np.mean(v) for v in sigmas], rel=1e-5)
    assert list(found.sigma) == sorted(found.sigma)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_pictures_are_loaded_outside_of_autocast(tmp_path: Path, products: dict[str, Product], kind: torch.dtype) -> None:
    class Stored(HeldOut):
        """Rows joined in half precision, as cached latents are; autocast to another half type refuses to join them."""

        def load(self, *arguments: Any) -> Any:
            """As `Pictures.load`."""
            assert not torch.is_autocast_enabled("cpu")
            torch.stack([torch.zeros(2, dtype=half) for half in (torch.float16,) * 3])
            return super().load(*arguments)

    made = trainer(tmp_path, products)
    made.family.eval()
    seen = HeldOutLoss(
        made.family, Stored(30), Stored(5), stage=replace(made.stage, held_out=8), seed=3, own=0, processes=made.processes, whole=True
    )
    found = seen.measure(lambda: torch.autocast("cpu", kind))
    exact = measuring(made, 8).measure(nullcontext)
    assert found is not None and exact is not None and found.held_out == pytest.approx(exact.held_out, rel=0.1)


def test_training_learns_the_same_bits(tmp_path: Path, products: dict[str, Product]) -> None:
    trainer(tmp_path / "a", products, held_out=0).run()
    result = trainer(tmp_path / "b", products, held_out=16, held_out_every_images=12).run()
    name = "stage/model/unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(tmp_path / "a" / name), load_file(tmp_path / "b" / name)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not levels(tmp_path / "a") and [line["images"] for line in levels(tmp_path / "b")] == [12, 24, 36, 40]
    last = levels(tmp_path / "b")[-1]["loss_by_level"]
    assert list(result["loss"]["held_out"]) == last["held_out"] and result["loss"]["samples"] == 16


@pytest.mark.slow
def test_an_interrupted_stage_tells_each_once(tmp_path: Path, products: dict[str, Product], monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"held_out": 8, "held_out_every_images": 8, "save_every_images": 12, "save_beside": False, "ema": 0.9}
    trainer(tmp_path / "whole", products, **options).run()
    cut = trainer(tmp_path / "cut", products, **options)
    measure = cut._measure
    calls = iter(range(3))

    def broken(*arguments: Any) -> None:
        measure(*arguments)
        if next(calls) == 2:
            raise RuntimeError("killed")

    monkeypatch.setattr(cut, "_measure", broken)
    with pytest.raises(RuntimeError, match="killed"):
        cut.run()
    assert [line["images"] for line in levels(tmp_path / "cut")] == [8, 16, 24]  # the newest checkpoint is at 12
    trainer(tmp_path / "cut", products, **options).run()
    whole, again = ([(line["images"], line["loss_by_level"]) for line in levels(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == again and len(whole) == 5


def test_two_processes_find_what_one_finds(tmp_path: Path, products: dict[str, Product]) -> None:
    made = trainer(tmp_path, products)
    made.family.eval()
    alone = measuring(made, 40).measure(nullcontext)
    told: list[Any] = []
    for rank in (1, 0):

        def gather(values: list[Any]) -> list[Any]:
            told.extend(values)
            return list(told)

        shared = SimpleNamespace(rank=rank, world=2, main=rank == 0, device=torch.device("cpu"), gather=gather)
        found = measuring(made, 40, processes=shared).measure(nullcontext)
    assert found == alone and len(told) == 80


def test_few_samples_meet_every_level(tmp_path: Path, products: dict[str, Product]) -> None:
    seen = measuring(trainer(tmp_path, products), 80)
    for (_, chunks), many in zip(seen._kinds, (30, 5), strict=True):
        draws = [one for chunk in chunks for one in chunk]
        assert sorted(one.number for one in draws) == list(range(80)) and {one.index for one in draws} == set(range(many))
    met = {(one.index, one.number % BINS) for chunk in seen._kinds[1][1] for one in chunk}
    assert len(met) == 5 * BINS
    eight = HeldOutLoss(seen.family, DATA, HeldOut(8), stage=seen.stage, seed=0, own=4, processes=seen.processes, whole=True)
    assert len({(one.index, one.number % BINS) for chunk in eight._kinds[1][1] for one in chunk}) == 64
    assert {one.index for chunk in eight._kinds[0][1] for one in chunk} == {0, 1, 2, 3}  # the others preserve a prior


def test_what_is_not_held_out_is_told(tmp_path: Path, products: dict[str, Product]) -> None:
    trainer(tmp_path, products, val=0, held_out=8).run()
    assert any("no sample is held out" in line.get("note", "") for line in read(tmp_path / "log.jsonl"))
    assert not levels(tmp_path)


def test_the_default_takes_at_most_a_hundredth() -> None:
    for images in (64, 1600, 6400, 24_000, 50_000, 1_000_000, 100_000_000):
        samples, every = Train(model="a", images=images, resolution=32).held_out_plan
        times = -(-images // every)
        assert samples * times <= images / 100 and samples <= 256 and times <= 20
        assert samples >= 16 if images >= 1600 else samples == 0
    assert Train(model="a", images=1000, resolution=32, held_out=64).held_out_plan == (64, 1000)
    assert Train(model="a", images=1000, resolution=32, held_out=64, held_out_every_images=100).held_out_plan == (64, 100)
    with pytest.raises(UserError, match=r"held_out: got 3; give at least 8"):
        Train(model="a", images=1000, resolution=32, held_out=3)
    watching = Train(model="a", images=1000, resolution=32, held_out=64, held_out_every_images=100)
    assert watching.identity() == Train(model="a", images=1000, resolution=32).identity()


def test_a_model_without_noise_has_none() -> None:
    stage = {"kind": "train", "model": "autoencoder", "images": 8, "resolution": 32, "held_out": 8}
    tree = {"data": {"kind": "scenes"}, "models": {"autoencoder": {"kind": "kl"}}, "stages": {"a": stage}}
    with pytest.raises(UserError, match=r"stages.a.held_out: a model of kind kl has no noise levels"):
        build(tree, Run, "run")


def test_the_report_draws_both_curves(tmp_path: Path) -> None:
    (tmp_path / "stages" / "diffusion").mkdir(parents=True)
    log = Log(tmp_path, console=False)
    with log.stage("diffusion", 100, 0) as stage:
        for k in range(1, 4):
            stage.levels(10 * k, LossByLevel(8, (0.1, 0.5, 0.9), (0.5 / k, 0.3, 0.1), (0.6, 0.4, 0.2)))
    log.close()
    text = report(tmp_path).read_text()
    assert "Held-out loss" in text and "the model memorises" in text and text.count("<svg") == 2
    assert "0.1889 of training samples, 0.4 of held-out ones at the end" in text
    with (tmp_path / "log.jsonl").open("a") as file:  # damaged lines cost themselves alone
        file.write(json.dumps({"stage": "diffusion", "images": 40, "loss_by_level": {"sigma": [1], "train": [], "held_out": [2]}}) + "\n")
    assert "1 damaged line" in report(tmp_path).read_text()
