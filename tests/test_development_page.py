"""The development page: its examples work, and it names the commands, marks and registries that there are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "development.md"


@pytest.mark.slow
def test_every_example_works_once_it_is_registered(kl_model: Path) -> None:
    worker = Path(__file__).with_name("development_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, worker, PAGE, kl_model], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("done:") == len(
        re.findall(r"^```python$|^Register: `[^`]+` in `\w+`, `", PAGE.read_text(encoding="utf-8"), re.M)
    )


def test_the_commands_are_those_of_the_makefile_and_of_ci() -> None:
    told = PAGE.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):.*\n\t", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert [name for name in targets if name.startswith("test") and f"`make {name}`" not in told] == []
    checks = re.findall(r"^\.venv/bin/(python -m .+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    assert checks and [check for check in checks if f"`{check}`" not in told] == []
