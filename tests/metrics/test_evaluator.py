"""Measurements of models whose quality is known: perfect painters, deaf ones, and ones that hear only some prompts."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from painters import SIDE, Painter
from PIL import Image

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import ScenesSource, prompts
from ldm.data.scenes.spec import COLOURS, PAIR_DEV, PAIR_TEST, SHAPES
from ldm.distributed.processes import Processes
from ldm.metrics.adherence import METRICS, Adherence, score
from ldm.metrics.bench import Bench
from ldm.metrics.distances import Frechet
from ldm.metrics.evaluator import Evaluator
from ldm.metrics.reconstruction import Reconstruction

HELD_OUT = tuple(f"{COLOURS[c]} {SHAPES[s]}" for c, s in PAIR_DEV + PAIR_TEST)


def bench(model: Any, data: Any = None, pictures: Path | None = None, told: list | None = None) -> Bench:
    said: list = [] if told is None else told
    return Bench(model, data, SIDE, 0, torch.device("cpu"), pictures, lambda *line: said.append(line))


def held_out(prompt: str) -> bool:
    return any(pair in prompt for pair in HELD_OUT)


@pytest.mark.parametrize("tier", ["one", "T1"])
def test_a_perfect_painter_scores_one_in_everything(tier):
    found = Adherence(tier=tier, prompts=12).run(bench(Painter(tier, count=12)))
    assert set(found["seen"].values()) == set(found["held_out"].values()) == {1.0}
    assert found["checker"] == {"seen": 1.0, "held_out": 1.0}
    assert set(found["seen"]) <= set(METRICS) and ("rel" in found["seen"]) == (tier == "T1")
    assert found["intervals"]["3"]["held-out"]["bind"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 12}


def test_a_deaf_painter_scores_what_shuffled_pictures_do():
    n = 60
    found = Adherence(tier="T0", prompts=n).run(bench(Painter("T0", count=n, listens=lambda guidance, prompt: False)))
    asked = prompts("T0", n)
    shuffled = score(np.roll(to_bytes(render(asked.specs, SIDE)), 1, axis=0), asked.targets)
    for name in ("colour", "shape", "cell", "bind"):
        assert found["seen"][name] == pytest.approx(shuffled[name].mean(), abs=0.03 + 4 * np.sqrt(0.18 * 0.82 / n)), name
    assert found["seen"]["strict"] == 0 and found["seen"]["bind"] < 0.12


def test_seen_and_held_out_prompts_are_told_apart():
    found = Adherence(tier="one", prompts=16).run(bench(Painter(listens=lambda guidance, prompt: not held_out(prompt))))
    assert found["seen"]["bind"] == 1 and found["held_out"]["bind"] < 0.5
    assert all(held_out(p) for p in prompts("one", 16, 0, "held-out").text) and not any(held_out(p) for p in prompts("one", 16).text)


def test_guidance_scales_are_compared_on_the_same_prompts_and_seeds():
    painter, told = Painter(listens=lambda guidance, prompt: guidance >= 2), []
    found = Adherence(tier="one", prompts=8, guidance=(1.0, 2.5), steps=4, sampler="heun", size=64, seed=0).run(bench(painter, told=told))
    assert list(found["intervals"]) == ["1", "2.5"]
    assert found["intervals"]["2.5"]["seen"]["bind"]["mean"] == 1 > found["intervals"]["1"]["seen"]["bind"]["mean"]
    assert found["seen"]["bind"] == round(found["intervals"]["1"]["seen"]["bind"]["mean"], 4)
    assert [call["guidance"] for call in painter.calls] == [1.0, 1.0, 2.5, 2.5]
    for call in painter.calls:
        assert (call["steps"], call["sampler"], call["size"]) == (4, "heun", (64, 64)) and len(set(call["seeds"])) == 8
    assert [painter.calls[i][key] for i in (0, 1) for key in ("prompts", "seeds")] == [
        painter.calls[i][key] for i in (2, 3) for key in ("prompts", "seeds")
    ]
    done = [line[0] for line in told]
    assert done == sorted(done) and told[-1] == (32, 32, "guidance 2.5") and {line[1] for line in told} == {32}


def test_the_protocol_stands_beside_the_figures_and_is_json():
    found = Adherence(tier="one", prompts=3).run(bench(Painter()))
    assert found["protocol"] == {
        "tier": "one",
        "prompts": 3,
        "guidance": [3.0],
        "steps": 20,
        "sampler": "ddim",
        "spacing": "trailing",
        "seed": 0,
        "size": SIDE,
        "intervals": "95 % bootstrap over prompts, 1000 resamples",
    }
    assert json.loads(json.dumps(found)) == found


def test_another_seed_asks_other_prompts_with_other_noise():
    first, second = Painter(seed=0), Painter(seed=1)
    for seed, painter in enumerate((first, second)):
        assert Adherence(tier="one", prompts=8, seed=seed).run(bench(painter))["seen"]["bind"] == 1
    assert first.calls[0]["prompts"] != second.calls[0]["prompts"] and not set(first.calls[0]["seeds"]) & set(second.calls[0]["seeds"])


def test_examples_are_shown_where_pictures_are_wanted(tmp_path):
    data = ScenesSource(tier="one", val=6).build("val")
    Adherence(tier="one", prompts=3).run(bench(Painter(), pictures=tmp_path))
    Reconstruction(images=6).run(bench(Painter(), data, tmp_path))
    Adherence(tier="one", prompts=2, size=64).run(bench(Painter(), pictures=tmp_path))
    names = [f"adherence-{pairs}-{side}" for pairs in ("seen", "held-out") for side in (SIDE, 64)]
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{name}.png" for name in names} | {f"reconstruction-{SIDE}.png", "prompts.json"}
    asked = prompts("one", 3)
    told = json.loads((tmp_path / "prompts.json").read_text())
    assert set(told) == set(names) and tuple(told[f"adherence-seen-{SIDE}"]) == asked.text and len(told["adherence-seen-64"]) == 2
    sheet = np.asarray(Image.open(tmp_path / f"adherence-seen-{SIDE}.png"))
    perfect = Painter().sample(asked.text[:1], [0]).numpy()[0]
    assert sheet.shape == (SIDE, 3 * SIDE + 4, 3) and (sheet[:, :SIDE] == perfect).all()


def test_a_faithful_autoencoder_keeps_what_the_checker_reads():
    data = ScenesSource(tier="one", val=60).build("val")
    perfect = Reconstruction(images=60).run(bench(Painter(), data))
    assert perfect["psnr"] == 100 and perfect["ssim"] == perfect["bind"] == perfect["strict"] == 1  # JSON has no infinity
    assert perfect["protocol"].items() >= {"images": 60, "resolution": SIDE}.items() and perfect["frechet"] == 0
    image = data.load(range(60), range(60), SIDE, 0, False).image.double()
    dull = Reconstruction(images=100).run(bench(Painter(faithful=0.5), data))
    expected = [-10 * np.log10(((x / 4) ** 2).mean()) for x in image.numpy()]  # half of [-1,1] is a quarter of [0,1]
    assert dull["psnr"] == pytest.approx(np.mean(expected), abs=1e-2) and dull["ssim"] < 0.9 and dull["protocol"]["images"] == 60


def test_reconstruction_at_another_size_and_of_other_data():
    data = ScenesSource(tier="one", val=4).build("val")
    perfect = Reconstruction(images=4, size=64).run(bench(Painter(), data))
    assert perfect["protocol"].items() >= {"images": 4, "resolution": 64}.items()
    assert perfect["frechet"] == 0 and perfect["iou"] > 0.97

    class Plain:
        __len__ = data.__len__
        load = data.load

    found = Reconstruction(images=4).run(bench(Painter(), Plain()))
    assert set(found) == {"psnr", "ssim", "frechet", "protocol"}
    assert set(Reconstruction().names(False)) == set(found) - {"protocol"} and "bind" in Reconstruction().names(True)


def test_the_frechet_distance_tells_real_pictures_from_wrong_ones():
    data = ScenesSource(tier="one", val=64, captions=1).build("val")
    wrong = Frechet(images=32).run(bench(Constant(), data))
    right = Frechet(images=32).run(bench(Painter(listens=lambda guidance, prompt: False), data))
    assert 0 < right["real_real_floor"] == wrong["real_real_floor"]
    assert right["distance"] < 2 * right["real_real_floor"] and wrong["distance"] > 3 * wrong["real_real_floor"]
    assert set(Frechet().names(True)) == set(right) - {"protocol"}
    assert right["protocol"] | {"guidance": 0, "steps": 0, "sampler": ""} == {
        "guidance": 0,
        "steps": 0,
        "sampler": "",
        "images": 32,
        "features": "3 random 3x3 convolutions, Philox key 0",
        "side": 64,
    }


class Constant(Painter):
    """Draws the same gray picture always."""

    def sample(self, prompts, seeds, settings=None, **told):
        """Gray."""
        return torch.full((len(prompts), SIDE, SIDE, 3), 128, dtype=torch.uint8)


def test_the_frechet_distance_asks_for_real_captions_and_says_when_there_are_too_few_images():
    data, painter = ScenesSource(tier="one", val=9).build("val"), Painter()
    found = Frechet(images=32, steps=3, seed=7).run(bench(painter, data))
    assert painter.calls[0]["prompts"] == tuple(data.captions(range(4), range(4), 0)) and painter.calls[0]["seeds"] == (7, 8, 9, 10)
    assert found["protocol"]["images"] == 4 and painter.calls[0]["steps"] == 3
    few = Frechet(images=32).run(bench(painter, ScenesSource(tier="one", val=3).build("val")))
    assert few == {"skipped": "3 validation images; a distance needs 4 at least"}


@pytest.mark.parametrize("metric", [Reconstruction(), Frechet()])
def test_images_to_compare_with_are_asked_for(metric):
    with pytest.raises(UserError, match="needs images to compare with"):
        metric.run(bench(Painter()))


def test_evaluators_are_chosen_by_kind():
    assert build({"kind": "frechet", "images": 8}, Evaluator, "x") == Frechet(images=8)
    assert build({"kind": "adherence", "tier": "T1", "guidance": [1, 2]}, Evaluator, "x") == Adherence(tier="T1", guidance=(1.0, 2.0))
    for wrong in (
        {"kind": "fid"},
        {"kind": "adherence", "tier": "T7"},
        {"kind": "adherence", "tier": "T0", "guidance": [-1]},
        {"kind": "reconstruction", "images": 0},
    ):
        with pytest.raises(UserError):
            build(wrong, Evaluator, "x")
    assert Adherence(tier="T0").names(True)[0] == "seen.colour" and "held_out.bind" in Adherence(tier="T0").names(True)


def test_pictures_of_one_name_stand_beside_each_other(tmp_path: Path) -> None:
    shown = bench(None, pictures=tmp_path)
    for value in (-1.0, 1.0):
        shown.show("grid", torch.full((1, 3, 8, 8), value), 1, ["a"])
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["grid-2.png", "grid.png"]
    assert (tmp_path / "grid.png").read_bytes() != (tmp_path / "grid-2.png").read_bytes()


class Both:
    """Two threads that stand for two processes."""

    def __init__(self) -> None:
        self.meet, self.said = threading.Barrier(2, timeout=60), [[], []]  # type: ignore[var-annotated]

    def member(self, rank: int) -> Any:
        def share(count: int) -> range:
            return Processes(rank, 2).share(count)

        def gather(values: list[Any]) -> list[Any]:
            self.said[rank] = values
            self.meet.wait()
            found = [*self.said[0], *self.said[1]]
            self.meet.wait()
            return found

        return SimpleNamespace(share=share, gather=gather)


def test_processes_share_the_drawing_and_all_find_what_one_finds() -> None:
    metric = Adherence(tier="one", prompts=9)
    alone = metric.run(bench(Painter(count=9)))
    both, drawn, found = Both(), [0, 0], [{}, {}]  # type: ignore[var-annotated]

    def work(rank: int) -> None:
        painter = Painter(count=9)
        own = painter.sample

        def sample(captions: Any, *words: Any, **more: Any) -> Any:
            drawn[rank] += len(captions)
            return own(captions, *words, **more)

        painter.sample = sample  # type: ignore[method-assign]
        found[rank] = metric.run(replace(bench(painter), team=both.member(rank)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == [alone, alone] and set(alone["seen"].values()) == {1.0}, "in the prompts' order"
    assert drawn == [10, 8]
