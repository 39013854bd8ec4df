"""Whole runs: from an empty folder to a model, again, changed, on a user's own pictures, and with wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from ldm.__main__ import main
from ldm.training.log import read


def test_a_run_folder_holds_what_the_design_says(finished: Path) -> None:
    for name in ("config.yaml", "log.jsonl", "metrics.json", "report.html", "model/model_index.json", "model/README.md"):
        assert (finished / name).is_file(), name
    stages = {p.name for p in (finished / "stages").iterdir()}
    assert stages == {
        "text",
        "autoencoder",
        "autoencoder-gate",
        "latents-low",
        "diffusion-low",
        "latents-high",
        "diffusion-high",
        "evaluation",
        "export",
    }
    for stage in stages:
        done = json.loads((finished / "stages" / stage / "done.json").read_text())
        assert done["stage"] == stage and done["key"] and done["seconds"] >= 0
        assert not (finished / "stages" / stage / "state").exists()
    assert list((finished / "stages" / "diffusion-high" / "samples").glob("*.png"))
    assert not list(finished.rglob("*.pkl")) and not list(finished.rglob("*.bin")) and not list(finished.rglob("*.pt"))
    metrics = json.loads((finished / "metrics.json").read_text())["evaluations"]
    assert metrics["evaluation"]["adherence"]["checker"]["seen"] == 1
    assert metrics["evaluation"]["adherence"]["protocol"]["prompts"] == 4
    assert 0 <= metrics["autoencoder-gate"]["reconstruction"]["bind"] <= 1
    lines = [line for line in read(finished / "log.jsonl") if "step" in line]
    assert {line["stage"] for line in lines} == {"text", "autoencoder", "diffusion-low", "diffusion-high"}
    assert all(np.isfinite(line["loss"]) and line["images_per_s"] > 0 for line in lines)


def test_a_second_start_skips_everything_and_says_why(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("done.json")}
    assert main(["train", str(finished / "config.yaml")]) == 0
    said = capsys.readouterr().err
    assert said.count("done already, nothing it depends on has changed") == 9
    assert before == {p: p.stat().st_mtime_ns for p in (finished / "stages").rglob("done.json")}


def test_a_change_reruns_exactly_what_depends_on_it(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    change = "stages.diffusion-high.images=32"
    assert main(["train", str(out / "config.yaml"), change, "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "diffusion-high.images" not in plan and "settings.images: 64 -> 32" in plan
    assert [line.split()[1] for line in plan.splitlines() if line.startswith("  run")] == ["diffusion-high", "evaluation", "export"]
    assert main(["train", str(out / "config.yaml"), change]) == 0
    said = capsys.readouterr().err
    assert said.count("done already") == 6 and "kept in" in said
    assert (out / "stages" / "diffusion-high.replaced-1" / "done.json").is_file()
    assert json.loads((out / "stages" / "diffusion-high" / "done.json").read_text())["images"] == 32


def test_watching_differently_reruns_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stages.diffusion-high.log_every_steps=3", "stages.diffusion-high.prompts=[a red circle]", "stages.text.keep=5"]
    assert main(["train", str(finished / "config.yaml"), *words, "--plan"]) == 0
    assert "  run " not in capsys.readouterr().out.replace("  run  run", "")


def test_a_stage_carries_on_weights_averages_and_optimiser(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    carry = "stages.diffusion-high.carry=all"
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    done = out / "stages/diffusion-low/done.json"  # as if it had been trained with keep_state=false
    done.write_text(json.dumps(json.loads(done.read_text()) | {"carried": ""}))
    assert main(["train", str(out / "config.yaml"), carry]) == 2
    said = capsys.readouterr().err
    assert "stages.diffusion-high.carry: diffusion-low was finished when nothing asked for more" in said and "Traceback" not in said
    shutil.move(out / "stages" / "diffusion-low", tmp_path)
    assert main(["train", str(out / "config.yaml"), carry, "--plan"]) == 0
    assert capsys.readouterr().out.count("is kept to go on from (keep_state)") == 2
    assert main(["train", str(out / "config.yaml"), carry]) == 0
    said = capsys.readouterr().err
    assert "diffusion-high: begins with the weights, EMA, optimiser of diffusion-low after 64 images" in said
    assert "diffusion-low: finished" in said and "latents-low: done already" in said
    assert sorted(p.name for p in (out / "stages/diffusion-low/carried").iterdir()) == [
        "ema.safetensors",
        "manifest.json",
        "meta.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]
    for words, runs in (([carry], []), ([carry.replace("all", "weights")], ["diffusion-high", "evaluation", "export"])):
        assert main(["train", str(out / "config.yaml"), *words, "--plan"]) == 0
        plan = capsys.readouterr().out
        assert [line.split()[1] for line in plan.splitlines() if line.startswith("  run")] == runs
    shutil.rmtree(out / "stages/diffusion-low/carried")  # what is done needs it no more
    assert main(["train", str(out / "config.yaml"), carry]) == 0
    assert capsys.readouterr().err.count("done already") == 9


def test_recomputing_blocks_changes_no_bit_and_no_key(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "stages.diffusion-high.checkpointing=true",
        "stages.autoencoder.checkpointing=true",
        "models.diffusion.network.checkpointing=true",
    ]
    assert main(["train", str(finished / "config.yaml"), *words, "--plan"]) == 0
    assert "  run " not in capsys.readouterr().out.replace("  run  run", "")
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for name in ("autoencoder", "diffusion-high"):
        shutil.move(out / "stages" / name, tmp_path)
    assert main(["train", str(out / "config.yaml"), *words]) == 0
    assert "latents-low: done already" in capsys.readouterr().err  # so the autoencoder is the same to the bit
    for name in ("autoencoder", "diffusion-high"):
        before, after = (json.loads((stages / name / "done.json").read_text())["product"] for stages in (tmp_path, out / "stages"))
        assert before == after


def test_a_damaged_product_is_refused_and_made_again_when_it_is_moved_away(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    weights = out / "stages" / "diffusion-high" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["train", str(out / "config.yaml"), "--plan"]) == 2
    said = capsys.readouterr().err
    assert "diffusion_pytorch_model.safetensors: its bytes differ from the manifest" in said and said.count("\n") == 1
    shutil.move(out / "stages" / "diffusion-high", tmp_path)
    assert main(["train", str(out / "config.yaml"), "--plan"]) == 0
    plan = capsys.readouterr().out
    assert [line.split()[1] for line in plan.splitlines() if line.startswith("  run")] == ["diffusion-high", "evaluation", "export"]


def test_equal_seeds_give_equal_models(finished: Path, tmp_path: Path) -> None:
    tiny.train(f"out={tmp_path / 'again'}", *tiny.only("text"))
    name = "stages/text/model/manifest.json"
    assert (tmp_path / "again" / name).read_text() == (finished / name).read_text()
    tiny.train(f"out={tmp_path / 'other'}", "seed=1", *tiny.only("text"))
    assert (tmp_path / "other" / name).read_text() != (finished / name).read_text()


def test_vq_by_one_word(tmp_path: Path) -> None:
    said = tiny.train(f"out={tmp_path / 'vq'}", "models.autoencoder.kind=vq", "models.autoencoder.network.codes=32")
    assert "export: finished" in said
    model = tmp_path / "vq" / "model"
    assert (model / "vqvae" / "latents.json").is_file() and "VQModel" in (model / "README.md").read_text()
    log = [line for line in read(tmp_path / "vq" / "log.jsonl") if line.get("stage") == "autoencoder" and "step" in line]
    assert 0 < log[-1]["gauges"]["code_use"] <= 1


def photographs(folder: Path, count: int) -> None:
    """Pictures of any size and mode with captions beside them, and some that are no good."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = rng.integers(70, 160, 2)
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        mode = ("RGB", "L", "P", "CMYK")[i % 4]
        kind = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
        Image.fromarray(pixels).convert(mode).save(folder / f"photo{i:03d}.{kind}")
        (folder / f"photo{i:03d}.txt").write_text(f"a photograph number {i % 5} of noise\n")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff but no picture")
    (folder / "broken.txt").write_text("broken")


def test_the_same_on_a_users_own_folder(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", 40)
    words = [f"data.path={tmp_path / 'photos'}", f"out={tmp_path / 'run'}"]
    process = tiny.start_folder(*words)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()
    assert "left out: 1 " in said and "broken.jpg" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages.text.imgaes=3"], "did you mean images"),
        (["text.vocabulary=600"], "since ldm 0.2 it stands in models, with its kind: models.text"),
        (["stages.text.family=text"], "since ldm 0.2 it is stages.text.model"),
        (["models.diffusion.text=autoencoder"], "models.diffusion.text: got autoencoder, a model of kind kl, which has no image tower"),
        (["models.diffusion.autoencoder=text"], "a model of kind clip, which makes no latents"),
        (["stages.text.model=txt"], "'txt' is no entry of models; did you mean text?"),
        (["stages.evaluation.of=text"], "kind clip has nothing that is measured so"),
        (["stages.diffusion-high.resolution=65"], "multiple of 8"),
        (["stages.text=null"], "trains text"),
        (["stages.diffusion-high.latents=latents-low"], "holds 32 px"),
        (["data.kind=folder"], "data.path: required"),
        (["data={kind: folder, path: /no/such/folder}", "stages.autoencoder-gate=null", "stages.evaluation=null"], "/no/such/folder"),
        (["models.autoencoder.kind=vae"], "allowed are clip, pretrained_text, kl, vq"),
        (["stages.diffusion-low.carry=all"], "no stage before it trains diffusion"),
        (["stages.diffusion-high.carry=weights", "stages.diffusion-low.ema=0"], "stages.diffusion-low has no EMA"),
        (["stages.diffusion-high.carry=all", "stages.diffusion-low.optim.kind=adamw"], "muon cannot take over the state of"),
        (["stages.text.checkpointing=true"], "a model of kind clip has no blocks that can be recomputed"),
        (["stages.evaluation.require={adherence.seen.bnd: 1}"], "adherence.seen.bnd is not measured here"),
    ],
)
def test_a_bad_run_stops_before_any_work(words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "configs/quickstart.yaml", f"out={tmp_path / 'x'}", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
    assert not (tmp_path / "x" / "stages").exists()


def test_diffusion_learns_from_pictures_too_in_parts_of_a_batch(tmp_path: Path) -> None:
    words = ["stages.diffusion-low.latents=", "stages.diffusion-low.micro_batch=4", "stages.diffusion-low.precision=fp32"]
    stages = tiny.only("text", "autoencoder", "diffusion-low")
    said = tiny.train(f"out={tmp_path / 'run'}", *words, *stages)
    assert "diffusion-low: finished" in said
