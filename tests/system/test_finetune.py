"""A new user's way with own pictures, by commands alone: checked, encoded, a LoRA learned, sampled, opened in diffusers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import pipeline_folder

from ldm.__main__ import main

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configs/, a base model in base/model and eight captioned pictures in pictures/."""
    root = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "configs", root / "configs")
    pipeline_folder(root / "base")
    (root / "pictures").mkdir()
    for i in range(8):
        word = list(COLOURS)[i % 2]
        Image.fromarray(np.full((40, 40, 3), COLOURS[word], np.uint8)).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text(f"a {word} picture")
    return root


SHORT = ["stages.latents.resolution=32", "data.kind=folder", "data.path=pictures"]


def short(stage: str) -> list[str]:
    return [
        *SHORT,
        "init=base/model",
        f"stages.{stage}.resolution=32",
        f"stages.{stage}.images=16",
        f"stages.{stage}.batch=4",
        f"stages.{stage}.samples=0",
        f"stages.{stage}.optim.warmup_images=0",
    ]


def test_from_pictures_to_a_lora_in_diffusers(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(home)
    assert main(["data", "check", "pictures"]) == 0
    words = [*short("lora"), "stages.evaluation=null", "models.diffusion.adapt.targets=[to_k,conv1]"]
    assert main(["train", "configs/finetune-lora.yaml", *words, "--plan"]) == 0
    assert "memory of each device" in capsys.readouterr().out
    assert main(["train", "configs/finetune-lora.yaml", *words]) == 0
    run = home / "runs" / "finetune-lora"
    draw = ["a red picture", "--steps", "2", "--device", "cpu", "--size", "32x32"]
    assert main(["sample", *draw, "--model", str(run), "--out", "merged"]) == 0
    assert main(["sample", *draw, "--model", "base/model", "--lora", str(run / "lora" / "kohya.safetensors"), "--out", "added"]) == 0
    merged, added = (np.asarray(Image.open(next((home / name).glob("*.png")))) for name in ("merged", "added"))
    assert (merged == added).all()
    pipeline = StableDiffusionPipeline.from_pretrained(home / "base" / "model")
    before = pipeline.unet.state_dict()
    pipeline.load_lora_weights(run / "lora")
    assert len(pipeline.unet.state_dict()) > len(before)
    whole = StableDiffusionPipeline.from_pretrained(run / "model")
    assert whole.unet.state_dict().keys() == before.keys()


def test_from_pictures_to_a_word_in_diffusers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(home)
    assert main(["train", "configs/finetune-textual-inversion.yaml", *short("word")]) == 0
    run = home / "runs" / "finetune-textual-inversion"
    draw = ["a <thing>", "--steps", "2", "--device", "cpu", "--size", "32x32"]
    assert main(["sample", *draw, "--model", str(run), "--out", "whole"]) == 0
    assert main(["sample", *draw, "--model", "base/model", "--embedding", str(run / "embedding"), "--out", "taught"]) == 0
    whole, taught = (np.asarray(Image.open(next((home / name).glob("*.png")))) for name in ("whole", "taught"))
    assert (whole == taught).all()
    pipeline = StableDiffusionPipeline.from_pretrained(home / "base" / "model")
    pipeline.load_textual_inversion(run / "embedding" / "learned_embeds.safetensors")
    opened = StableDiffusionPipeline.from_pretrained(run / "model")
    tables = [p.text_encoder.get_input_embeddings().weight[-2:] for p in (pipeline, opened)]
    assert torch.equal(*tables)
