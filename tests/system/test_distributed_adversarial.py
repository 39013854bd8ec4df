"""The adversarial stage learns the same from a batch of 8, whether one, two or four processes share it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import several
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("adversarial_worker.py")


def learnt(world: int, folder: Path, micro_batch: int = 0) -> dict[str, torch.Tensor]:
    folder.mkdir()
    port = several.free_port()
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(micro_batch)],
            env=several.environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=90)[0] for process in running]
    assert all(process.returncode == 0 for process in running), said
    return load_file(folder / "found.safetensors")


def test_discriminator_generator_and_lambda_do_not_depend_on_how_many_share_the_batch(tmp_path: Path) -> None:
    one = learnt(1, tmp_path / "1")
    names = {name.split(".")[2] for name in one if name.startswith("vq.4.")}
    assert {"lambda", "perplexity", "discriminator", "adversarial", "grad_norm_discriminator"} <= names and "vq.5.codes_redrawn" in one
    assert float(one["vq.5.lambda"]) > 0 and "vq.0.lambda" not in one  # the discriminator's start lies between
    assert float(torch.stack([one[f"vq.{step}.codes_redrawn"] for step in (1, 3, 5)]).sum()) > 0
    for world in (2, 4):
        several_ = learnt(world, tmp_path / str(world))
        assert several_.keys() == one.keys()
        for name, value in one.items():
            # float64: what is left is the order of sums, through six steps of Adam.
            torch.testing.assert_close(several_[name], value, rtol=1e-6, atol=1e-9, msg=f"{world} processes: {name}")
