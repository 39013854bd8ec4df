"""Runs that take a model, or parts of one, from elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.formats.part import load_part, read_json

SCENES = {"kind": "scenes", "images": 32, "val": 4}
OPTIM = {"kind": "adamw", "lr": 1e-3}


DIFFUSION = {"diffusion": {"kind": "latent_diffusion"}}


def diffusion(**more: Any) -> dict[str, Any]:
    """Models of which the diffusion alone is said something of."""
    return {"models": {"diffusion": {"kind": "latent_diffusion"} | more}}


def stage(model: str = "diffusion", **more: Any) -> dict[str, Any]:
    return {"kind": "train", "model": model, "images": 16, "resolution": 32, "batch": 8, "samples": 0, "optim": OPTIM} | more


def go(folder: Path, run: dict[str, Any], *words: str) -> int:
    folder.mkdir(exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run, sort_keys=False))
    return main(["train", str(file), f"out={folder / 'out'}", *words])


def equal(a: Path, b: Path) -> bool:
    first, second = load_part(a)[1], load_part(b)[1]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion written by diffusers; read only."""
    from pipelines import pipeline_folder

    return pipeline_folder(tmp_path_factory.mktemp("base"))


def test_a_stranger_s_model_is_continued_and_opens_in_diffusers(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline

    run = {"data": SCENES, "init": str(base), "models": DIFFUSION, "stages": {"tune": stage(), "export": {"kind": "export"}}}
    assert go(tmp_path, run) == 0
    model = tmp_path / "out" / "model"
    assert equal(model / "vae", base / "vae") and equal(model / "text_encoder", base / "text_encoder")
    assert not equal(model / "unet", base / "unet") and load_part(model / "unet")[1].keys() == load_part(base / "unet")[1].keys()
    opened = StableDiffusionPipeline.from_pretrained(model)
    theirs = StableDiffusionPipeline.from_pretrained(base)
    assert opened.vae.config.scaling_factor == theirs.vae.config.scaling_factor
    for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
        assert opened.scheduler.config[name] == theirs.scheduler.config[name]
    capsys.readouterr()
    assert go(tmp_path, run) == 0
    assert "tune: done already" in capsys.readouterr().err + (tmp_path / "out" / "log.jsonl").read_text()
    assert main(["sample", "a red square", "--model", str(tmp_path / "out"), "--steps", "2", "--out", str(tmp_path / "pictures")]) == 0


def test_a_base_is_continued_with_dropout_of_ones_own(tmp_path: Path, base: Path) -> None:
    run = {"data": SCENES, "init": str(base), **diffusion(network={"dropout": 0.1}), "stages": {"tune": stage()}}
    assert go(tmp_path, run) == 0
    assert not equal(tmp_path / "out" / "stages" / "tune" / "model" / "unet", base / "unet")


def test_another_base_under_the_same_name_is_another_run(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    own = tmp_path / "own"
    shutil.copytree(base, own)
    (own / "manifest.json").unlink(missing_ok=True)
    run = {"data": SCENES, "init": str(own), "models": DIFFUSION, "stages": {"tune": stage()}}
    assert go(tmp_path, run) == 0
    file = own / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(file).items()}, file, {"format": "pt"})
    assert go(tmp_path, run, "--plan") == 0
    assert "changed: inputs.init" in capsys.readouterr().out


def test_a_checkpoint_file_is_a_base_too(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "base.safetensors"
    assert main(["export", str(base), "--to", "single-file", "--out", str(file)]) == 0
    assert (
        go(tmp_path, {"data": SCENES, "init": str(file), "models": DIFFUSION, "stages": {"tune": stage(), "export": {"kind": "export"}}})
        == 0
    )
    assert equal(tmp_path / "out" / "model" / "vae", base / "vae")


def test_a_plan_needs_no_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go(tmp_path, {"data": SCENES, "init": "owner/name", "models": DIFFUSION, "stages": {"tune": stage()}}, "--plan") == 0
    said = capsys.readouterr().out
    assert "owner/name" in said and "what it begins with cannot be read here" in said


def test_parts_of_others_and_a_unet_from_nothing(tmp_path: Path, base: Path) -> None:
    run = {
        "data": SCENES,
        "models": {
            "text": {"kind": "pretrained_text", "path": str(base)},
            "autoencoder": {"kind": "pretrained_autoencoder", "path": str(base / "vae")},
            **diffusion(network={"channels": [32, 32], "attention": [False, True], "layers": 1, "heads": 2})["models"],
        },
        "stages": {
            "latents": {"kind": "encode", "resolution": 32},
            "first": stage(latents="latents"),
            "second": stage(latents="latents"),
            "measure": {"kind": "evaluate", "of": "second", "metrics": [{"kind": "frechet", "images": 4}]},
            "export": {"kind": "export"},
        },
    }
    assert go(tmp_path, run) == 0
    assert equal(tmp_path / "out" / "model" / "vae", base / "vae")
    assert (tmp_path / "out" / "pretrained" / "text" / "tokenizer").is_dir()


def test_an_autoencoder_is_continued_with_its_discriminator(tmp_path: Path) -> None:
    network = {"channels": [8, 8], "layers": 1, "norm_groups": 4}
    both = {"first": stage("autoencoder", ema=0), "second": stage("autoencoder", ema=0, images=8, optim={"kind": "adamw", "lr": 1e-9})}
    autoencoder = {"kind": "kl", "network": network, "adversarial": {"start": 0}}
    run = {"data": SCENES, "models": {"autoencoder": autoencoder}, "stages": both}
    assert go(tmp_path, run) == 0
    first, second = (tmp_path / "out" / "stages" / name / "model" for name in both)
    for part in ("vae", "discriminator"):
        a, b = load_part(first / part)[1], load_part(second / part)[1]
        assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"init": "nowhere"}, ["nowhere", "no such folder"]),
        (
            {"models": {"text": {"kind": "clip"}, **DIFFUSION}, "stages": {"text": stage("text")}},
            ["stages.text.model", "leave this stage out"],
        ),
        (
            {"models": {"autoencoder": {"kind": "pretrained_autoencoder", "path": "x"}}, "stages": {"a": stage("autoencoder")}},
            ["stages.a.model", "as it is"],
        ),
        (diffusion(network={"channels": [64, 64], "attention": [True, True]}), ["models.diffusion.network.channels", "(64, 64)"]),
        (diffusion(process={"target": "v"}), ["models.diffusion.process.target", "got v", "epsilon"]),
    ],
)
def test_what_contradicts_is_one_line(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: list[str]
) -> None:
    run = {"data": SCENES, "init": str(base), "models": DIFFUSION, "stages": {"tune": stage()}} | change
    assert go(tmp_path, run) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and "Traceback" not in said


def test_two_stages_of_text_are_refused() -> None:
    from ldm.config.schema import build
    from ldm.runs.run import Run

    with pytest.raises(UserError, match=r"stages\.b\.model: text is trained by stages.a already"):
        build({"data": SCENES, "models": {"text": {"kind": "clip"}}, "stages": {"a": stage("text"), "b": stage("text")}}, Run, "run")


def test_offset_noise_is_taken_from_the_base_and_told_on(tmp_path: Path, base: Path) -> None:
    run = {"data": SCENES, "init": str(base), "models": DIFFUSION, "stages": {"tune": stage(), "export": {"kind": "export"}}}
    assert go(tmp_path / "a", run | diffusion(process={"offset_noise": 0.1})) == 0
    first = tmp_path / "a" / "out" / "model"
    assert read_json(first / "ldm.json")["offset_noise"] == 0.1
    assert go(tmp_path / "b", run | {"init": str(first)}) == 0
    assert read_json(tmp_path / "b" / "out" / "model" / "ldm.json")["offset_noise"] == 0.1
    assert go(tmp_path / "c", run | {"init": str(first)} | diffusion(process={"offset_noise": 0.0})) == 0
    assert "offset_noise" not in read_json(tmp_path / "c" / "out" / "model" / "ldm.json")
