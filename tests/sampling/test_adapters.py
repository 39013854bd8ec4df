"""LoRAs and new words at drawing: what pictures remember, what rebuilds them, and what is refused."""

from __future__ import annotations

import html
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import pipeline_folder

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.latent_diffusion.family import load
from ldm.formats.embedding_files import write_embedding
from ldm.formats.lora_files import write
from ldm.models.lora import Lora, Pair
from ldm.sampling.adapters import add, scaled, weighted
from ldm.sampling.picture_texts import read_chunks
from ldm.sampling.recipe import Recipe, read_recipe
from ldm.sampling.request import Adapters, Device
from ldm.sampling.webui_text import read_parameters


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion written by diffusers; read only."""
    return pipeline_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a LoRA in one.safetensors, another in two.safetensors, and a word in words/."""
    monkeypatch.chdir(tmp_path)
    family = load(base)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        layers = [n for n, _ in family.denoiser.named_modules() if n.endswith("to_k")]
        pairs = {}
        for layer in layers:
            out, inner = family.denoiser.get_submodule(layer).weight.shape  # type: ignore[union-attr, misc]
            pairs[layer] = Pair(torch.randn(2, inner), torch.randn(out, 2), 2.0)
        write(Lora(pairs={"unet": pairs}), tmp_path / name, "kohya")[0].rename(tmp_path / f"{name}.safetensors")
    write_embedding(tmp_path / "words", "<thing>", [torch.randn(2, family.text.width)], {})
    return tmp_path


def draw(base: Path, *words: str) -> int:
    return main(["sample", *words, "--model", str(base), "--steps", "2", "--device", "cpu"])


def pixels(file: Path) -> Any:
    from ldm.sampling.picture_files import read_pixels

    return read_pixels(file)


def test_pictures_remember_and_are_rebuilt(base: Path, here: Path) -> None:
    asked = ["a <thing>", "--lora", "one.safetensors:0.5", "--lora", "two.safetensors", "--embedding", "words/thing.safetensors"]
    assert draw(base, *asked, "--out", "a") == 0
    file = here / "a" / "000000.png" if (here / "a" / "000000.png").exists() else next((here / "a").glob("*.png"))
    recipe = read_recipe(file)
    assert isinstance(recipe, Recipe)
    loras, [word] = json.loads(recipe.loras), json.loads(recipe.embeddings)
    assert [(one["file"], one["weight"], len(one["hash"])) for one in loras] == [("one.safetensors", 0.5, 64), ("two.safetensors", 1.0, 64)]
    assert word["token"] == "<thing>"
    said = read_chunks(file)["parameters"]
    assert f'Lora hashes: "one: {loras[0]["hash"][:12]}, two: {loras[1]["hash"][:12]}"' in said and "TI hashes" in said
    told = read_parameters(said)
    assert told is not None and told.fields["steps"] == 2 and [lost.option for lost in told.unfollowed] == ["lora", "lora", "embedding"]
    assert draw(base, "--from", str(file), "--out", "b") == 0
    assert (pixels(next((here / "b").glob("*.png"))) == pixels(file)).all()
    assert draw(base, "a <thing>", "--out", "c") == 0
    assert (pixels(next((here / "c").glob("*.png"))) != pixels(file)).any()


def test_a_lora_of_weight_zero_changes_nothing(base: Path, here: Path) -> None:
    family, plain = load(base), load(base)
    told: list[str] = []
    add(family, ["one.safetensors:0"], [], {}, told.append)
    assert len(told) == 1 and "one.safetensors has the weight 0, so it changes nothing" in told[0]
    assert all(torch.equal(a, b) for a, b in zip(family.denoiser.parameters(), plain.denoiser.parameters(), strict=True))


def test_what_a_recipe_had_must_be_there_unchanged(base: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(base, "red", "--lora", "one.safetensors", "--out", "a") == 0
    file = str(next((here / "a").glob("*.png")))
    again = ["--from", file, "--out", "b"]
    (here / "one.safetensors").rename(here / "moved.safetensors")
    assert draw(base, *again) == 2
    assert "one.safetensors (SHA-256 " in capsys.readouterr().err
    (here / "one.safetensors").write_bytes((here / "two.safetensors").read_bytes())
    assert draw(base, *again) == 2
    assert "is not the file that the picture was drawn with; give that one by --lora" in capsys.readouterr().err
    assert draw(base, *again, "--lora", "two.safetensors") == 0
    assert "drawn with other loras: it will differ" in capsys.readouterr().err
    assert draw(base, *again, "--lora", "moved.safetensors") == 0
    assert "will differ" not in capsys.readouterr().err
    again = ["grid", "--from", file, "--x", "steps=1,2", "--model", str(base), "--out", "g.png", "--device", "cpu"]
    assert main(again) == 2
    assert "is not the file that the picture was drawn with; give that one by --lora" in capsys.readouterr().err
    assert main([*again, "--lora", "moved.safetensors"]) == 0


def test_cells_of_a_table_are_the_pictures_of_each_weight(base: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--lora", "one.safetensors:0.5", "--lora", "two.safetensors", "--embedding", "words/thing.safetensors"]
    words = ["grid", "a <thing>", "--model", str(base), "--steps", "2", "--device", "cpu", "--out", "g.png", "--pictures", "cells"]
    assert main([*words, *given, "--x", "lora=0,1,0.5", "--y", "seed=3,4"]) == 0
    cells = sorted((here / "cells").glob("*.png"))
    for place, (first, second) in enumerate([("0", "0"), ("0.5", "1"), ("0.25", "0.5")]):
        asked = ["a <thing>", "--lora", f"one.safetensors:{first}", "--lora", f"two.safetensors:{second}", *given[4:]]
        assert draw(base, *asked, "--seed", "4", "--out", str(place)) == 0
        [alone] = (here / str(place)).glob("*.png")
        assert (pixels(alone) == pixels(cells[3 + place])).all() and read_recipe(alone) == read_recipe(cells[3 + place])
    assert (pixels(cells[3]) != pixels(cells[4])).any() and (pixels(cells[4]) != pixels(cells[5])).any()
    assert main(["grid", "a <thing>", "--model", str(base), "--device", "cpu", "--x", "lora=0,1", "--out", "h.png"]) == 2
    assert "lora: changes nothing without a LoRA; give one by --lora FILE" in capsys.readouterr().err


def test_films_are_drawn_with_them(base: Path, here: Path) -> None:
    given = ["--lora", "one.safetensors", "--embedding", "words/thing.safetensors"]
    words = ["animate", "a <thing>", "--to", "a ring", "--frames", "2", "--model", str(base), "--steps", "2", "--device", "cpu"]
    assert main([*words, *given, "--out", "film.webp", "--pictures", "frames"]) == 0
    assert draw(base, "a <thing>", *given, "--sampler", "ddim", "--out", "a") == 0
    first = sorted((here / "frames").glob("*.png"))[0]
    assert (pixels(first) == pixels(next((here / "a").glob("*.png")))).all()
    assert draw(base, "--from", str(first), "--out", "b") == 0
    assert (pixels(first) == pixels(next((here / "b").glob("*.png")))).all()


def test_the_page_draws_with_them(base: Path, here: Path) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio")
    from ldm.demo.orders import blank, fill_in, order_of_form
    from ldm.demo.server import Door, catalogue_of
    from ldm.demo.status import command
    from ldm.demo.studio import Studio

    adapters = Adapters(lora=("one.safetensors:0.5",), embedding=("words/thing.safetensors",))
    catalogue = catalogue_of(str(base), Door(), adapters, Device(device="cpu"))
    first = catalogue.opened(catalogue.chosen("", (), ""))
    family, added = first.family, first.added
    form = replace(blank(family), prompt="a <thing>", steps=2, seed=3)
    order = order_of_form(catalogue, form, 256)
    with Studio(family) as studio:
        [picture] = studio.result(studio.submit("ann", order))
    said = html.unescape(command(order.recipes, form).removeprefix('<pre class="ldm-code">').removesuffix("</pre>"))
    words = shlex.split(said)
    words[words.index("--model") + 1] = str(base)  # the page tells the model's name, not where it lies
    assert main([*words[1:], "--device", "cpu", "--out", "a"]) == 0
    [file] = (here / "a").glob("*.png")
    assert (pixels(file) == picture).all()
    found = read_recipe(file)
    assert fill_in(blank(family), found, catalogue, family.content_hash, 256, added)[1] == []
    [note] = fill_in(blank(family), found, catalogue, family.content_hash, 256)[1]
    assert note == "It was drawn with one 0.5, <thing>, and this page draws with others or none: the picture will differ."
    [note] = fill_in(blank(family), found, catalogue, family.content_hash, 256, {**added, "loras": scaled(added["loras"], 2)})[1]
    assert note.startswith("It was drawn with one 0.5, <thing>, and")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "absent.safetensors"], "no such file"),
        (["--lora", "one.safetensors:inf"], "FILE:WEIGHT"),
        (["--lora", "words/thing.safetensors"], "no weights of an adapter"),
        (["--lora", "foreign.safetensors"], "none of its 1 layer is in this model"),
        (["--embedding", "one.safetensors"], "an embedding's file has one"),
        (["--embedding", "words/thing.safetensors", "--embedding", "words/thing.safetensors"], "knows this word already"),
        (["--embedding", "wide.safetensors"], "made for another model"),
        (["--lora", "one.safetensors", "--low-memory"], "low_memory"),
    ],
)
def test_what_is_refused(base: Path, here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    pair = {"elsewhere.to_q": Pair(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)}
    write(Lora(pairs={"unet": pair}), here, "kohya")[0].rename(here / "foreign.safetensors")
    write_embedding(here, "wide", [torch.zeros(1, 7)], {})
    assert draw(base, "red", *words) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


@pytest.mark.parametrize(("word", "meant"), [("a", ("a", 1.0)), ("a:0.5", ("a", 0.5)), ("C:/a", ("C:/a", 1.0)), ("a:-1", ("a", -1.0))])
def test_files_and_weights(word: str, meant: tuple[str, float]) -> None:
    assert weighted(word) == meant


def test_a_weight_without_a_file() -> None:
    with pytest.raises(UserError, match="FILE:WEIGHT"):
        weighted(":2")


def test_a_lora_that_is_given_twice_is_told(base: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(base, "red", "--lora", "one.safetensors:0.5", "--lora", "one.safetensors") == 0
    assert "lora: one.safetensors is given 2 times, so it is applied at 1.5" in capsys.readouterr().err
