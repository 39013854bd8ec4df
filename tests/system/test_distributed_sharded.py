"""FSDP2: weights, optimiser and averages split over processes learn the same, and are saved so that any number goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import several
import torch
from safetensors.torch import load_file

from ldm.distributed.processes import Learners

WORKER = Path(__file__).with_name("sharded_worker.py")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "model" / "unet").glob("*.safetensors")
    return load_file(file)


def test_sharded_is_whole_and_goes_on_with_any_number(kl_model: Path, tmp_path: Path) -> None:
    import sharded_worker

    port = several.free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(kl_model), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=several.environment(rank, 2, port, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2"),
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=90)[0] for process in running]
    assert all(process.returncode == 0 for process in running), said
    assert "sharded over 2 processes (FSDP2)" in said[0]
    whole = weights(tmp_path / "whole")
    for folder in ("sharded", "again"):
        found = weights(tmp_path / folder)
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole), folder
    assert list((tmp_path / "sharded" / "samples").glob("*.png"))

    alone = sharded_worker.trainer(kl_model, tmp_path / "alone", Learners())
    assert 0 < alone.step < sharded_worker.STAGE.steps
    alone.run()
    found = weights(tmp_path / "alone")
    assert max(float((found[name] - whole[name]).abs().max()) for name in whole) < 1e-3
