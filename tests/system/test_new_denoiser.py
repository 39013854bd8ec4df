"""A denoiser of another shape (tests/patch_transformer.py: one file, one name) goes through whole commands and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import patch_transformer
import pytest
import tiny
import torch

from ldm.formats.part import load_part
from ldm.models import denoiser

SCRIPT = "import sys, patch_transformer; patch_transformer.register(); from ldm.__main__ import main; sys.exit(main(sys.argv[1:]))"
WORDS = [
    *(word for word in tiny.WORDS if not word.startswith("models.diffusion.network")),
    "models.diffusion.network={kind: patches, width: 32, depth: 1}",
    "stages.diffusion-high.images=512",
    "stages.diffusion-high.save_every_images=16",
    "stages.diffusion-high.save_beside=false",
]


def ldm(*words: str) -> subprocess.Popen[str]:
    """`ldm` that knows the new network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tiny.ROOT), str(tiny.ROOT / "tests")])}
    command = [sys.executable, "-c", SCRIPT, *words]
    return subprocess.Popen(command, cwd=tiny.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def said(*words: str) -> str:
    process = ldm(*words)
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    return text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("patches") / "whole"
    said("train", "configs/quickstart.yaml", *WORDS, f"out={out}")
    return out


@pytest.mark.slow
def test_it_is_killed_and_resumes_to_the_bit(trained: Path) -> None:
    again = trained.parent / "again"
    shutil.copytree(trained, again, ignore=shutil.ignore_patterns("diffusion-high", "evaluation", "export", "model_index.json"))
    process = ldm("train", "configs/quickstart.yaml", *WORDS, f"out={again}")
    state, until = again / "stages" / "diffusion-high" / "state", time.monotonic() + 120
    while not list(state.glob("images-*")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (again / "stages" / "diffusion-high" / "done.json").exists()
    told = said("train", "configs/quickstart.yaml", *WORDS, f"out={again}")
    assert "diffusion-high: going on from" in told and "diffusion-low: done already" in told
    one, two = (load_part(folder / "model" / "transformer")[1] for folder in (trained, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_it_stands_in_plan_report_and_measurements(trained: Path) -> None:
    plan = said("train", "configs/quickstart.yaml", *WORDS, f"out={trained}-planned", "--plan")
    assert re.search(r"diffusion [1-9][0-9,]+", plan) and re.search(r"run +diffusion-low +train", plan)
    metrics = json.loads((trained / "metrics.json").read_text())["evaluations"]["evaluation"]
    assert "frechet" in metrics and "adherence" in metrics
    assert "kind: patches" in (trained / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_is_reopened_and_draws_from_the_command_line_and_on_the_page(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    from PIL import Image

    from ldm.demo.studio import Studio
    from ldm.families.registry import load
    from ldm.sampling.recipe import read_recipe

    said("sample", "a blue ring", "--model", str(trained), "--steps", "2", "--out", str(tmp_path / "drawn"))
    [made] = (tmp_path / "drawn").glob("*.png")
    monkeypatch.setattr(denoiser, "Network", denoiser.Network)
    patch_transformer.register()
    from ldm.demo.studio import DrawOrder

    with Studio(load(trained)) as studio:  # what stands behind the page
        [drawn] = studio.result(studio.submit("ann", DrawOrder((read_recipe(made),))))  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(Image.open(made)), drawn)
