"""configs/tokens.yaml at a size of seconds: it trains, draws, paints into a picture, is replayed, and says in a line what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import main

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
def test_the_run_draws_paints_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
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
