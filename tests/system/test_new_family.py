"""A system that is new to the house stands in one file and takes one name: here a paired translation, after pix2pix.

Run as a script, this file is `ldm` with that one name more.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.introspection import without_annotation
from ldm.config.schema import BY_KIND, NonNegative, Positive, config, plain
from ldm.families import registry
from ldm.families.draws import Draws, SamplingCall
from ldm.families.family import Context, Family, Footprint, ModelConfig, ParameterGroup, Terms, TrainingStage
from ldm.formats.part import load_module, load_part, save_part
from ldm.models.cost import IMAGES, count, measure

ROOT = Path(__file__).parents[2]


# --- The new system


@config
class Translation(ModelConfig):
    """Grey pictures to colour by a conditional GAN with an L1 term (Isola 2017, arXiv 1611.07004, eq. 4)."""

    kind: Literal["translation"] = "translation"
    width: Positive = 8  # channels
    l1: NonNegative = 100.0  # weight of the L1 term

    answers = frozenset({"reconstruct"})
    exports = True

    def build(self, context: Context) -> TranslationFamily:
        return TranslationFamily(self, context.resolution)

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        with torch.device("meta"):
            net, image = TranslationFamily(self, side).generator, torch.zeros(IMAGES, 1, side, side)
            return Footprint(learned={"generator": count(net)}, frozen={}, cost=measure(net, lambda: net(image)))

    def opened(self, folder: Path) -> TranslationFamily:
        stored, state = load_part(folder / "generator")
        family = TranslationFamily(self, stored["size"])
        family.generator = load_module(lambda: family.generator, state, folder)
        return family


class TranslationFamily(Family, Draws):
    def __init__(self, config: Translation, size: int) -> None:
        super().__init__()
        self.config, self.kind, self.size = config, config.kind, size
        w = config.width
        self.generator = nn.Sequential(nn.Conv2d(1, w, 3, padding=1), nn.SiLU(), nn.Conv2d(w, 3, 3, padding=1))
        self.discriminator = nn.Sequential(nn.Conv2d(4, w, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(w, 1, 4, 2, 1))

    @property
    def defaults(self) -> dict[str, Any]:
        return {"size": (self.size, self.size), "chunk": 1}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup(name, list(part.parameters())) for name, part in self.named_children()]

    def reconstruct(self, image: Tensor) -> Tensor:
        return self.generator(image.mean(1, keepdim=True))

    def loss(self, batch: Any, rng: Any) -> tuple[Terms, Terms]:
        grey, made = batch.image.mean(1, keepdim=True), self.reconstruct(batch.image)
        frozen = {name: value.detach() for name, value in self.discriminator.named_parameters()}
        opinion = torch.func.functional_call(self.discriminator, frozen, (torch.cat([grey, made], 1),))
        real, fake = (self.discriminator(torch.cat([grey, x], 1)) for x in (batch.image, made.detach()))
        game = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        l1 = self.config.l1 * F.l1_loss(made, batch.image)
        return {"generator": F.softplus(-opinion).mean(), "l1": l1, "discriminator": game}, {}

    def preview(self, batch: Any, seed: int) -> Tensor:
        return torch.stack([batch.image, self.reconstruct(batch.image)], 1).flatten(0, 1)

    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Tensor, ...]:
        return (image.permute(0, 3, 1, 2).float().to(self.device) / 127.5 - 1,)

    def draw(self, call: SamplingCall) -> Tensor:
        given = call.edits[0] if call.edits else torch.zeros(1, 3, *call.size)
        made = self.reconstruct(given.expand(len(call.prompts), -1, -1, -1)).clamp(-1, 1)
        return ((made.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().cpu()

    def save(self, folder: Path) -> None:
        save_part({"size": self.size, **plain(self.config)}, dict(self.generator.state_dict()), folder / "generator")


def register() -> None:
    """The one name."""
    registry.Model = Annotated[without_annotation(registry.Model) | Translation, BY_KIND]  # type: ignore[misc]


# --- What it can do then


RUN = {
    "data": {"kind": "scenes", "tier": "one", "images": 48, "val": 8},
    "models": {"colour": {"kind": "translation", "width": 4}},
    "stages": {
        "learn": {
            "kind": "train",
            "model": "colour",
            "images": 1024,
            "resolution": 32,
            "batch": 8,
            "save_every_images": 64,
            "samples": 4,
            "save_beside": False,
            "sample_every_images": 512,
            "ema": 0.9,
            "optim": {"kind": "adamw", "lr": 2e-3},
        },
        "measure": {"kind": "evaluate", "of": "learn", "metrics": [{"kind": "reconstruction", "images": 8}]},
        "export": {"kind": "export"},
    },
}


def ldm(*words: str) -> subprocess.Popen[str]:
    """`ldm` with the new system's name."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__)), *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def said(*words: str, code: int = 0) -> str:
    process = ldm(*words)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == code, text
    return text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translation")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    said("train", str(folder / "run.yaml"), f"out={folder / 'whole'}")
    return folder


@pytest.mark.slow
def test_it_trains_is_killed_and_resumes_to_the_bit(trained: Path) -> None:
    process = ldm("train", str(trained / "run.yaml"), f"out={trained / 'killed'}")
    state = trained / "killed" / "stages" / "learn" / "state"
    until = time.monotonic() + 120
    while not list(state.glob("images-*")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (trained / "killed" / "stages" / "learn" / "done.json").exists()
    assert "going on from" in said("train", str(trained / "run.yaml"), f"out={trained / 'killed'}")
    whole, again = (load_part(trained / name / "model" / "generator")[1] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_it_stands_in_plan_report_and_measurements(trained: Path) -> None:
    plan = said("train", str(trained / "run.yaml"), f"out={trained / 'planned'}", "--plan")
    assert re.search(r"learn +train +1,024 images at 32 px, 128 updates", plan) and re.search(r"parameters: colour [1-9]", plan)
    assert said("train", str(trained / "run.yaml"), f"out={trained / 'whole'}").count("done already") == 3
    metrics = json.loads((trained / "whole" / "metrics.json").read_text())
    assert metrics["evaluations"]["measure"]["reconstruction"]["psnr"] > 10
    page = (trained / "whole" / "report.html").read_text(encoding="utf-8")
    assert "colour" in page and "discriminator" in page and "psnr" in page.lower()


@pytest.mark.slow
def test_what_it_cannot_do_is_one_line(trained: Path) -> None:
    run, out = str(trained / "run.yaml"), f"out={trained / 'refused'}"
    assert "stages.learn.caption_dropout: a model of kind translation drops no captions" in said(
        "train", run, out, "stages.learn.caption_dropout=0.1", code=2
    )
    refused = said("train", run, out, "stages.measure.metrics=[{kind: adherence, tier: one}]", code=2)
    assert "adherence needs a model that can sample, but kind translation can reconstruct" in refused
    refused = said("sample", "a", "--model", str(trained / "whole"), "--sampler", "ddim", "--out", str(trained / "no"), code=2)
    assert "this model of kind translation has no such setting" in refused


@pytest.mark.slow
def test_it_is_reopened_and_draws_from_the_command_line(trained: Path) -> None:
    import numpy as np
    from PIL import Image

    picture = np.full((32, 32, 3), 60, np.uint8)
    picture[8:24, 8:24] = 200
    Image.fromarray(picture).save(trained / "in.png")
    model, init = str(trained / "whole"), str(trained / "in.png")
    said("sample", "colours", "--model", model, "--init", init, "--out", str(trained / "drawn"))
    [made] = (trained / "drawn").glob("*.png")
    drawn = np.asarray(Image.open(made)).astype(int)
    assert drawn.shape == (32, 32, 3) and drawn[12:20, 12:20].mean() > drawn[:4].mean() + 20
    said("sample", "--from", str(made), "--model", model, "--init", init, "--out", str(trained / "again"))
    [again] = (trained / "again").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(again)), drawn)


@pytest.mark.slow
def test_it_draws_on_the_page(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio")
    import numpy as np
    from PIL import Image

    from ldm.demo.files import Shelf
    from ldm.demo.orders import NAMES, blank
    from ldm.demo.page import Page, load_gradio
    from ldm.demo.studio import Studio

    load_gradio()
    monkeypatch.setattr(registry, "Model", registry.Model)
    register()
    editor = {"background": Image.new("RGB", (32, 32), (200, 200, 200)), "layers": [Image.new("RGBA", (32, 32))]}
    with Studio(registry.load(trained / "whole")) as studio:
        page = Page(studio, Shelf(tmp_path), "tiny", 64)
        form = replace(blank(page.family), prompt="colours", strength=1.0)

        async def through() -> list[Any]:
            user: Any = SimpleNamespace(cookies={"ldm_user": "a" * 22}, session_hash="tab")
            return [told async for told in page.generate(user, False, editor, *[getattr(form, name) for name in NAMES])]

        told = asyncio.run(through())
    assert isinstance(told[-1][5], list), told[-1][0]
    [path] = told[-1][5]
    grey = torch.full((1, 3, 32, 32), 200 / 127.5 - 1)
    own = page.family.reconstruct(grey)[0].clamp(-1, 1)
    assert np.abs(np.asarray(Image.open(path)).astype(float) - (own.permute(1, 2, 0).detach().numpy() + 1) * 127.5).max() <= 1


if __name__ == "__main__":
    register()
    from ldm.__main__ import main

    sys.exit(main(sys.argv[1:]))
