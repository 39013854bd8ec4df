"""Training in aspect-ratio buckets, as whole commands: one process, two, and one that is stopped and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import several
import tiny
from PIL import Image
from safetensors.numpy import load_file

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.runs.run import Run

WORDS = [
    *tiny.only("autoencoder"),
    "stages.evaluation-low=null",
    "models.autoencoder.network.channels=[8,8]",
    "models.autoencoder.network.norm_groups=4",
    "models.autoencoder.adversarial.weight=0",
    "stages.autoencoder.resolution=32",
    "stages.autoencoder.also=[]",
    "stages.autoencoder.log_every_steps=1",
    "stages.autoencoder.precision=fp32",
    "stages.autoencoder.samples=0",
    "stages.autoencoder.optim={kind: adamw, lr: 1e-3}",
    "stages.autoencoder.buckets={step: 8}",
    "stages.autoencoder.images=96",
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(30):
        size = [(48, 48), (80, 40), (40, 70)][number % 3] if number < 27 else (99, 50)
        Image.new("RGB", size, (8 * number, 255 - 8 * number, 90)).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}")
    return folder


def train(world: int, *words: str, fault: str = "") -> several.Ended:
    return several.train(world, *words, fault=fault, sizes=tiny.FOLDER)


def weights(run: Path) -> dict[str, object]:
    return load_file(run / "stages/autoencoder/model/vae/diffusion_pytorch_model.safetensors")


def test_two_processes_learn_what_one_learns_and_a_stop_changes_nothing(photographs: Path, tmp_path: Path) -> None:
    words = [*WORDS, f"data={{kind: folder, path: {photographs}}}"]
    alone, two, cut = (tmp_path / name for name in ("alone", "two", "cut"))
    ended = train(1, *words, f"out={alone}")
    assert ended.codes == [0], ended.said
    said = ended.said[0]
    assert "3 buckets, each batch in one shape" in said and "32 x 32" in said and "40 x 24" in said and "24 x 40" in said
    lines = [json.loads(line) for line in (alone / "log.jsonl").read_text().splitlines()]
    (told,) = [line["buckets"] for line in lines if "buckets" in line]
    assert sum(row["images"] for row in told) == 29 and sum(row["updates"] for row in told) == 12
    assert "shapes of autoencoder" in (alone / "report.html").read_text()

    both = train(2, *words, f"out={two}")
    assert both.codes == [0, 0], both.said
    one, other = weights(alone), weights(two)
    assert max(float(abs(one[name] - other[name]).max()) for name in one) < 2e-5  # type: ignore[operator]

    saved = ["stages.autoencoder.save_every_images=16", "stages.autoencoder.save_beside=false"]
    stopped = train(1, *words, *saved, f"out={cut}", fault="kill:0:7")
    assert stopped.codes == [-9], stopped.said
    again = train(1, *words, f"out={cut}")
    assert again.codes == [0] and "going on from 48 of 96 images" in again.said[0], again.said
    assert all((one[name] == value).all() for name, value in weights(cut).items())  # type: ignore[attr-defined]


def test_memory_that_does_not_do_for_a_shape_or_a_step_is_told_with_what_helps(photographs: Path, tmp_path: Path) -> None:
    words = [*WORDS, f"data={{kind: folder, path: {photographs}}}"]
    tried = train(1, *words, f"out={tmp_path / 'tried'}", fault="memory:0:12")  # shapes are tried as at the stage's end
    assert tried.codes == [2] and "Traceback" not in tried.said[0]
    assert "stages.autoencoder: 8 pictures of 32x32 px do not fit into the memory" in tried.last and "can't allocate memory" in tried.last
    helps = ["set stages.autoencoder.micro_batch=4 (the update stays that of 8 pictures)", "stages.autoencoder.precision=bf16"]
    assert tried.last.endswith(", or ".join([*helps, "stages.autoencoder.checkpointing=true", "a lower resolution"]))
    again = train(1, *words, "stages.autoencoder.checkpointing=true", f"out={tmp_path / 'again'}", fault="memory:0:12")
    assert again.last.endswith(", or ".join([*helps, "a lower resolution"]))
    begun = train(2, *words, "stages.autoencoder.buckets=null", f"out={tmp_path / 'begun'}", fault="memory:1:3")
    assert begun.codes[1] == 2 and begun.codes[0] != 0 and "Traceback" not in "".join(begun.said)
    assert "stages.autoencoder: at step 3 4 pictures of 32 px do not fit into the memory" in begun.last
    assert "the same command goes on from the last checkpoint, with checkpointing too;" in begun.last


CACHED = [
    *tiny.only("text", "autoencoder", "latents-low", "diffusion-low", "export"),
    "stages.evaluation-low=null",
    "models.autoencoder.adversarial.weight=0",
    "models.diffusion.network.norm_groups=4",
    "stages.autoencoder.resolution=32",
    "stages.autoencoder.also=[]",
    "stages.text.resolution=32",
    "stages.latents-low.resolution=32",
    "stages.latents-low.buckets={step: 8}",
    "stages.diffusion-low.resolution=32",
    "stages.diffusion-low.buckets={step: 8}",
    "stages.diffusion-low.log_every_steps=1",
    "stages.diffusion-low.batch=8",
    *(f"stages.{name}.precision=fp32" for name in ("text", "autoencoder", "diffusion-low")),
    *(f"stages.{name}.optim={{kind: adamw, lr: 1e-5}}" for name in ("text", "autoencoder", "diffusion-low")),
]


def test_diffusion_learns_from_latents_in_buckets(photographs: Path, tmp_path: Path) -> None:
    words = [*CACHED, f"data={{kind: folder, path: {photographs}}}"]
    ended = train(1, *words, f"out={tmp_path / 'run'}")
    assert ended.codes == [0], ended.said
    assert "diffusion-low: 3 buckets, each batch in one shape" in ended.said[0]
    # Two processes take up the encoded latents, and the same samples with the same noise.
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "stages" / "diffusion-low")
    both = train(2, *words, f"out={tmp_path / 'two'}")
    assert both.codes == [0, 0] and "latents-low: done" in both.said[0], both.said
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("run", "two")]
    one, two = ([line["loss"] for line in lines if line.get("stage") == "diffusion-low" and "loss" in line] for lines in logs)
    assert len(one) == 8 and one == pytest.approx(two[-8:], rel=1e-4)


def test_latents_that_are_encoded_otherwise_are_refused_before_any_work() -> None:
    run = {
        "data": {"kind": "scenes"},
        "models": {"text": {"kind": "clip"}, "autoencoder": {"kind": "kl"}, "diffusion": {"kind": "latent_diffusion"}},
        "stages": {
            "autoencoder": {"kind": "train", "model": "autoencoder", "resolution": 64, "images": 8},
            "text": {"kind": "train", "model": "text", "resolution": 64, "images": 8},
            "latents": {"kind": "encode", "resolution": 64, "buckets": {"step": 16}},
            "diffusion": {
                "kind": "train",
                "model": "diffusion",
                "resolution": 64,
                "images": 8,
                "latents": "latents",
                "buckets": {"step": 8},
            },
        },
    }
    with pytest.raises(UserError, match=r"stages.diffusion.buckets: latents is encoded otherwise; set stages.latents.buckets alike"):
        build(run, Run, "run.yaml")
    with pytest.raises(UserError, match=r"stages.latents.buckets.step: got 12; the autoencoder needs a multiple of 8"):
        build(run | {"stages": run["stages"] | {"latents": {"kind": "encode", "resolution": 64, "buckets": {"step": 12}}}}, Run, "run.yaml")
