"""The wheel: it holds what a run needs, and the quickstart is planned from a folder that is no clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_runs_the_quickstart_outside_of_the_clone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith("ldm_train-")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "installed")
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.*")}
    assert configs == {str(file.relative_to(tmp_path / "installed" / "ldm")) for file in (tmp_path / "installed/ldm/configs").rglob("*.*")}

    def ldm(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"}
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        ran = subprocess.run(
            [sys.executable, "-m", "ldm", *words], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=200
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    assert ldm("--version").startswith("ldm ")
    said = ldm("train", "configs/quickstart.yaml", "models.diffusion.network=ldm-cin256", "data.images=16", "data.val=4", "--plan")
    assert "run quickstart in runs/quickstart; 16 training and 4 validation images" in said
    assert re.search(r"diffusion 39\d,\d{3},\d{3}\n", said)  # a preset of the package: its width at the quickstart's latents and text
    assert not any((tmp_path / "elsewhere").iterdir())
