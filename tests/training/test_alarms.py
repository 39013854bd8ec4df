"""What is odd in logged numbers is told once, when it begins; what is usual never is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import trainer

from ldm.cli.watch import lines
from ldm.runs.report import report
from ldm.runs.run_record import read_story
from ldm.training.alarms import STILL, Alarms
from ldm.training.ema import Ema
from ldm.training.optim import AdamW, lr_factor

BATCH, EVERY = 8, 10


def constant(images: int) -> float:
    return 1.0


def told(alarms: Alarms, losses: list[float], norms: list[float] | None = None, lr: float = 1e-3) -> dict[int, list[str]]:
    """By logged step, what was said."""
    found = {}
    for i, loss in enumerate(losses):
        said = alarms.look((i + 1) * BATCH, {"denoising": loss}, {"grad_norm_model": norms[i] if norms else 1.0, "latent_std": 1e9 * i}, lr)
        if said:
            found[i] = said
    return found


def series(seed: int, count: int) -> list[float]:
    """As a diffusion loss falls, with a batch's noise."""
    draw = np.random.default_rng(seed)
    return list((0.1 + np.exp(-np.arange(count) / 50)) * np.exp(0.25 * draw.standard_normal(count)))


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_alarm(seed: int) -> None:
    assert told(Alarms(constant, BATCH), series(seed, 600), series(seed + 99, 600)) == {}


def test_a_loss_spike_is_told_once() -> None:
    losses = series(3, 400)
    losses[200:205] = [9.0, 12.0, 7.0, 9.0, 8.0]
    losses[390] = 50.0
    found = told(Alarms(constant, BATCH), losses)
    assert list(found) == [200, 390]
    (said,) = found[200]
    assert said.startswith("loss spike: denoising is 9 after 1,608 images, where 0.2")


def test_a_gradient_spike_is_told() -> None:
    norms = series(1, 300)
    norms[250] = 40.0
    assert list(told(Alarms(constant, BATCH), series(2, 300), norms)) == [250]


def test_a_term_that_begins_is_no_spike() -> None:
    losses = [0.0] * 100 + [0.7 + 0.01 * (i % 7) for i in range(100)]
    assert told(Alarms(constant, BATCH), losses) == {}
    assert told(Alarms(constant, BATCH), [-1.0, 1.0, -2.0, 3.0] * 20 + [30.0]) == {}


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_do_not_jump_and_jumps_do(schedule: Any) -> None:
    optim, total = AdamW(lr=2e-3, warmup_images=200, schedule=schedule, decay_from=0.0 if schedule == "constant" else 0.3), 4000

    def factor(images: int) -> float:
        return lr_factor(optim, images, total)

    logged = [{"images": n, "terms": {}, "gauges": {}, "lr": 2e-3 * factor(n - BATCH)} for n in range(BATCH, total + 1, BATCH * EVERY)]
    alarms = Alarms(factor, BATCH)
    assert not [said for line in logged if (said := alarms.look(line["images"], {}, {}, line["lr"]))]
    begun = logged[: len(logged) // 2]
    again = Alarms(factor, BATCH, before=begun)
    rest = logged[len(begun) :]
    assert not [said for line in rest if (said := again.look(line["images"], {}, {}, line["lr"]))]
    again = Alarms(factor, BATCH, before=begun)
    (said,) = again.look(rest[0]["images"], {}, {}, 2e-3 * 1.5)
    assert said.startswith("learning rate jump: 0.003 after") and f"gives {rest[0]['lr']:.4g}" in said
    assert again.look(rest[1]["images"], {}, {}, 2e-3 * 1.5 / factor(rest[0]["images"] - BATCH) * factor(rest[1]["images"] - BATCH)) == []


def test_a_start_remembers_what_the_one_before_it_logged() -> None:
    before = [{"images": BATCH * i, "terms": {"denoising": 0.1}, "gauges": {}, "lr": 1e-3} for i in range(1, 60)]
    assert told(Alarms(constant, BATCH, before=before), [0.5]) == {0: ["loss spike: denoising is 0.5 after 8 images, where 0.1 was usual"]}


def test_a_damaged_log_costs_nothing() -> None:
    before = [{"lr": "x", "images": None, "terms": 3, "gauges": ["a"]}, {"terms": {"denoising": "NaN", "kl": None}, "lr": 1e-3}, {}]
    assert told(Alarms(constant, BATCH, before=before), [0.1] * 40) == {}


@pytest.mark.parametrize(("dead", "kind"), [(True, torch.float32), (False, torch.float32), (False, torch.bfloat16)])
def test_averages_that_stand_still(dead: bool, kind: torch.dtype) -> None:
    weights = [torch.nn.Parameter(torch.randn(9, 5).to(kind)), torch.nn.Parameter(torch.randn(3).to(kind))]
    ema = Ema(weights, 0.9999)
    alarms, found = Alarms(constant, BATCH, weights, ema.averages), []
    for step in range(1, 30):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight), alpha=0.01)
        if not dead:
            ema.update()
        found += alarms.look(step * BATCH, {}, {}, 1e-3)
    assert len(found) == dead
    assert not dead or f"their EMA has not (after {STILL * BATCH} images)" in found[0]


def test_weights_that_stand_still_are_not_their_averages_fault() -> None:
    weights = [torch.nn.Parameter(torch.randn(9, 5))]
    alarms = Alarms(constant, BATCH, weights, Ema(weights, 0.9).averages)
    assert not any(alarms.look(step * BATCH, {}, {}, 1e-3) for step in range(1, 30))


def test_training_tells_the_log_the_report_and_who_watches(tmp_path: Path, products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, products, log_every_steps=1, samples=0)
    monkeypatch.setattr(Ema, "update", lambda self: None)
    made.run()
    made.log.close()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (alarm,) = [line for line in log if "alarm" in line]
    assert alarm["stage"] == "stage" and alarm["images"] == 4 * STILL and "dead EMA" in alarm["alarm"]
    assert any(line.get("note", "").startswith("warning: stage: dead EMA") for line in log)
    (tmp_path / "stages" / "stage").mkdir(parents=True)
    story = read_story(tmp_path)
    assert any("! dead EMA" in line for line in lines(story, tmp_path / "report.html", 200))
    page = report(tmp_path).read_text()
    assert '<p class="bad">dead EMA: the weights move' in page
