"""`ldm evaluate`: what it measures, prints and writes, and what it answers to mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from painters import SIDE, Painter
from PIL import Image

import ldm
import ldm.families.registry
from ldm.__main__ import main as ldm_main
from ldm.cli.evaluate import main
from ldm.data.scenes.source import ScenesSource
from ldm.metrics.evaluator import Adherence, Frechet, Reconstruction
from ldm.runs.evaluation import measure


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    """Stands in for the model, whatever folder is named."""
    found = Painter()
    monkeypatch.setattr(ldm.families.registry, "open_finished", lambda folder, device: found)
    return found


def test_results_are_named_by_kind_and_numbered_where_a_kind_comes_again():
    data = ScenesSource(tier="one", val=8).build("val")
    metrics = [Reconstruction(images=4), Frechet(images=4), Reconstruction(images=4, size=64), Reconstruction(images=2)]
    found = measure(Painter(), metrics, data=data, resolution=SIDE, seed=0, pictures=None, progress=lambda *line: None)
    assert list(found) == ["reconstruction", "frechet", "reconstruction_2", "reconstruction_3"]
    assert [found[name]["protocol"]["resolution"] for name in list(found) if name[0] == "r"] == [SIDE, 64, SIDE]


def test_the_verb_measures_everything_and_writes_it(painter, tmp_path, capsys):
    target = tmp_path / "new" / "result.json"
    words = ["MODEL", "--tier", "one", "--n", "12", "--images", "8", "--guidance", "1, 2.5", "--seed", "3", "--steps", "5"]
    painter.__init__(seed=3)
    assert main([*words, "--json", str(target), "--pictures", str(tmp_path / "shown")]) == 0
    found = json.loads(target.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(found) == ["model", "model_hash", "version", "on", "adherence", "reconstruction", "frechet", "frechet_2"]
    assert [found[name]["protocol"]["guidance"] for name in ("frechet", "frechet_2")] == [1, 2.5]
    assert (found["model"], found["model_hash"], found["version"], found["on"]) == ("MODEL", "hash", ldm.__version__, "scenes")
    assert found["adherence"]["seen"]["bind"] == found["adherence"]["held_out"]["bind"] == 1
    protocol = found["adherence"]["protocol"]
    assert (protocol["prompts"], protocol["guidance"], protocol["steps"], protocol["seed"]) == (6, [1, 2.5], 5, 3)
    assert found["reconstruction"]["protocol"] == {"images": 8, "resolution": SIDE} and found["frechet"]["protocol"]["images"] == 8
    assert math.isfinite(found["frechet"]["distance"])
    for path in (tmp_path / "shown").glob("*.png"):
        Image.open(path).load()
    said = capsys.readouterr()
    assert "1.000 [1.00, 1.00]" in said.out and "held-out" in said.out and "fréchet distance" in said.out
    assert "the checker on perfect pictures: bind 1.000 seen" in said.out and str(target) in said.err


def test_a_folder_of_images_is_measured_without_adherence(painter, tmp_path, capsys):
    images = ScenesSource(tier="one", val=40).build("val")
    batch = images.load(range(40), range(40), SIDE, 0, False)
    folder = tmp_path / "data"
    folder.mkdir()
    for i, (image, caption) in enumerate(zip(batch.image, batch.caption, strict=True)):
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
    assert main(["MODEL", "--on", str(folder), "--images", "4", "--guidance", "2", "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert "adherence" not in found and found["on"] == str(folder) and found["reconstruction"]["psnr"] == 100
    assert "bind" not in found["reconstruction"] and "checker" not in capsys.readouterr().out


def test_a_whole_model_is_measured(kl_model, tmp_path, capsys):
    words = [str(kl_model), "--tier", "one", "--n", "2", "--images", "4", "--steps", "2", "--guidance", "1,2", "--device", "cpu"]
    words += ["--abilities", "2"]
    for name in ("a.json", "b.json"):
        assert main([*words, "--json", str(tmp_path / name)]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["adherence"]["intervals"]) == {"1", "2"} and found["adherence"]["checker"] == {"seen": 1.0, "held_out": 1.0}
    assert found["abilities"]["protocol"]["prompts"] == 2 and found["abilities"]["protocol"]["guidance"] == 1
    assert {"mean", "object", "partial", "wording"} <= set(
        found["abilities"]
    ) and "abilities, 2 prompts each: mean" in capsys.readouterr().out
    assert found["adherence"]["protocol"]["size"] == SIDE and len(found["model_hash"]) == 64
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "model"),
        (["MODEL", "--tier", "T9"], "T9"),
        (["MODEL", "--guidance", "1,two"], "'1,two'"),
        (["MODEL", "--guidance", "-1"], "guidance"),
        (["MODEL", "--guidance", "nan"], "guidance"),
        (["MODEL", "--n", "1"], "--n"),
        (["MODEL", "--images", "3"], "--images"),
        (["MODEL", "--on", "nowhere/at/all"], "nowhere/at/all"),
        (["MODEL", "--sampler", "ddmi"], "ddmi"),
        (["MODEL", "--nonsense"], "--nonsense"),
        (["MODEL", "--features", "inception"], "inception has no config.json"),
        (["MODEL", "--features", "timm=x.safetensors"], "timm/MODEL=FILE"),
        (["MODEL", "--features", "inception=no.pth"], "no.pth is not here"),
        (["MODEL", "--clip", "no/clip"], "no CLIP here"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, said, kl_model, capsys):
    assert ldm_main(["evaluate", *(str(kl_model) if word == "MODEL" else word for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("ldm evaluate: ") and said in error and len(error.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_told_before_the_work(painter, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "result.json"):
        assert ldm_main(["evaluate", "MODEL", "--tier", "one", "--n", "2", "--images", "4", "--json", str(target)]) == 2
        assert str(target) in capsys.readouterr().err
    assert not painter.calls


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert ldm_main(["evaluate", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err


def test_adherence_of_a_measurement_is_what_the_configuration_says(tmp_path: Path):
    told: list = []
    found = measure(
        Painter(),
        [Adherence(tier="one", prompts=2)],
        data=None,
        resolution=SIDE,
        seed=0,
        pictures=tmp_path / "s",
        progress=lambda *line: told.append(line),
    )
    assert found["adherence"]["seen"]["bind"] == 1 and told[-1][:2] == (4, 4) and len(list((tmp_path / "s").glob("*.png"))) == 2
