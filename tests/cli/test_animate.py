"""The verb that makes films."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from finished_model import SIDE
from PIL import Image, ImageSequence

from ldm.__main__ import main
from ldm.cli.animate import way
from ldm.families.draws import VideoEdit, Wanted
from ldm.families.latent_diffusion.edits import ROUNDS
from ldm.families.latent_diffusion.family import load
from ldm.sampling.animation import read_clip
from ldm.sampling.recipe import Recipe, read_recipe
from ldm.text.prompt_syntax import Prompt, literal


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def folder_of(path: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))]


@pytest.fixture(scope="module")
def words(kl_model: Path) -> list[str]:
    return ["--model", str(kl_model), "--steps", "3"]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    (tmp_path / "clip").mkdir()
    for i in range(5):
        values = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "clip" / f"{i}.png")
    return tmp_path / "clip"


@pytest.mark.parametrize("suffix", [".webp", ".png", ".gif"])
def test_from_one_prompt_and_seed_to_others(words: list[str], tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"film{suffix}"
    said = ["animate", "a red circle", "--to", "a blue ring", "--to-seed", "5", "--frames", "4", *words]
    assert main([*said, "--out", str(out), "--pictures", str(tmp_path / "p")]) == 0
    film, single = frames(out), folder_of(tmp_path / "p")
    assert len(film) == 4 and film[0].shape == (SIDE, SIDE, 3)
    if suffix != ".gif":
        assert all(np.array_equal(a, b) for a, b in zip(film, single, strict=True))
    ends = (["a red circle", "--seed", "0"], ["a blue ring", "--seed", "5"])
    for name, end, got in (("first", ends[0], single[0]), ("last", ends[1], single[3])):
        assert main(["sample", *end, *words, "--sampler", "ddim", "--out", str(tmp_path / name)]) == 0
        assert np.array_equal(folder_of(tmp_path / name)[0], got)
    told = read_recipe(out)
    assert isinstance(told, Recipe) and told.to == "a blue ring" and told.prompt == "a red circle"
    # A frame is a picture like any other.
    frame = sorted((tmp_path / "p").glob("*.png"))[2]
    assert main(["sample", "--from", str(frame), *words[:2], "--out", str(tmp_path / "again")]) == 0
    assert np.array_equal(folder_of(tmp_path / "again")[0], single[2])
    assert main([*said, "--out", str(out)]) == 2  # never replaced


def test_the_pace_is_even_and_a_loop_closes() -> None:
    base = Recipe(
        prompt="a",
        negative="",
        seed=0,
        steps=1,
        guidance=1.0,
        rescale=0.0,
        sampler="ddim",
        spacing="trailing",
        eta=0.0,
        width=32,
        height=32,
        model="m",
        model_hash="h",
    )
    assert [r.share for r in way(base, 5, "b", None)] == [0, 0.25, 0.5, 0.75, 1]
    assert [r.share for r in way(base, 4, "b", 7, loop=True)] == [0, 0.5, 1, 0.5]
    assert [r.variation for r in way(base, 3, "", 7)] == [0, 0.5, 1] and all(not r.to for r in way(base, 3, "", 7))


def test_a_clip_is_drawn_anew(words: list[str], clip: Path, kl_model: Path, tmp_path: Path) -> None:
    said = ["animate", "a red circle", "--clip", str(clip), *words]
    assert main([*said, "--strength", "0", "--out", str(tmp_path / "a.webp")]) == 0
    still = frames(tmp_path / "a.webp")
    assert len(still) == 5
    # Without strength it is what the autoencoder makes of frames side by side.
    assert main([*said, "--strength", "0.7", "--out", str(tmp_path / "b.webp")]) == 0
    moved = frames(tmp_path / "b.webp")
    assert all(not np.array_equal(a, b) for a, b in zip(still, moved, strict=True))
    # An animated file is a clip, too; each frame alone at cells 1.
    assert main(["animate", "a ring", "--clip", str(tmp_path / "a.webp"), "--cells", "1", *words, "--out", str(tmp_path / "c.gif")]) == 0
    assert main([*said, "--source", "a ring", "--out", str(tmp_path / "d.png")]) == 0
    told = read_recipe(tmp_path / "d.png")
    assert isinstance(told, Recipe) and told.invert and told.source == "a ring" and told.guidance == 1 and len(told.init) == 64
    assert read_clip(clip, (SIDE, SIDE))[1] == told.init


@pytest.mark.parametrize("source", [None, literal("a ring")])
def test_a_clip_says_how_far_it_is(kl_model: Path, source: Prompt | None) -> None:
    family = load(kl_model)
    clip = VideoEdit(prompt=literal("a"), negative=literal(""), source=source, seed=0, strength=1.0, cells=1)
    told: list[tuple[int, int]] = []
    frames = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    family.restyle(frames, clip, family.settings(Wanted(steps=3, guidance=1.0, sampler="ddim")), print, lambda *far: told.append(far))
    all_steps = 3 if source is None else 3 * (ROUNDS + 1)
    assert told == [(done, all_steps) for done in range(1, all_steps + 1)]


def test_joined_prompts_need_as_many_parts(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["animate", "a ring AND a circle", *words, "--frames", "2", "--out", str(tmp_path / "f.webp")]
    assert main([*said, "--to", "a blue ring"]) == 2
    assert "the prompts have 2 and 1 parts joined by AND" in capsys.readouterr().err
    assert main([*said, "--to", "a blue ring AND a square"]) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], "to: where does the film go?"),
        (["--to", "b", "--clip", "empty"], "clip: not together with --to"),
        (["--clip", "none"], "clip: none: No such file"),
        (["--clip", "empty"], "clip: empty: no pictures in it"),
        (["--clip", "text.png"], "clip: text.png:"),
        (["--to", "b", "--strength", "0.5"], "strength: changes nothing without --clip"),
        (["--to", "b", "--out", "film.mp4"], "ends in .mp4; films are written as .webp"),
        (["--to", "b", "--sampler", "eulr"], "sampler: got 'eulr'"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    assert main(["animate", "a", *words, *said]) == 2
    told = capsys.readouterr().err.strip()
    assert expected in told and "\n" not in told and not list(tmp_path.glob("film*"))
