"""Benchmark of asynchronous checkpointing: how long training stalls, and how long the writing takes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldm.cli.benchmarks.rows import Case, Setup
from ldm.formats import atomic
from ldm.training import checkpoint
from ldm.training.snapshot import BackgroundWriter, Snapshot

PARAMETERS = 12_500_000  # weights, two moments and averages in float32: 200 MB
TENSORS = 100
STEP = 0.15  # seconds of the step's passes, during which the copy is made


def beside(setup: Setup) -> Iterator[Case]:
    """B21."""
    torch.manual_seed(0)
    size = 16 if setup.tiny else PARAMETERS // TENSORS
    groups = {
        name: {f"{name}.{i}": torch.randn(size, device=setup.device) for i in range(times * TENSORS)}
        for name, times in (("model", 1), ("optimizer", 2), ("ema", 1))
    }
    snapshot, writer = Snapshot(), BackgroundWriter()
    written: list[float] = []
    later = {(group, name) for group, tensors in groups.items() for name in tensors}
    square = torch.randn(512, 512, device=setup.device)

    def passes(times: int) -> float:
        """The forward and backward pass of a step, or what stands for it here."""
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(square, square)
        if setup.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    passes(3)
    times = 1 if setup.tiny else max(1, round(3 * STEP / passes(3)))

    def save(folder: str, number: int, tensors: dict[str, dict[str, Tensor]]) -> Path:
        return checkpoint.save_state(setup.folder / folder, number, tensors, checkpoint.Meta(key="", step=number, images=number), 1)

    def ours() -> float:
        alone = passes(times)
        began = time.perf_counter()
        taken = snapshot.take(groups, keep=True, later=later)

        def work() -> None:
            snapshot.finish()
            save("beside", len(written), taken)

        writer.start(work)
        passes(times)
        snapshot.wait()
        stalled = max(1e-4, time.perf_counter() - began - alone)
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
        sums = [atomic.verify(checkpoint.states(setup.folder / folder)[0]) for folder in ("beside", "waiting")]
        return float(sum(sums[0][name] != sums[1][name] for name in sums[0] if name.endswith(".safetensors")))

    total = sum(t.numel() * t.element_size() for group in groups.values() for t in group.values())
    yield Case(
        name=f"a state of {total / 1e6:.0f} MB: stall, and a save that training waits for",
        kind="equal",
        ours=ours,
        theirs=theirs,
        check=check,
        tolerance=0.0,
        error="files that differ",
        unit="save",
        returned="seconds",
        notes={"bytes": total, "tensors": 4 * TENSORS, "written_s": written},
    )
