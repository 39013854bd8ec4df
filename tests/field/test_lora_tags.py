"""Users' case: <lora:name:0.8> in prompts is the file in --lora-dir, and without one it is told and no words of the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import pipeline_folder

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.latent_diffusion.family import load
from ldm.formats.lora_files import write
from ldm.models.lora import Lora, Pair
from ldm.sampling.picture_files import read_pixels
from ldm.sampling.prompt_tags import Tag, parted
from ldm.sampling.recipe import Recipe, read_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion with two LoRAs in loras/ beside it."""
    folder = pipeline_folder(tmp_path_factory.mktemp("base"))
    family = load(folder)
    for seed, name in enumerate(("one", "more/two")):
        torch.manual_seed(seed)
        pairs = {}
        for layer in [n for n, _ in family.denoiser.named_modules() if n.endswith("to_k")]:
            out, inner = family.denoiser.get_submodule(layer).weight.shape  # type: ignore[union-attr, misc]
            pairs[layer] = Pair(torch.randn(2, inner), torch.randn(out, 2), 2.0)
        (file,) = write(Lora(pairs={"unet": pairs}), folder.parent / "loras", "kohya")
        (folder.parent / "loras" / name).parent.mkdir(exist_ok=True)
        file.rename(folder.parent / "loras" / f"{name}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").symlink_to(base.parent / "loras")


def draw(base: Path, *words: str, verb: str = "sample") -> int:
    return main([verb, *words, "--model", str(base), "--steps", "2", "--device", "cpu"])


def drawn(folder: str) -> list[tuple[Any, Recipe]]:
    return [(read_pixels(path), read_recipe(path)) for path in sorted(Path(folder).glob("*.png"))]  # type: ignore[misc]


@pytest.mark.slow
def test_prompts_draw_with_what_their_tags_name(base: Path) -> None:
    Path("prompts.txt").write_text("a red circle <lora:one:0.5>\na red circle\n<lora:two>a red circle <lora:one:-1>\n")
    assert draw(base, "--prompts", "prompts.txt", "--lora-dir", "loras", "--out", "tags") == 0
    given = (["loras/one.safetensors:0.5"], [], ["loras/more/two.safetensors:1", "loras/one.safetensors:-1"])
    for i, (loras, (pixels, recipe)) in enumerate(zip(given, drawn("tags"), strict=True)):
        assert draw(base, "a red circle", *(word for lora in loras for word in ("--lora", lora)), "--out", str(i)) == 0
        [(alone, told)] = drawn(str(i))
        assert (pixels == alone).all() and recipe == told and recipe.prompt == "a red circle"
        assert [one["weight"] for one in json.loads(told.loras or "[]")] == [float(word.rpartition(":")[2]) for word in loras]
    assert draw(base, "--from", str(min(Path("tags").glob("*.png"))), "--out", "again") == 0
    assert (drawn("again")[0][0] == drawn("tags")[0][0]).all()
    assert (drawn("0")[0][0] != drawn("1")[0][0]).any() and (drawn("0")[0][0] != drawn("2")[0][0]).any()


@pytest.mark.slow
def test_without_a_folder_tags_are_told_and_no_words(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(base, "a red circle <lora:one:0.5>", "--negative", "blue", "--out", "a") == 0
    assert "prompt: <lora:one:0.5> is left out; give --lora-dir DIR, or the file by --lora FILE:0.5" in capsys.readouterr().err
    assert draw(base, "a red circle", "--negative", "blue", "--out", "b") == 0
    assert (drawn("a")[0][0] == drawn("b")[0][0]).all() and drawn("a")[0][1] == drawn("b")[0][1]
    assert draw(base, "a red circle <lora:one:0.5>", "--lora", "loras/one.safetensors:0.5", "--out", "c") == 0
    assert "left out" not in capsys.readouterr().err
    assert draw(base, "a red circle <lora:one:0.5>", "--literal", "--out", "d") == 0
    assert "left out" not in capsys.readouterr().err and drawn("d")[0][1].prompt.endswith("<lora:one:0.5>")


@pytest.mark.slow
def test_tables_and_films_draw_with_them_too(base: Path) -> None:
    tag = "a red circle <lora:one:0.5>"
    assert draw(base, tag, "--x", "seed=0,1", "--lora-dir", "loras", "--out", "g.png", "--pictures", "cells", verb="grid") == 0
    words = [tag, "--to-seed", "1", "--frames", "2", "--lora-dir", "loras", "--out", "f.webp", "--pictures", "frames", "--sampler", "euler"]
    assert draw(base, *words, verb="animate") == 0
    assert draw(base, "a red circle", "--lora", "loras/one.safetensors:0.5", "--out", "a") == 0
    assert draw(base, "a red circle", "--lora", "loras/one.safetensors:0.5", "--out", "b", "--sampler", "euler") == 0
    assert (drawn("cells")[0][0] == drawn("a")[0][0]).all() and (drawn("frames")[0][0] == drawn("b")[0][0]).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["red <lora:onne:1>", "--lora-dir", "loras"], "no onne.safetensors in loras; is one meant?"),
        (["red <lora:ONE:1>", "--lora-dir", "loras"], "no ONE.safetensors in loras; is one meant?"),
        (["red <lora:one.safetensors:1>", "--lora-dir", "loras"], "is one meant?"),
        (["red <lora:../one:1>", "--lora-dir", "loras"], "no ../one.safetensors in loras"),
        (["red <lora:one:much>", "--lora-dir", "loras"], "one weight of the whole LoRA"),
        (["red <lora:one:te=1:unet=0.5>", "--lora-dir", "loras"], "one weight of the whole LoRA"),
        (["red", "--lora-dir", "loras"], "no prompt names a LoRA"),
        (["red <lora:one:1>", "--lora-dir", "nowhere"], "nowhere is not a folder"),
        (["red <lora:one:1>", "--lora-dir", "loras", "--low-memory"], "low_memory: not together with --lora-dir"),
    ],
)
def test_what_is_refused(base: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert draw(base, *words) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told


def test_tags_are_read_as_the_web_ui_reads_them() -> None:
    assert parted("a <lora:x:0.8>, b<lyco:y:te=0.5:unet=.5>") == (
        "a , b",
        (Tag("<lora:x:0.8>", "lora", "x", 0.8), Tag("<lyco:y:te=0.5:unet=.5>", "lyco", "y", 0.5)),
    )
    assert parted("a < b and <thing>") == ("a < b and <thing>", ())
    assert parted("<lora:x>")[1][0].weight == 1.0
    with pytest.raises(UserError, match="one weight"):
        parted("<lora:x:nan>")
