"""Benchmark environment: hardware, load, versions, commit, and measured peak FLOP/s."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ldm.cli.benchmarks.measure import clock_for
from ldm.cli.benchmarks.rows import Setup

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "torchvision", "numpy", "pillow", "safetensors", "tokenizers")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Everything about this machine that a figure depends on; loads nothing heavy on a CPU."""
    from ldm.config.version import __version__
    from ldm.distributed.environment import usable_cores

    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "ldm": __version__,
        "processor": processor(),
        "cores": usable_cores(),
        "threads": threads,
        "load": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions(),
        "device": device,
        "variables": {n: v for n, v in sorted(os.environ.items()) if n.startswith(("OMP_", "MKL_", "GOMP_", "MALLOC_"))},
    }
    if device == "cuda":
        import torch

        own = torch.cuda.get_device_properties(0)
        found["device"] = f"{own.name}, {own.total_memory / 1e9:.0f} GB"
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str]:
    """The installed versions of the packages that matter."""
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit that this package is run from, "+" behind it where files differ; empty outside a checkout."""
    root = Path(__file__).parents[3]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not (root / ".git").exists():
            return ""
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "ldm") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak(setup: Setup) -> dict[str, float]:
    """Measured GFLOP/s (2 per multiply-add) of a square matrix product and of a 3x3 convolution: the best of five."""
    import torch
    from torch.nn import functional as F

    device, (_, clock) = setup.device, clock_for(setup)
    side = 64 if setup.tiny else 8192 if device == "cuda" else 1024
    batch, channels, place = (1, 16, 16) if setup.tiny else (32, 512, 64) if device == "cuda" else (8, 128, 32)
    found: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(side, side, device=device).to(dtype)
        x = torch.randn(batch, channels, place, place, device=device).to(dtype)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
        work: dict[str, tuple[Callable[[], object], int]] = {
            "matmul": (partial(torch.matmul, a, a), 2 * side**3),
            "conv": (partial(F.conv2d, x, weight, padding=1), 2 * batch * channels**2 * 9 * place**2),
        }
        for kind, (call, operations) in work.items():
            with torch.inference_mode():
                seconds = [clock(call, 3) / 3 for _ in range(6)][1:]
            found[f"{kind}_{name}"] = round(operations / max(min(seconds), 1e-9) / 1e9, 1)
    return found
