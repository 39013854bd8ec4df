"""The verb that compares settings: its cells are the pictures that `ldm sample` draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from finished_model import SIDE
from PIL import Image

from ldm.__main__ import main
from ldm.sampling.recipe import Recipe, read_recipe


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def cell(sheet: np.ndarray, picture: np.ndarray) -> list[tuple[int, int]]:
    """Where in a sheet a picture stands."""
    height, width = picture.shape[:2]
    rows = range(sheet.shape[0] - height + 1)
    return [(i, j) for i in rows for j in range(sheet.shape[1] - width + 1) if (sheet[i : i + height, j : j + width] == picture).all()]


def test_each_cell_is_samples_picture(kl_model: Path, tmp_path: Path) -> None:
    model = ["--model", str(kl_model)]
    words = ["grid", "a red circle", *model, "--x", "guidance=1,3", "--y", "sampler=ddim,euler_a", "--steps", "3", "--seed", "5"]
    assert main([*words, "--out", str(tmp_path / "g.png"), "--pictures", str(tmp_path / "cells")]) == 0
    sheet, places = pixels(tmp_path / "g.png"), []
    saved = sorted((tmp_path / "cells").glob("*.png"))
    for i, (sampler, guidance) in enumerate([("ddim", "1"), ("ddim", "3"), ("euler_a", "1"), ("euler_a", "3")]):
        out = tmp_path / str(i)
        alone = ["a red circle", *model, "--guidance", guidance, "--sampler", sampler, "--steps", "3", "--seed", "5"]
        assert main(["sample", *alone, "--out", str(out)]) == 0
        (found,) = cell(sheet, pixels(out / "00000_seed5.png"))
        places.append(found)
        assert np.array_equal(pixels(saved[i]), pixels(out / "00000_seed5.png"))
        assert read_recipe(saved[i]) == read_recipe(out / "00000_seed5.png")
    (a, b, c, d) = places
    assert a[0] == b[0] < c[0] == d[0] and a[1] == c[1] < b[1] == d[1]
    assert (sheet[: a[0]] != 255).any() and (sheet[:, : a[1]] != 255).any()  # labels


def test_strength_is_an_axis_and_z_stacks_tables(kl_model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tmp_path / "init.png")
    words = ["grid", "a red circle", "--model", str(kl_model), "--init", str(tmp_path / "init.png"), "--steps", "4"]
    axes = ["--x", "strength=0.25,0.75", "--z", "prompt=red,blue"]
    assert main([*words, *axes, "--out", str(tmp_path / "g.png"), "--pictures", str(tmp_path / "c")]) == 0
    out = tmp_path / "alone"
    alone = ["sample", "a blue circle", "--model", str(kl_model), "--init", str(tmp_path / "init.png"), "--steps", "4"]
    assert main([*alone, "--strength", "0.75", "--out", str(out)]) == 0
    assert np.array_equal(pixels(out / "00000_seed0.png"), pixels(sorted((tmp_path / "c").glob("*.png"))[3]))
    again = ["grid", "--model", str(kl_model), "--from", str(out / "00000_seed0.png"), "--x", "steps=1,2", "--out", str(tmp_path / "h.png")]
    assert main(again) == 2  # drawn out of a picture
    assert main([*again, "--init", str(tmp_path / "init.png")]) == 0
    made = read_recipe(tmp_path / "h.png")
    assert isinstance(made, Recipe) and made.strength == 0.75 and made.prompt == "a blue circle"


@pytest.mark.parametrize(
    "edit",
    [["--invert", "init.png", "--source", "a ring"], ["--init", "init.png", "--outpaint", "right=8"], ["--size", "64", "--hires", "2"]],
)
def test_cells_are_edited_as_pictures_are(kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save("init.png")
    words = ["a red circle", "--model", str(kl_model), *edit]
    assert main(["grid", *words, "--x", "steps=2,3", "--pictures", "cells"]) == 0
    assert main(["sample", *words, "--steps", "3", "--out", "alone"]) == 0
    assert np.array_equal(pixels(tmp_path / "alone" / "00000_seed0.png"), pixels(sorted((tmp_path / "cells").glob("*.png"))[1]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], "x: what changes from picture to picture?"),
        (["--x", "steps=1,2"], "prompt: what to draw?"),
        (["a", "--x", "strength=0.5,1"], "strength: changes nothing without a picture to start from"),
        (["a", "--x", "steps=1,2", "--out", "there.png"], "out: there.png is there already"),
        (["a", "--x", "steps=1,2", "--sampler", "eulr"], "sampler: got 'eulr'"),
        (["a", "--x", "steps=1,2", "--model", "/no/such"], "/no/such: no such folder"),
        (["a", "--x", "spacing=lcm,karras", "--steps", "60"], "lcm's spacing has 1 to 50"),
    ],
)
def test_mistakes_are_one_line(
    kl_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.png").touch()
    assert main(["grid", *(["--model", str(kl_model)] if "--model" not in words else []), *words]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said
