"""The most memory that a piece of code takes, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASK = """
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
import torch
torch.set_num_threads(1)
"""


def peak_kib(before: str, counted: str, **environment: str) -> int:
    """KiB that running `counted` adds to the process's peak after `before`; skips the test where nobody counts them."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    code = f"{ASK}\n{before}\nstart = peak()\n{counted}\nprint(peak() - start)"
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | environment)
    assert found.returncode == 0, found.stderr
    return int(found.stdout)
