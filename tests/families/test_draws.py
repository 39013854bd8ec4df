"""A family by a stranger, without text, latents or sampler, is drawn from by every verb."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ldm.families.registry
from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.demo.catalogue import Catalogue, Opened
from ldm.demo.orders import blank, order_of_form
from ldm.demo.studio import Studio
from ldm.diffusion.rng import Rng
from ldm.families.draws import NUMBERS, Draws, GuideTraining, SamplingCall, Settings, VideoEdit, Wanted
from ldm.families.family import Family, Terms
from ldm.sampling.recipe import Recipe, read_recipe
from ldm.text.prompt_syntax import literal

SIDE = 16


class Translation(Family, Draws):
    """A generator that turns one picture into another, in pixel space."""

    kind = "translation"
    content_hash = "hash of the generator"
    defaults = {"size": (SIDE, SIDE), "chunk": 4}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Conv2d(3, 3, 1)
        nn.init.eye_(self.generator.weight[:, :, 0, 0].data)
        nn.init.constant_(self.generator.bias, -0.5)

    def loss(self, batch: Any, rng: Rng) -> tuple[Terms, Terms]:
        """Nothing is learned here."""
        return {}, {}

    def save(self, folder: Path) -> None:
        """Nothing is kept."""

    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Tensor, ...]:
        """The picture that is translated."""
        return (image,)

    @torch.no_grad()
    def draw(self, call: SamplingCall) -> Tensor:
        """Translations of the picture that all begin with, or of grey."""
        height, width = call.size
        start = torch.cat(list(call.edits)) if call.edits else torch.full((1, height, width, 3), 128, dtype=torch.uint8)
        made = self.generator(start.permute(0, 3, 1, 2) / 127.5 - 1).clamp(-1, 1)
        return ((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1).expand(len(call.prompts), -1, -1, -1).clone()


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(ldm.families.registry, "open_finished", lambda folder, device="cpu", low_memory=False: Translation().eval())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ldm.json").write_text("{}")
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path


def expected(folder: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(folder / "in.png")).astype(np.float64) / 127.5 - 1
    return np.round((np.clip(pixels - 0.5, -1, 1) + 1) * 127.5)


def test_the_numbers_of_a_call_are_written_once() -> None:
    assert {f.name for f in fields(Wanted)} == {f.name for f in fields(Settings)} == set(NUMBERS) < {f.name for f in fields(Recipe)}


def test_it_is_sampled(stranger: Path) -> None:
    words = ["sample", "to winter", "--model", "model", "--device", "cpu"]
    assert main([*words, "--init", "in.png", "--out", "a"]) == 0
    (file,) = sorted(Path("a").glob("*.png"))
    assert np.abs(np.asarray(Image.open(file)).astype(float) - expected(stranger)).max() <= 1
    recipe = read_recipe(file)
    assert isinstance(recipe, Recipe) and (recipe.prompt, recipe.model_hash, recipe.steps) == ("to winter", "hash of the generator", 1)
    assert main([*words[:1], *words[2:], "--from", str(file), "--init", "in.png", "--out", "b"]) == 0
    assert np.array_equal(np.asarray(Image.open(next(Path("b").glob("*.png")))), np.asarray(Image.open(file)))


def test_it_stands_in_tables_and_on_the_page(stranger: Path) -> None:
    assert main(["grid", "p", "--model", "model", "--x", "seed=1,2", "--init", "in.png", "--device", "cpu", "--pictures", "cells"]) == 0
    assert Path("grid.png").exists() and len(list(Path("cells").glob("*.png"))) == 2
    family = Translation().eval()
    with Studio(family) as studio:
        catalogue = Catalogue(("model", str(Path("model").resolve())), lambda outfit: Opened(family, {}), runs=None)
        job = studio.submit("ann", order_of_form(catalogue, blank(family), 64, Path("in.png").read_bytes()))
        (drawn,) = studio.result(job)
    assert np.abs(drawn.astype(float) - expected(stranger)).max() <= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "3"], "steps: got 3: this model of kind translation has no such setting"),
        (["--variations", "2"], "variation: this model of kind translation has no noise to vary"),
        (["--save-steps"], "save_steps: this model of kind translation does not show its steps"),
        (["--hires", "2"], "hires: this model of kind translation draws no picture anew in part"),
        (["--low-memory"], "low_memory: this model of kind translation has no such choice"),
        (["--compile"], "compile: this model of kind translation has no network that torch.compile takes"),
        (["--classifier", "in.png"], "classifier: this model of kind translation is guided by none"),
    ],
)
def test_what_it_cannot_is_refused(stranger: Path, capsys: Any, words: list[str], said: str) -> None:
    assert main(["sample", "p", "--model", "model", "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err


def test_every_answer_by_default() -> None:
    family = Translation()
    image = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    edit = VideoEdit(prompt=literal(""), negative=literal(""), source=None, seed=0, strength=1.0, cells=1)
    for refused in (
        lambda: Draws.edits(family, image),
        lambda: family.inverted(image, literal(""), family.settings(), 1.0),
        lambda: family.noise([0], (SIDE, SIDE)),
        lambda: family.decode(torch.zeros(1, 4, 2, 2)),
        lambda: family.restyle(image, edit, family.settings(), print),
        lambda: family.adapt([(None, 1.0)], []),  # type: ignore[list-item]
        lambda: family.learn_guide(Path("cache"), GuideTraining(words=("a",), images=1, batch=1, rate=0.1, seed=0), print),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match="this model of kind translation"):
            refused()
    assert family.watch(lambda *told: None) == () and family.overlong(literal("p")) == "" and family.factor == 1
    family.adapt([], [])
