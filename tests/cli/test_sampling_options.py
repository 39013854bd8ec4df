"""What can be said to the verb that draws besides a prompt: notation, files with flags, seeds, intervals, two passes, going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import SIDE
from PIL import Image

from ldm.__main__ import main
from ldm.diffusion.samplers import Denoise
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.engine import Canvas, Edit
from ldm.families.latent_diffusion.family import load
from ldm.sampling import jobs
from ldm.sampling.prompt_files import Asked
from ldm.sampling.recipe import Recipe, read_recipe
from ldm.sampling.trajectory import Trajectory

DDIM = ["--steps", "4", "--sampler", "ddim"]


def draw(out: Path, *words: str) -> list[np.ndarray]:
    """The pictures of a successful call, in the order of their numbers."""
    assert main(["sample", *words, "--out", str(out)]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png")) if "_steps" not in path.name]


def recipe(folder: Path, number: int = 0) -> Recipe:
    found = read_recipe(sorted(folder.glob("*.png"))[number])
    assert isinstance(found, Recipe)
    return found


@pytest.fixture(scope="module")
def model(kl_model: Path) -> list[str]:
    return ["--model", str(kl_model), *DDIM]


def test_notation_and_literal_prompts(model: list[str], tmp_path: Path) -> None:
    plain = draw(tmp_path / "plain", *model, "a red circle")[0]
    assert np.array_equal(draw(tmp_path / "one", *model, "a (red:1.0) circle")[0], plain)
    strong = draw(tmp_path / "strong", *model, "a (red:9) circle")[0]
    as_it_stands = draw(tmp_path / "literal", *model, "a (red:9) circle", "--literal")[0]
    assert not np.array_equal(strong, plain) and not np.array_equal(strong, as_it_stands)
    assert recipe(tmp_path / "strong").notation and not recipe(tmp_path / "literal").notation
    # The recipe remembers which was meant.
    for name, wanted in (("strong", strong), ("literal", as_it_stands)):
        again = draw(tmp_path / f"again-{name}", *model, "--from", str(next((tmp_path / name).glob("*.png"))))[0]
        assert np.array_equal(again, wanted)


def test_a_file_of_prompts_with_their_own_settings(model: list[str], tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(
        'a red circle --d 5 --w 48 --h 32\n# a comment\na blue ring --n a ring --l 2.5 --s 3\n{"prompt": "a red circle", "seed": 5}\n'
    )
    found = draw(tmp_path / "out", *model, "--prompts", str(file))
    assert [image.shape[:2] for image in found] == [(32, 48), (SIDE, SIDE), (SIDE, SIDE)]
    second = recipe(tmp_path / "out", 1)
    assert (second.negative, second.guidance, second.steps, second.seed) == ("a ring", 2.5, 3, 0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000_seed5.png", "00001_seed0.png", "00002_seed5.png"]
    alone = draw(tmp_path / "alone", *model, "a red circle", "--seed", "5")[0]
    assert np.array_equal(found[2], alone)


def test_seeds_of_their_own(model: list[str], tmp_path: Path) -> None:
    found = draw(tmp_path / "a", *model, "a red circle", "--seeds", "9,2")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["00000_seed9.png", "00001_seed2.png"]
    assert np.array_equal(found[1], draw(tmp_path / "b", *model, "a red circle", "--seed", "2")[0])


def test_guidance_in_an_interval_and_on_a_curve(model: list[str], tmp_path: Path) -> None:
    words = [*model, "a red circle", "--guidance", "6"]
    whole = draw(tmp_path / "whole", *words)[0]
    assert np.array_equal(draw(tmp_path / "all", *words, "--guidance-interval", "0,1", "--guidance-curve", "constant")[0], whole)
    none = draw(tmp_path / "none", *model, "a red circle", "--guidance", "1")[0]
    assert np.array_equal(draw(tmp_path / "no", *words, "--guidance-interval", "0.01,0.02")[0], none)  # between two steps
    part = draw(tmp_path / "part", *words, "--guidance-interval", "0.25,0.75")[0]
    linear = draw(tmp_path / "linear", *words, "--guidance-curve", "linear")[0]
    assert len({image.tobytes() for image in (whole, none, part, linear)}) == 4
    assert recipe(tmp_path / "part").guidance_from == 0.25 and recipe(tmp_path / "linear").guidance_curve == "linear"
    again = draw(tmp_path / "again", *model, "--from", str(next((tmp_path / "part").glob("*.png"))))[0]
    assert np.array_equal(again, part)


def test_two_passes(model: list[str], tmp_path: Path) -> None:
    size = ["--size", "64x64"]
    (two,) = draw(tmp_path / "two", *model, "a red circle", *size, "--hires", "2", "--hires-strength", "0.5")
    assert two.shape == (64, 64, 3) and not np.array_equal(two, draw(tmp_path / "one", *model, "a red circle", *size)[0])
    # Without strength the second pass gives the autoencoder's picture of the enlarged first one.
    (still,) = draw(tmp_path / "still", *model, "a red circle", *size, "--hires", "2", "--hires-strength", "0")
    first = draw(tmp_path / "first", *model, "a red circle", "--size", "32x32")[0]
    Image.fromarray(first).resize((64, 64), Image.Resampling.LANCZOS).save(tmp_path / "large.png")
    (wanted,) = draw(tmp_path / "wanted", *model, "a red circle", *size, "--init", str(tmp_path / "large.png"), "--strength", "0")
    assert np.array_equal(still, wanted)
    (again,) = draw(tmp_path / "again", *model, "--from", str(next((tmp_path / "two").glob("*.png"))))
    assert np.array_equal(again, two)
    pair = draw(tmp_path / "pair", *model, "a blue ring", "a red circle", *size, "--hires", "2", "--hires-strength", "0.5")
    assert np.array_equal(pair[1], two)


def test_both_passes_are_edited_and_filmed(model: list[str], tmp_path: Path) -> None:
    family = load(model[1])
    rest = {"model": "m", "model_hash": "h", "hires": 2.0, "hires_strength": 0.5}
    (made,) = jobs.recipes(family, [Asked(prompt="a ring")], jobs.Common(seed=3, wanted=Wanted(steps=4), size=(64, 64), rest=rest))
    calls: list[tuple[int, int]] = []

    def guide(denoise: Denoise, canvas: Canvas) -> Denoise:
        def guided(x: torch.Tensor, i: int) -> torch.Tensor:
            calls.append((x.shape[-1], i))
            return denoise(x, i) + (0.5 if x.shape[-1] == 8 else 0)

        return guided

    plain = jobs.draw(family, [made], note=print)
    film = Trajectory()
    edited = jobs.draw(family, [made], edits=[Edit(guide=guide), *family.watch(film.see)], note=print)
    small, large = [call for call in calls if call[0] == 4], [call for call in calls if call[0] == 8]
    assert [i for _, i in small] == [0, 1, 2, 3] and [i for _, i in large] == [0, 1] and not torch.equal(plain, edited)
    assert film.strip(0, family.decode).shape == (64, 6 * 66 - 2, 3)
    filmed = jobs.draw(family, [made], edits=[*family.watch(Trajectory().see)], note=print)
    assert torch.equal(filmed, plain)


def test_the_steps_of_a_picture(model: list[str], tmp_path: Path) -> None:
    plain = draw(tmp_path / "plain", *model, "a red circle", "a blue ring", "a ring")
    watched = draw(tmp_path / "watched", *model, "a red circle", "a blue ring", "a ring", "--save-steps")
    assert all(np.array_equal(a, b) for a, b in zip(plain, watched, strict=True))
    strips = sorted((tmp_path / "watched").glob("*_steps.png"))
    assert [p.name for p in strips] == [f"0000{i}_seed0_steps.png" for i in range(3)]
    for strip, picture in zip(strips, plain, strict=True):
        frames = np.asarray(Image.open(strip))
        assert frames.shape == (SIDE, 4 * SIDE + 3 * 2, 3)
        # The last estimate is the picture, but for the last bits of a decoder that sees one at a time.
        assert np.abs(frames[:, -SIDE:].astype(int) - picture).max() <= 1


def test_going_on_makes_what_is_missing(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*model, "a red circle", "a blue ring", "--n", "2"]
    draw(tmp_path, *words)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "00001_seed1.png").unlink()
    capsys.readouterr()
    found = draw(tmp_path, *words, "--resume")
    assert "3 of 4 pictures are in" in capsys.readouterr().err and len(found) == 4
    assert (tmp_path / "00004_seed1.png").read_bytes() == files["00001_seed1.png"]
    draw(tmp_path, *words, "--resume")
    assert len(list(tmp_path.iterdir())) == 4
    draw(tmp_path, *words, "--resume", "--guidance", "2")
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seeds", "1,two"], "seeds: got '1,two'"),
        (["--seeds", "1", "--seed", "2"], "not together"),
        (["--guidance-interval", "0.5"], "two shares of the steps"),
        (["--guidance-interval", "0.8,0.2"], "guidance interval: got 0.8 to 0.2"),
        (["--guidance-curve", "steep"], "choose one of constant, linear, cosine"),
        (["--hires", "3"], "hires: 32x32 divided by 3 is not a multiple of 8 px"),
        (["--hires", "0.5"], "--hires"),
        (["--hires-strength", "0.5"], "no second pass"),
        (["--hires", "2", "--init", "x.PNG"], "not together with --init"),
    ],
)
def test_mistakes_are_one_line(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("x.PNG")
    assert main(["sample", *model, "a red circle", "--out", "pictures", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said and not list(tmp_path.rglob("*.png"))


def test_a_line_with_a_wrong_size_stops_before_any_work(model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.txt").write_text("a red circle\na blue ring --w 33\n")
    assert main(["sample", *model, "--prompts", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "33x32; both must be multiples of 8" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.png"))
