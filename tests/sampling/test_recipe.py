"""What a picture remembers of how it was made."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm.config.errors import UserError
from ldm.sampling.foreign_recipe import ForeignRecipe
from ldm.sampling.recipe import Recipe, read_recipe, save_picture
from ldm.sampling.recipe_values import NAMES
from ldm.sampling.webui_text import read_parameters

RECIPE = Recipe(
    prompt="a red circle, 中 🙂\nsecond line",
    negative="blue: dark",
    seed=7,
    steps=30,
    guidance=5.0,
    rescale=0.5,
    sampler="dpmpp_2m",
    spacing="karras",
    eta=0.0,
    width=64,
    height=48,
    model="quick, start",
    model_hash="0123456789abcdef",
)
PIXELS = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)


def test_a_picture_comes_back_with_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "00000_seed7.png"
    save_picture(path, PIXELS, RECIPE)
    assert read_recipe(path) == RECIPE
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), PIXELS)
        assert json.loads(image.text["ldm"])["schema"] == 1  # type: ignore[attr-defined]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_text_for_other_programs_is_as_they_write_it() -> None:
    first, second, negative, last = RECIPE.parameters().split("\n")
    assert (first, second, negative) == ("a red circle, 中 🙂", "second line", "Negative prompt: blue: dark")
    assert last.startswith("Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.0, Seed: 7, Size: 64x48, ")
    assert 'Model hash: 0123456789, Model: "quick, start", Version: ldm ' in last
    assert "Negative" not in replace(RECIPE, negative="").parameters()


def told(text: str) -> dict[str, Any]:
    """The fields that a text for other programs tells."""
    found = read_parameters(text)
    return {} if found is None else dict(found.fields)


def known(recipe: Recipe) -> dict[str, object]:
    """What the text for other programs tells of a recipe."""
    keys = ["prompt", "negative", "steps", "guidance", "seed", "width", "height", "sampler", "model"]
    found = {key: asdict(recipe)[key] for key in keys + ["spacing"] * (recipe.spacing == "karras")}
    return found | {"model_hash": recipe.model_hash[:10]}


def test_our_text_reads_back() -> None:
    for sampler in NAMES:
        for spacing in ("karras", "trailing"):
            recipe = replace(RECIPE, sampler=sampler, spacing=spacing)
            assert told(recipe.parameters()) == known(recipe)


def test_what_others_write_is_read() -> None:
    text = (
        "a (red:1.3) circle, sharp\nNegative prompt: ugly,\nblurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b, "
        'Lora hashes: "x: 12, y: 34", Version: v1.10.1'
    )
    assert told(text) == {
        "prompt": "a (red:1.3) circle, sharp",
        "negative": "ugly,\nblurry",
        "steps": 20,
        "guidance": 7.0,
        "seed": 965400086,
        "width": 512,
        "height": 768,
        "sampler": "euler_a",
        "model_hash": "45dee52b",
    }
    assert told("x\nSteps: 20, Sampler: DPM++ 2M Karras, Seed: 1")["spacing"] == "karras"
    assert "sampler" not in told("x\nSteps: 20, Sampler: Restart, Seed: 1")
    assert "seed" not in told("x\nSteps: 20, Sampler: Restart, Seed: none")
    assert told("x\nSteps: 20, Sampler: Euler, Denoising strength: 0.4")["strength"] == 0.4
    assert told(replace(RECIPE, init="0" * 64, strength=0.4).parameters())["strength"] == 0.4
    assert told("a prompt: of two, colons: only") == {}
    assert told("") == {}


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text(), st.text(max_size=40))
def test_any_words_come_back(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str, model: str) -> None:
    path = tmp_path_factory.mktemp("any") / "x.png"
    recipe = replace(RECIPE, prompt=prompt, negative=negative, model=model)
    save_picture(path, PIXELS[:1, :1], recipe)
    assert read_recipe(path) == recipe


def test_halves_of_characters_become_question_marks(tmp_path: Path) -> None:
    save_picture(tmp_path / "x.png", PIXELS, replace(RECIPE, prompt="a \ud800 b"))
    assert read_recipe(tmp_path / "x.png").prompt == "a ? b"  # type: ignore[union-attr]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*paths: object) -> None:
            raise PermissionError(1, "no hard links here")

        monkeypatch.setattr("os.link", refuse)
    path = tmp_path / "x.png"
    save_picture(path, PIXELS, RECIPE)
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        save_picture(path, PIXELS[:2], RECIPE)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: object, path: Path, **named: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_picture(tmp_path / "x.png", PIXELS, RECIPE)
    assert not list(tmp_path.iterdir())


def with_chunks(path: Path, **chunks: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for name, text in chunks.items():
        info.add_itxt(name, text)
    Image.fromarray(PIXELS).save(path, pnginfo=info)
    return path


def test_pictures_of_other_programs_tell_what_they_can(tmp_path: Path) -> None:
    path = with_chunks(tmp_path / "x.png", parameters="a cat\nSteps: 5, CFG scale: 4, Seed: 3, Size: 64x64, Sampler: DDIM")
    found = read_recipe(path)
    assert isinstance(found, ForeignRecipe) and not found.unfollowed
    told = {"steps": 5, "guidance": 4.0, "seed": 3, "width": 64, "height": 64, "sampler": "ddim"}
    assert found.fields == {"prompt": "a cat", "negative": "", **told}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "cannot be read"),
        (json.dumps({**RECIPE.to_dict(), "seed": "7"}), "seed: '7' is no int"),
        (json.dumps({**RECIPE.to_dict(), "steps": True}), "steps: 'True' is no int"),
        (json.dumps({k: v for k, v in RECIPE.to_dict().items() if k != "rescale"}), "KeyError: 'rescale'"),
        (json.dumps({**RECIPE.to_dict(), "schema": 2, "version": "9"}), "written by ldm 9"),
    ],
)
def test_damaged_recipes_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_recipe(with_chunks(tmp_path / "x.png", ldm=text))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_whole_numbers_pass_for_real_ones(tmp_path: Path) -> None:
    text = json.dumps({**RECIPE.to_dict(), "guidance": 5})
    assert read_recipe(with_chunks(tmp_path / "x.png", ldm=text)) == RECIPE


def test_files_without_a_recipe_are_told(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "plain.png")
    Image.fromarray(PIXELS).save(tmp_path / "plain.jpg")
    (tmp_path / "text.png").write_text("no picture")
    for name, words in {
        "plain.png": "carries no recipe",
        "plain.jpg": "carries no recipe",
        "text.png": "not a picture",
        "none.png": "No such file",
    }.items():
        with pytest.raises(UserError, match=words):
            read_recipe(tmp_path / name)
