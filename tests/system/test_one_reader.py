"""A checkpoint is read once for each machine, and all machines go on from the same one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import several
import torch

from ldm.training.checkpoint import Meta, save_state, size_of

WORKER = Path(__file__).with_name("one_reader_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no /proc here")]


def state(folder: Path, images: int, seed: int = 0) -> int:
    """A state of 16 MB; its bytes."""
    torch.manual_seed(seed)
    groups = {
        "model": {"a": torch.randn(1024, 2048), "b": torch.randn(2**20).bfloat16(), "c": torch.tensor(3)},
        "optimizer": {"a": torch.randn(2**20), "empty": torch.zeros(0, 4)},
    }
    save_state(folder, images, groups, Meta(key="k", step=images // 4, images=images), keep=2)
    return size_of(groups)


def started(folder: Path, out: Path, hosts: list[str]) -> list[dict[str, Any]]:
    out.mkdir()
    port = several.free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=several.environment(rank, len(hosts), port, SLURMD_NODENAME=name),
        )
        for rank, name in enumerate(hosts)
    ]
    said = [process.communicate(timeout=90)[0] for process in running]
    assert all(process.returncode == 0 for process in running), said
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(len(hosts))]


def test_one_process_of_a_machine_reads_and_all_hold_the_same(tmp_path: Path) -> None:
    size = state(tmp_path / "state", 8)
    told = started(tmp_path / "state", tmp_path / "out", ["one", "one", "other"])
    assert len({each["sum"] for each in told}) == 1 and {each["step"] for each in told} == {2}
    reads = [each["bytes"] / size for each in told]
    print("read of the state's bytes:", *(f"{share:.4f}" for share in reads))
    assert reads[0] < 1.1 and reads[2] < 1.1 and reads[1] < 0.1, reads
    (nothing,) = {(each["sum"], each["step"]) for each in started(tmp_path / "none", tmp_path / "out2", ["one", "one"])}
    assert nothing[1] is None


def test_machines_that_see_different_states_are_refused(tmp_path: Path) -> None:
    for rank, images in enumerate((8, 12)):
        state(tmp_path / f"state{rank}", images)
    told = started(tmp_path / "stateRANK", tmp_path / "out", ["one", "other"])
    for each in told:
        assert "one goes on from images-000000000008" in each["said"] and "other from images-000000000012" in each["said"], told
