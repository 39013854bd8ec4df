"""The published recipes, made small enough to run: Stable Diffusion's four stages on the built-in web corpus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.config.schema import build, merge
from ldm.config.yaml_reader import parse
from ldm.runs.run import Run

ROOT = Path(__file__).parents[2]
SD1 = ROOT / "configs" / "sd1.yaml"
FOUR = ["v1-1-256", "v1-1", "v1-2", "v1-4"]
# Its own data, and a text encoder and an autoencoder that are learned at once instead of read.
SMALL: dict[str, Any] = {
    "text": {
        "kind": "clip",
        "vocabulary": 560,
        "text": {"width": 32, "layers": 1, "heads": 2, "max_tokens": 12},
        "tower": {"channels": [8, 16]},
    },
    "autoencoder": {"kind": "kl", "network": {"channels": [8, 8, 8, 16], "layers": 1, "norm_groups": 4}, "adversarial": {"weight": 0}},
}
SCENES = {"kind": "scenes", "tier": "one", "images": 256, "val": 4, "web": True}
LEARN = {"kind": "train", "resolution": 32, "images": 16, "batch": 8, "samples": 0}
STAGE = {"images": 16, "batch": 8, "micro_batch": 4, "samples": 0, "sample_every_images": 0}
UNET = {"channels": [16, 32, 32, 32], "norm_groups": 8, "layers": 1, "heads": 2}


def recipe() -> dict[str, Any]:
    values: dict[str, Any] = parse(SD1.read_text(encoding="utf-8"), str(SD1))
    return values


def small() -> dict[str, Any]:
    """The recipe with smaller numbers; the order of its stages, its filters, process and optimiser stay."""
    values = recipe()
    values["data"] = SCENES
    values["models"] = {**SMALL, "diffusion": merge(values["models"]["diffusion"], {"network": UNET})}
    sizes = {name: {**STAGE, "resolution": values["stages"][name]["resolution"] // 8} for name in FOUR}
    # The corpus has originals of an eighth of the size.
    narrower = {name: {"filter": {"min_side": side}} for name, side in (("v1-1", 128), ("v1-2", 64), ("v1-4", 64))}
    stages = merge(merge(values["stages"], sizes), narrower)
    values["stages"] = {"text": {**LEARN, "model": "text"}, "autoencoder": {**LEARN, "model": "autoencoder"}, **stages}
    return values


def test_the_recipe_is_the_published_one() -> None:
    stages = recipe()["stages"]
    assert [stage["images"] / stage["batch"] for stage in map(stages.get, FOUR)] == [237_000, 194_000, 515_000, 225_000]
    assert [stage["resolution"] for stage in map(stages.get, FOUR)] == [256, 512, 512, 512]
    assert {stage["batch"] for stage in map(stages.get, FOUR)} == {2048} and {stage["ema"] for stage in map(stages.get, FOUR)} == {0.9999}
    for stage in map(stages.get, FOUR):
        assert (stage["optim"]["kind"], stage["optim"]["lr"], stage["optim"]["warmup_images"] / 2048) == ("adamw", 1e-4, 10_000)
    beautiful = {"min_side": 512, "min_aesthetic": 5, "max_watermark": 0.5}
    assert [stages[name].get("filter") for name in FOUR] == [None, {"min_side": 1024}, beautiful, beautiful]
    assert [stages[name].get("caption_dropout", 0) for name in FOUR] == [0, 0, 0, 0.1] and recipe()["models"]["diffusion"][
        "caption_dropout"
    ] == 0
    run = build(small() | {"models": {**SMALL, "diffusion": recipe()["models"]["diffusion"]}}, Run, "test")
    with_text = run.models["diffusion"].network
    assert with_text.channels == (320, 640, 1280, 1280) and with_text.checkpointing and run.models["diffusion"].process.target == "epsilon"


@pytest.mark.slow
def test_all_four_stages_run_on_the_web_corpus(tmp_path: Path) -> None:
    file, out = tmp_path / "sd1-small.yaml", tmp_path / "out"
    file.write_text(json.dumps(small()), encoding="utf-8")  # which is YAML, too
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "train.py", str(file), f"out={out}"], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((out / "stages" / name / "done.json").read_text()) for name in FOUR}
    assert [entry["images"] for entry in found.values()] == [16] * 4 and (out / "model" / "model_index.json").is_file()
    identity = {name: entry["identity"] for name, entry in found.items()}
    prints = {name: entry["data"] for name, entry in identity.items()}
    assert len(set(prints.values())) == 3 and prints["v1-2"] == prints["v1-4"]
    assert [entry["model"]["caption_dropout"] for entry in identity.values()] == [0, 0, 0, 0.1]
    assert "filter" not in identity["v1-1-256"]["settings"] and identity["v1-1"]["settings"]["filter"]["min_side"] == 128
    resolved = parse((out / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    assert (
        resolved["models"]["diffusion"]["network"]["channels"] == UNET["channels"]
        and "preset" not in resolved["models"]["diffusion"]["network"]
    )


def test_without_data_it_says_so_in_one_line(tmp_path: Path) -> None:
    from ldm.config.errors import UserError

    values = small() | {"data": recipe()["data"]}
    with pytest.raises(UserError) as error:
        build(values, Run, "configs/sd1.yaml")
    assert str(error.value) == "configs/sd1.yaml: data.path: required, but not given"
