"""The row of checkpoints: how long training stands still for one that is written beside it, and how long the writing takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm import checkpoint
from ldm.benchmarks.rows import Case, Setup
from ldm.snapshot import Snapshot, Writer

PARAMETERS = 12_500_000  # weights, two moments and averages in float32: 200 MB
TENSORS = 100


def beside(setup: Setup) -> Iterator[Case]:
    """B21."""
    torch.manual_seed(0)
    size = 16 if setup.tiny else PARAMETERS // TENSORS
    groups = {
        name: {f"{name}.{i}": torch.randn(size, device=setup.device) for i in range(times * TENSORS)}
        for name, times in (("model", 1), ("optimizer", 2), ("ema", 1))
    }
    snapshot, writer = Snapshot(), Writer()
    written: list[float] = []

    def save(folder: str, number: int, tensors: dict[str, dict[str, Tensor]]) -> Path:
        return checkpoint.save_state(setup.folder / folder, number, tensors, {"number": number}, 1)

    def ours() -> float:
        began = time.perf_counter()
        taken = snapshot.take(groups, keep=True)
        writer.start(partial(save, "beside", len(written), taken))
        stalled = time.perf_counter() - began
        writer.end()
        written.append(writer.seconds)
        os.sync()  # so that the next save meets a quiet disk
        return stalled

    def theirs() -> float:
        began = time.perf_counter()
        save("waiting", 0, groups)
        spent = time.perf_counter() - began
        os.sync()
        return spent

    def check() -> float:
        ours()
        theirs()
        sums = [checkpoint.verify(checkpoint.states(setup.folder / folder)[0]) for folder in ("beside", "waiting")]
        return float(sum(sums[0][name] != sums[1][name] for name in sums[0] if name.endswith(".safetensors")))

    total = sum(t.numel() * t.element_size() for group in groups.values() for t in group.values())
    yield Case(
        name=f"a state of {total / 1e6:.0f} MB: stall, and a save that training waits for", kind="equal", ours=ours, theirs=theirs,
        check=check, tolerance=0.0, error="files that differ", unit="save", returned="seconds",
        notes={"bytes": total, "tensors": 4 * TENSORS, "written_s": written},
    )  # fmt: skip
