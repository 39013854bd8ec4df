"""configs/tokens.yaml at a size of seconds: it trains, draws, paints into a picture, is replayed, and says in a line what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.tokens.family import TokensFamily

ROOT = Path(__file__).parents[2]
WORDS = [
    *("data.images=48", "data.val=8", "models.text.vocabulary=600", "models.text.text.width=16"),
    *("models.autoencoder.network.channels=[8,8,8,8]", "models.autoencoder.network.codes=16"),
    *("models.tokens.network.width=16", "models.tokens.network.layers=1", "models.tokens.defaults.steps=3"),
    *("stages.text.images=64", "stages.text.batch=16", "stages.autoencoder.images=64", "stages.autoencoder-gate.on_miss=warn"),
    *("stages.autoencoder-gate.metrics=[{kind: reconstruction, images: 4}]", "stages.tokens.images=64", "stages.tokens.batch=16"),
    *("stages.tokens.samples=2", "stages.tokens.sample_every_images=32"),
    "stages.evaluation.metrics=[{kind: adherence, tier: one, prompts: 2}]",
]
CANNOT = {  # what is asked for, and why not
    "sample red --sampler ddim": "sampler: got 'ddim': this model of kind tokens draws codes and has no such setting",
    "sample red --invert INIT": "invert: this model of kind tokens does not go back from a picture to its noise",
    "sample red --variations 2": "variation: this model of kind tokens has no noise to vary",
    "animate red --to blue --frames 2": "prompt: this model of kind tokens reads neither AND nor words that change",
    "grid red --x sampler=ddim,euler": "sampler: got 'ddim': this model of kind tokens",
}


def picture(folder: Path) -> np.ndarray:
    [path] = folder.glob("*.png")
    return np.asarray(Image.open(path))


@pytest.mark.slow
def test_the_run_draws_paints_and_replays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", "configs/tokens.yaml", *WORDS, f"out={run}"]) == 0
    assert {"seen", "held_out"} <= json.loads((run / "metrics.json").read_text())["evaluations"]["evaluation"]["adherence"].keys()

    def draw(name: str, *words: str) -> np.ndarray:
        assert main(["sample", *words, "--model", str(run), "--out", str(tmp_path / name)]) == 0
        return picture(tmp_path / name)

    first = draw("first", "a red circle", "--temperature", "0.8", "--top-k", "5")
    [path] = (tmp_path / "first").glob("*.png")
    assert np.array_equal(draw("again", "--from", str(path)), first)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    painted = draw("painted", "a blue ring", "--init", str(path), "--mask", str(tmp_path / "mask.png"))
    assert np.array_equal(painted[mask == 0], first[mask == 0])
    for words, said in CANNOT.items():
        capsys.readouterr()
        out = tmp_path / ("film.png" if words.startswith("animate") else "grid.png" if words.startswith("grid") else "none")
        assert main([*words.replace("INIT", str(path)).split(), "--model", str(run), "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_second_transformer_enlarges_what_the_first_one_drew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, stopped, few = tmp_path / "run", tmp_path / "stopped", "stages.{}.metrics=[{{kind: adherence, tier: one, prompts: 2}}]"
    small = [word for word in WORDS if not word.startswith("stages.evaluation")]
    small += ["models.fine.network.channels=[8,8,8,8]", "models.fine.network.codes=20", "stages.fine.images=32", "stages.larger.images=48"]
    small += [
        "models.larger.network.width=16",
        "models.larger.network.layers=1",
        "models.larger.defaults.steps=3",
        "stages.larger.batch=16",
    ]
    small += ["stages.larger.samples=2", "stages.larger.sample_every_images=32", "stages.larger.save_every_images=16"]
    words = ["train", "configs/muse.yaml", *small, few.format("evaluation"), few.format("evaluation-larger")]
    assert main([*words, f"out={run}"]) == 0
    with monkeypatch.context() as patched:
        own = TokensFamily.loss

        def ends(self: Any, batch: Any, rng: Any) -> Any:
            if self.config.enlarges and int(batch.position.max()) >= 32:
                raise UserError("stopped here")
            return own(self, batch, rng)

        patched.setattr(TokensFamily, "loss", ends)
        assert main([*words, f"out={stopped}"]) == 2
    capsys.readouterr()
    assert main([*words, f"out={stopped}"]) == 0
    assert "going on from" in capsys.readouterr().err
    product = Path("stages/larger/model/manifest.json")
    assert (run / product).read_bytes() == (stopped / product).read_bytes()
    found = json.loads((run / "metrics.json").read_text())["evaluations"]
    assert found["evaluation"]["adherence"]["protocol"]["size"] == 32 and found["evaluation-larger"]["adherence"]["protocol"]["size"] == 64

    def draw(name: str, *words: str) -> np.ndarray:
        assert main(["sample", "a cyan square", *words, "--model", str(run), "--out", str(tmp_path / name)]) == 0
        return picture(tmp_path / name)

    assert draw("small", "--stop-after", "1").shape == (32, 32, 3)
    whole = draw("whole")
    [path], [large] = (tmp_path / "small").glob("*.png"), (tmp_path / "whole").glob("*.png")
    assert whole.shape == (64, 64, 3) and np.array_equal(draw("given", "--given", f"small:2={path}"), whole)  # the same picture, told
    assert np.array_equal(draw("again", "--from", str(large)), whole)
    assert main(["grid", "a cyan square", "--x", "steps=2,3", "--model", str(run), "--out", str(tmp_path / "grid.png")]) == 0


@pytest.mark.slow
def test_pictures_are_completed_without_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = str(tmp_path / "run"), ["data.images=48", "data.val=16"]
    small = ["models.pixels.network.width=16", "models.pixels.network.layers=1", "stages.pixels.images=32", "stages.pixels.samples=2"]
    few = "stages.evaluation.metrics=[{kind: completion, images: 16}]"
    assert main(["train", "configs/image-gpt.yaml", *data, *small, few, "stages.autoencoder.images=64", f"out={run}"]) == 0
    assert 'sample.py "" --model' in capsys.readouterr().err
    found = json.loads((Path(run) / "metrics.json").read_text())["evaluations"]["evaluation"]["completion"]
    assert 0 <= found["bind"] <= 1 and found["protocol"]["told"] < 16
    assert main(["sample", "", "--model", run, "--out", str(tmp_path / "first")]) == 0
    assert "an empty prompt" not in capsys.readouterr().err
    [path] = (tmp_path / "first").glob("*.png")
    first, mask = picture(tmp_path / "first"), np.zeros((16, 16), np.uint8)
    mask[8:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ["sample", "", "--init", str(path), "--mask", str(tmp_path / "mask.png"), "--seed", "5", "--model", run]
    assert main([*words, "--out", str(tmp_path / "low")]) == 0
    made = picture(tmp_path / "low")
    assert np.array_equal(made[:8], first[:8]) and not np.array_equal(made[8:], first[8:])
    capsys.readouterr()
    assert main(["sample", "a red square", "--model", run, "--guidance", "3"]) == 2
    assert "guidance: got 3: this model of kind tokens reads no prompt that could guide; leave it out" in capsys.readouterr().err
    assert main(["sample", "a red square", "--model", run, "--out", str(tmp_path / "words")]) == 0
    assert "prompt: this model of kind tokens reads none, so its words change nothing" in capsys.readouterr().err


WRITERS = {  # by configuration: words that make it small, and what the finished model does
    "captioner": ["models.captioner.network.width=16", "models.captioner.network.layers=1", "stages.captioner.images=64"],
    "captions": ["models.captions.network.width=16", "models.captions.network.layers=1", "stages.captions.images=64"],
    "text2scene": ["models.scene.network.width=16", "models.scene.network.layers=1", "stages.scene.images=64", "stages.scene.samples=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_captions_and_scenes_trains_and_writes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"text2scene": "scene"}.get(name, name)
    small = ["data.images=48", "data.val=8", "models.text.vocabulary=600", "stages.text.images=32", "stages.text.batch=16"]
    few = {
        "captioner": "captions, images: 4",
        "captions": "language, captions: 4",
        "text2scene": "layout, tier: T1, prompts: 2}, {kind: adherence, tier: T1, prompts: 2",
    }[name]
    small += [*WRITERS[name], f"stages.{model}.batch=16", f"stages.evaluation.metrics=[{{kind: {few}}}]"]
    assert main(["train", f"configs/{name}.yaml", *small, f"out={tmp_path / 'whole'}"]) == 0
    assert ("ldm caption" in capsys.readouterr().err) == (name != "text2scene")
    run = str(tmp_path / "whole")
    if name == "text2scene":
        assert main(["sample", "a red square", "--model", run, "--out", str(tmp_path / "out"), "--size", "64x64"]) == 0
        assert picture(tmp_path / "out").shape == (64, 64, 3)
        assert main(["sample", "a red square", "--model", run, "--sampler", "ddim"]) == 2
        assert "sampler: got 'ddim': this model of kind tokens draws codes and has no such setting" in capsys.readouterr().err
        return
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "x.png")
    words = ["--count", "3"] if name == "captions" else [str(tmp_path / "x.png"), "--dry-run"]
    assert main(["caption", *words, "--model", run, "--temperature", "1"]) in (0, 1)  # a model that has learned nothing may write no word
    assert main(["sample", "a red square", "--model", run]) == 2
    how = "say how many by ldm caption --count" if name == "captions" else "give it pictures, with ldm caption"
    assert f"this model of kind tokens writes captions; {how}" in capsys.readouterr().err
