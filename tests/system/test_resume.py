"""Stopped anywhere, the same command goes on, and ends with the same bits; two processes do what one does."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
from safetensors.numpy import load_file

from ldm.__main__ import main
from ldm.formats import atomic

STAGES = tiny.only("text", "autoencoder")
WORDS = [
    *STAGES,
    "stages.autoencoder.images=160",
    "stages.autoencoder.save_every_images=16",
    "stages.text.save_every_images=16",
    "models.autoencoder.adversarial={weight: 0.5, start: 0.3, discriminator: {channels: 8, layers: 1, norm_groups: 4}}",
    "stages.text.images=96",
    "stages.text.log_every_steps=1",
    "stages.autoencoder.log_every_steps=1",
]


def weights(out: Path) -> dict[str, bytes]:
    """Every product's manifest of sums."""
    return {stage: (out / "stages" / stage / "model" / "manifest.json").read_bytes() for stage in ("text", "autoencoder")}


def _kept(out: Path) -> bool:
    return any(out.glob("stages/*/state/images-*/manifest.json")) or any(out.glob("stages/*/done.json"))


def _steps(log: Path) -> int:
    return log.read_bytes().count(b'"step"') if log.exists() else 0


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny.train(f"out={whole}", *WORDS)
    chance, kills = random.Random(0), 0
    for _ in range(2):  # ten and a hundred kills: tests/test_checkpoint_faults.py, tests/soak
        process = tiny.start(f"out={killed}", *WORDS)
        # Imports take seconds: wait for the first steps of this start, then kill at a random moment.
        log, before = killed / "log.jsonl", _steps(killed / "log.jsonl")
        deadline = time.monotonic() + 60
        # A busy disk may commit the first checkpoint a while after its step.
        while time.monotonic() < deadline and process.poll() is None and (_steps(log) <= before or not _kept(killed)):
            time.sleep(0.005)
        time.sleep(chance.random() * 0.4)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    said = tiny.train(f"out={killed}", *WORDS)
    assert kills >= 1 and ("going on from" in said or "done already" in said)
    assert weights(killed) == weights(whole)


def test_a_termination_signal_saves_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*tiny.only("autoencoder"), "stages.autoencoder.images=40000", f"out={out}"]
    process = tiny.start(*words)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (log.exists() and '"step"' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "everything is saved" in said, said
    assert list((out / "stages" / "autoencoder" / "state").glob("images-*/manifest.json"))
    process = tiny.start(*words)
    time.sleep(0.1)
    deadline, going_on = time.monotonic() + 90, False
    while time.monotonic() < deadline and not going_on:
        going_on = "going on from" in log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert going_on


def test_two_starts_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [*tiny.only("autoencoder"), "stages.autoencoder.images=40000", f"out={out}"]
    first = tiny.start(*words)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (out / "log.jsonl").exists():
        time.sleep(0.05)
    second = tiny.start(*words)
    said, _ = second.communicate(timeout=90)
    assert second.returncode == 2 and f"in use by process {first.pid}" in said and "Traceback" not in said
    first.kill()
    first.communicate()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    words = [*tiny.only("autoencoder"), "stages.autoencoder.precision=fp32", "stages.autoencoder.ema=0"]
    words += ["stages.autoencoder.optim={kind: adamw, lr: 1e-3}"]
    words += ["models.autoencoder.adversarial={weight: 0.5, start: 0.3, discriminator: {channels: 8, layers: 1, norm_groups: 4}}"]
    tiny.train(f"out={tmp_path / 'one'}", *words)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    said = tiny.train(f"out={tmp_path / 'two'}", *words, launcher=launcher)
    assert "launched by torchrun: 2 processes (torchrun's --nproc-per-node and --nnodes)" in said
    name = "stages/autoencoder/model/vae/diffusion_pytorch_model.safetensors"
    one, two = (load_file(tmp_path / run / name) for run in ("one", "two"))
    worst = max(float(abs(one[k] - two[k]).max()) for k in one)
    # Adam divides by the root of tiny squares, which sums in another order perturb: equal up to that, not to the bit.
    assert worst < 2e-3, worst


@pytest.mark.parametrize("failures", [2, 9])
def test_a_full_disk_is_told_and_tried_again_but_not_for_ever(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left, write = [failures], atomic.write_tensors

    def full(path: Path, tensors: object) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, tensors)  # type: ignore[arg-type]

    monkeypatch.setattr(atomic, "write_tensors", full)
    words = [*tiny.WORDS, *tiny.only("autoencoder"), "stages.autoencoder.save_every_images=8", f"out={tmp_path / 'run'}"]
    code = main(["train", "configs/quickstart.yaml", *words])
    said = capsys.readouterr().err
    assert "No space left on device" in said and "bytes needed" in said and "Traceback" not in said
    if failures == 2:
        assert code == 0 and said.count("tries again") == 2 and "autoencoder: finished" in said
    else:
        assert code == 2 and "run the same command again" in said
