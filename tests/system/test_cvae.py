"""configs/cvae.yaml in seconds: it trains, resumes to the bit, is measured, draws, is replayed, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.cvae import CVAEFamily

ROOT = Path(__file__).parents[2]
WORDS = [
    *("data.images=48", "data.val=8", "models.text.vocabulary=600", "models.text.text.width=16"),
    *("models.autoencoder.network.channels=[8,8,8,8]", "models.vae.posterior.channels=[8]", "models.vae.decoder.channels=[8]"),
    *("stages.text.images=64", "stages.text.batch=16", "stages.autoencoder.images=64", "stages.vae.images=80", "stages.vae.batch=16"),
    *("stages.autoencoder-gate.metrics=[{kind: reconstruction, images: 4}]", "models.vae.warmup_images=48"),
    *("stages.vae.samples=2", "stages.vae.sample_every_images=32", "stages.vae.save_every_images=16", "stages.vae.save_beside=false"),
    "stages.evaluation-vae.metrics=[{kind: adherence, tier: one, prompts: 2}, {kind: units, images: 8}]",
]
CANNOT = {  # what is asked for, and why not
    "sample red --guidance 3": "guidance: got 3.0: this model of kind cvae draws at once and has no such setting",
    "sample red --init INIT": "init: this model of kind cvae starts from no picture",
    "sample red --size 64x64": "size: got 64x64: this model of kind cvae draws 32x32 alone",
}


def test_the_run_resumes_draws_and_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words, run, stopped = ["train", "configs/cvae.yaml", *WORDS], tmp_path / "run", tmp_path / "stopped"
    assert main([*words, f"out={run}"]) == 0
    with monkeypatch.context() as patched:
        own = CVAEFamily.loss

        def ends(self: Any, batch: Any, rng: Any) -> Any:
            if int(batch.position.max()) >= 40:
                raise UserError("stopped here")
            return own(self, batch, rng)

        patched.setattr(CVAEFamily, "loss", ends)
        assert main([*words, f"out={stopped}"]) == 2
    assert main([*words, f"out={stopped}"]) == 0
    assert "going on from" in capsys.readouterr().err
    product = Path("stages/vae/model/manifest.json")
    assert (run / product).read_bytes() == (stopped / product).read_bytes()
    found = json.loads((run / "metrics.json").read_text())["evaluations"]["evaluation-vae"]
    assert {"seen", "held_out"} <= found["adherence"].keys() and found["units"]["units"] == 32 >= found["units"]["active"]
    assert "units" in (run / "report.html").read_text(encoding="utf-8")

    def draw(name: str, *words: str) -> np.ndarray:
        assert main(["sample", *words, "--model", str(run), "--out", str(tmp_path / name)]) == 0
        [path] = (tmp_path / name).glob("*.png")
        return np.asarray(Image.open(path))

    first = draw("first", "[a cyan square:a pink ring:0.5]", "--truncation", "0.8")
    [path] = (tmp_path / "first").glob("*.png")
    assert np.array_equal(draw("again", "--from", str(path)), first)
    model = ["--model", str(run), "--out"]
    assert main(["sample", "a cyan square", "--variations", "1", *model, str(tmp_path / "varied")]) == 0
    assert main(["animate", "a cyan square", "--to", "a pink ring", "--frames", "2", *model, str(tmp_path / "film.png")]) == 0
    assert main(["grid", "a cyan square", "--x", "truncation=0,1", *model, str(tmp_path / "grid.png")]) == 0
    for asked, said in CANNOT.items():
        capsys.readouterr()
        assert main([*asked.replace("INIT", str(path)).split(), "--model", str(run), "--out", str(tmp_path / "none")]) == 2
        assert said in capsys.readouterr().err
