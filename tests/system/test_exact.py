"""`exact: true`: the same weights, to the bit, from one process, two and four."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import several
import tiny
import yaml
from safetensors.numpy import load_file
from systems import run_of

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.runs.run import Run

PRODUCT = "stages/autoencoder/model/vae/diffusion_pytorch_model.safetensors"
WORDS = [
    *tiny.only("autoencoder"),
    "models.autoencoder.network.channels=[8,8]",
    "models.autoencoder.network.norm_groups=4",
    "models.autoencoder.adversarial={weight: 0.5, start: 0.3, discriminator: {channels: 8, layers: 1, norm_groups: 4}}",
    "stages.autoencoder.resolution=32",
    "stages.autoencoder.also=[]",
    "stages.autoencoder.log_every_steps=1",
    "stages.autoencoder.precision=fp32",
    "stages.autoencoder.samples=0",
    "stages.autoencoder.images=48",
    "stages.autoencoder.micro_batch=2",
    "stages.autoencoder.optim={kind: adamw, lr: 1e-3}",
]


@pytest.mark.slow
def test_one_two_and_four_processes_make_the_same_bits(tmp_path: Path) -> None:
    words = [*WORDS, "stages.autoencoder.exact=true", "stages.autoencoder.save_every_images=8", "stages.autoencoder.save_beside=false"]
    whole = several.train(1, *words, f"out={tmp_path / 'whole'}")
    assert whole.codes == [0], whole.said
    # Two begin, are killed, one goes on, is killed, and four come to the end (from the beginning: tests/soak/test_ranks_soak.py).
    for world, fault, images in ((2, "kill:1:2", 0), (1, "kill:0:4", 16), (4, "", 32)):
        ended = several.train(world, *words, f"out={tmp_path / 'elastic'}", fault=fault)
        assert (ended.codes == [0] * world) == (not fault), ended.said
        assert not images or f"going on from {images} of 48 images" in ended.said[0], ended.said
    expected = load_file(tmp_path / "whole" / PRODUCT)
    assert all((expected[name] == value).all() for name, value in load_file(tmp_path / "elastic" / PRODUCT).items())


@pytest.mark.slow
def test_a_vae_knows_no_pictures_beside_each_other(tmp_path: Path) -> None:
    config = run_of("cvae", tmp_path)
    config["stages"]["last"] |= {"batch": 8, "micro_batch": 2, "exact": True, "precision": "fp32", "optim": {"kind": "adamw", "lr": 1e-3}}
    config["stages"]["last"]["samples"] = 3  # of which two processes draw two and one
    config["stages"]["text"]["precision"] = "fp32"
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    assert several.train(1, f"out={tmp_path / 'one'}", config=str(file), sizes=()).codes == [0]
    shutil.copytree(tmp_path / "one" / "stages" / "text", tmp_path / "two" / "stages" / "text")  # which is not exact
    ended = several.train(2, f"out={tmp_path / 'two'}", config=str(file), sizes=())
    assert ended.codes == [0, 0], ended.said
    for name in ("encoder", "decoder"):
        one, two = (
            load_file(tmp_path / run / "stages/last/model" / name / "diffusion_pytorch_model.safetensors") for run in ("one", "two")
        )
        assert all((one[key] == value).all() for key, value in two.items()) and one.keys() == two.keys()
    alone, shared = (sorted((tmp_path / run / "stages/last/samples").glob("*.png")) for run in ("one", "two"))
    assert alone and [file.read_bytes() for file in alone] == [file.read_bytes() for file in shared]


@pytest.mark.parametrize(
    ("model", "kind", "micro", "said"),
    [
        ("autoencoder", "kl", 0, "needs micro_batch"),
        ("autoencoder", "vq", 2, "codes of the whole batch"),
        ("text", "kl", 2, "pairs of the whole batch"),
    ],
)
def test_what_cannot_be_exact_is_refused(model: str, kind: str, micro: int, said: str) -> None:
    stage = {"kind": "train", "model": model, "images": 8, "resolution": 32, "batch": 8, "micro_batch": micro, "exact": True}
    with pytest.raises(UserError, match=said):
        build(
            {"data": {"kind": "scenes"}, "models": {"text": {"kind": "clip"}, "autoencoder": {"kind": kind}}, "stages": {"a": stage}},
            Run,
            "run",
        )
