"""configs/text-gan.yaml and attngan.yaml in seconds: they train, resume to the bit, draw, are replayed, and say what they cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.text_gan import TextGANFamily

ROOT = Path(__file__).parents[2]
WORDS = [
    *("data.images=48", "data.val=8", "models.text.vocabulary=600", "models.text.text.width=16"),
    *("models.autoencoder.network.channels=[8,8,8,8]", "models.gan.generator.channels=[8]", "models.gan.discriminator.channels=[8]"),
    *("stages.text.images=64", "stages.text.batch=16", "stages.autoencoder.images=64", "stages.gan.images=80", "stages.gan.batch=16"),
    "stages.autoencoder-gate.metrics=[{kind: reconstruction, images: 4}]",
    *("stages.gan.samples=2", "stages.gan.sample_every_images=32", "stages.gan.save_every_images=16", "stages.gan.save_beside=false"),
    "stages.evaluation.metrics=[{kind: adherence, tier: one, prompts: 2}, {kind: diversity, tier: one, prompts: 1, pictures: 2}]",
]
CANNOT = {  # what is asked for, and why not
    "sample red --sampler ddim": "sampler: got 'ddim': this model of kind text_gan draws at once and has no such setting",
    "sample red --init INIT": "init: this model of kind text_gan starts from no picture",
    "sample red --size 64x64": "size: got 64x64: this model of kind text_gan draws 32x32 alone",
}


def picture(folder: Path) -> np.ndarray:
    [path] = folder.glob("*.png")
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("name", ["text-gan", "attngan"])
def test_the_run_resumes_draws_and_replays(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, run, stopped = ["train", f"configs/{name}.yaml", *WORDS], tmp_path / "run", tmp_path / "stopped"
    assert main([*words, f"out={run}"]) == 0
    with monkeypatch.context() as patched:
        own = TextGANFamily.loss

        def ends(self: Any, batch: Any, rng: Any) -> Any:
            if int(batch.position.max()) >= 40:
                raise UserError("stopped here")
            return own(self, batch, rng)

        patched.setattr(TextGANFamily, "loss", ends)
        assert main([*words, f"out={stopped}"]) == 2
    assert main([*words, f"out={stopped}"]) == 0
    assert "going on from" in capsys.readouterr().err
    product = Path("stages/gan/model/manifest.json")
    assert (run / product).read_bytes() == (stopped / product).read_bytes()
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    terms = [line["terms"].keys() for line in logged if line.get("stage") == "gan" and "terms" in line]
    assert all(("damsm" in one) == (name == "attngan") for one in terms) and terms
    found = json.loads((run / "metrics.json").read_text())["evaluations"]["evaluation"]
    assert {"seen", "held_out"} <= found["adherence"].keys() and found["diversity"]["real"] > 0
    assert "diversity" in (run / "report.html").read_text(encoding="utf-8")

    def draw(name: str, *words: str) -> np.ndarray:
        assert main(["sample", *words, "--model", str(run), "--out", str(tmp_path / name)]) == 0
        return picture(tmp_path / name)

    first = draw("first", "[a cyan square:a pink ring:0.5]", "--truncation", "0.8")
    [path] = (tmp_path / "first").glob("*.png")
    assert np.array_equal(draw("again", "--from", str(path)), first)
    model = ["--model", str(run), "--out"]
    assert main(["sample", "a cyan square", "--variations", "1", *model, str(tmp_path / "varied")]) == 0
    assert main(["animate", "a cyan square", "--to", "a pink ring", "--frames", "2", *model, str(tmp_path / "film.png")]) == 0
    assert main(["grid", "a cyan square", "--x", "truncation=0,1", *model, str(tmp_path / "grid.png")]) == 0
    for asked, said in CANNOT.items():
        capsys.readouterr()
        out = tmp_path / "none"
        assert main([*asked.replace("INIT", str(path)).split(), "--model", str(run), "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_a_second_stage_enlarges_the_first_ones_picture(tmp_path: Path) -> None:
    run, few = tmp_path / "run", "stages.{}.metrics=[{{kind: adherence, tier: one, prompts: 2}}]"
    words = ["data.images=48", "data.val=8", "models.text.vocabulary=600", "models.text.text.width=16", "stages.text.images=32"]
    for model in ("gan", "larger"):
        words += [f"models.{model}.generator.channels=[8,8]", f"models.{model}.discriminator.channels=[8,8]"]
        words += [f"stages.{model}.images=32", f"stages.{model}.batch=16", f"stages.{model}.samples=2"]
    words += [few.format("evaluation"), few.format("evaluation-larger"), "stages.text.batch=16"]
    assert main(["train", "configs/stackgan.yaml", *words, f"out={run}"]) == 0
    found = json.loads((run / "metrics.json").read_text())["evaluations"]
    assert found["evaluation"]["adherence"]["protocol"]["size"] == 16 and found["evaluation-larger"]["adherence"]["protocol"]["size"] == 32

    def draw(name: str, *words: str) -> np.ndarray:
        assert main(["sample", "a cyan square", *words, "--model", str(run), "--out", str(tmp_path / name)]) == 0
        return picture(tmp_path / name)

    assert draw("small", "--stop-after", "1").shape == (16, 16, 3)
    whole = draw("whole")
    [path] = (tmp_path / "small").glob("*.png")
    assert whole.shape == (32, 32, 3) and np.array_equal(draw("given", "--given", f"small:2={path}"), whole)  # the same picture, told
