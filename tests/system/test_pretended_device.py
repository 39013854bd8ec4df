"""Training, fine-tuning, samplers and edits on a pretended CUDA device and on Apple's: nothing on two devices, no float64 on mps, and
a bound on what a training step copies and reads back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT, WORKER = Path(__file__).parents[2], Path(__file__).with_name("pretended_worker.py")
STEPS = 8  # between the two trainings that are compared


@pytest.fixture(scope="module", params=["cuda", "mps"])
def found(request: pytest.FixtureRequest, kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the worker reports of the pretended device."""
    folder = tmp_path_factory.mktemp(request.param)
    pictures, out = folder / "pictures", folder / "out"
    pictures.mkdir()
    out.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a red circle")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save(out / "mask.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(WORKER), request.param, str(kl_model), str(pictures), str(out)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]) | {"said": ended.stderr, "kind": request.param}


def test_everything_runs(found: dict[str, Any]) -> None:
    assert len(found["codes"]) > 25
    assert not {name: code for name, code in found["codes"].items() if code}, found["said"][-6000:]


@pytest.mark.parametrize("drawing", ["drawn", "euler_a", "codes"])
def test_a_step_of_drawing_waits_for_nothing(found: dict[str, Any], drawing: str) -> None:
    few, more = (found["counts"][f"{drawing} in {steps} steps"] for steps in (4, 8))
    each = {name: (more.get(name, 0) - few.get(name, 0)) / 4 for name in ("read back", "device to host", "waited for")}
    if found["kind"] == "cuda":
        assert max(each.values()) <= 0, each  # the first drawing also fills what is kept for later ones
    else:
        assert each["read back"] <= 0, each


def test_a_step_reads_back_once_and_copies_little_without_waiting(found: dict[str, Any]) -> None:
    assert [found["codes"][name] for name in ("eight steps", "sixteen steps")] == [0, 0], found["said"][-6000:]
    short, long = (found["counts"][name] for name in ("eight steps", "sixteen steps"))
    counted = ("read back", "device to host", "host to device", "waited for")
    each = {name: (long.get(name, 0) - short.get(name, 0)) / STEPS for name in counted}
    # Whether loss and gradients are finite is read once; picture, noise, posterior's noise, time, dropout, size and position are sent.
    sent = 7 if found["kind"] == "cuda" else each["host to device"]
    assert each == {"read back": 1, "device to host": 0, "host to device": sent, "waited for": 0 if found["kind"] == "cuda" else sent}
    assert sent == 7
