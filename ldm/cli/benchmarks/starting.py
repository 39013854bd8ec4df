"""Benchmarks in fresh processes: cold start, and peak memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm.cli.benchmarks.rows import Case, Setup
from ldm.config.files import isolated

ROOT = Path(__file__).parents[3]
# A value that cannot be, in a run that is right but for it: found before torch is loaded.
MISTAKEN = (
    "models: {text: {kind: clip}}\ndata: {kind: scenes}\nstages: {text: {kind: train, model: text, images: 64, resolution: 32, batch: 0}}\n"
)


def words(setup: Setup) -> Iterator[Case]:
    """B17: checked are the commands' exit codes, that they say something, and that none loads torch."""
    config = setup.folder / "mistaken.yaml"
    config.write_text(MISTAKEN)
    peer = [sys.executable, "-c", "from diffusers import StableDiffusionPipeline"]
    ours = {
        "ldm --help": ([sys.executable, "-m", "ldm", "--help"], 0),
        "ldm train with a mistake in the configuration": ([sys.executable, "-m", "ldm", "train", str(config)], 2),
    }
    for name, (command, code) in list(ours.items())[: 1 if setup.tiny else None]:

        def check(command: list[str] = command, code: int = code) -> float:
            imports = {**_environment(), "PYTHONPROFILEIMPORTTIME": "1"}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=imports)
            said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("import time:")]
            return float(abs(done.returncode - code) + (not said) + bool(re.search(r"\| +torch$", done.stderr, re.MULTILINE)))

        yield Case(
            name=name,
            kind="default",
            ours=partial(_seconds_of, command, code),
            theirs=partial(_seconds_of, peer),
            check=check,
            tolerance=0.0,
            error="wrong exit codes, silence, or torch loaded",
            unit="start",
            returned="seconds",
        )


def first_call(setup: Setup) -> Iterator[Case]:
    """B18."""
    from ldm.cli.benchmarks.models import build_family, counts, small, twin_pipeline

    shape = small(setup.tiny)
    folder = setup.folder / "model"
    twin_pipeline(build_family(shape, "cpu").eval()).save_pretrained(folder)
    results = {side: setup.folder / f"{side}.npy" for side in ("ours", "theirs")}

    def start(side: str) -> float:
        return _seconds_of(_child("first_call", side, setup, str(folder), str(results[side])))

    checked: dict[str, float] = {}  # these starts are measurements too

    def check() -> float:
        checked.update({side: start(side) for side in results})
        ours, theirs = (np.load(file).astype(np.float64) for file in results.values())
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())

    yield Case(
        name="a whole model from its folder, UNet once",
        kind="default",
        ours=lambda: checked.pop("ours", 0.0) or start("ours"),
        theirs=lambda: checked.pop("theirs", 0.0) or start("theirs"),
        check=check,
        tolerance=1e-4,
        error="relative error of the UNet's output",
        unit="start",
        returned="seconds",
        notes=counts(shape),
    )


def memory_of_drawing(setup: Setup) -> Iterator[Case]:
    """B19."""
    yield _memory(setup, "draw", "drawing one picture, bf16")


def memory_of_training(setup: Setup) -> Iterator[Case]:
    """B20."""
    yield _memory(setup, "train", "training step, batch 1, bf16, recomputed; ours offloads")


def _memory(setup: Setup, task: str, name: str) -> Case:
    """Peak bytes: of the device's allocator on a GPU, of the whole process on a CPU."""

    def peak(side: str) -> float:
        return float(seconds_of(_child(task, side, setup))[1].split()[-1])

    def check() -> float:
        from ldm.cli.benchmarks.child import compare

        return compare(task, setup.size, setup.device)

    return Case(
        name=name,
        kind="equal",
        ours=lambda: peak("ours"),
        theirs=lambda: peak("theirs"),
        check=check,
        tolerance=0.2,
        error="relative error of the result",
        unit="process",
        returned="bytes",
    )


def _child(task: str, side: str, setup: Setup, *more: str) -> list[str]:
    return isolated("ldm.cli.benchmarks.child", task, side, setup.size, setup.device, *more)


def _environment() -> dict[str, str]:
    """The child's: this package and no other, one thread, no network; its bytecode is kept, as the peers' was by pip."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _seconds_of(command: Sequence[str], code: int = 0) -> float:
    return seconds_of(command, code)[0]


def seconds_of(command: Sequence[str], code: int = 0) -> tuple[float, str]:
    """CPU seconds, user and system, of a command and its children, and what it printed.

    Raises:
        RuntimeError: if it ends with another code.
    """
    before = os.times()
    done = subprocess.run(list(command), cwd=ROOT, capture_output=True, text=True, env=_environment())
    after = os.times()
    if done.returncode != code:
        lines: Any = (done.stderr or done.stdout).strip().splitlines() or [""]
        raise RuntimeError(f"{' '.join(command[1:4])} ended with {done.returncode}: {lines[-1][:300]}")
    return after.children_user + after.children_system - before.children_user - before.children_system, done.stdout
