"""Children that die: work in a process of its own, which is killed at a point of its writing or after a time."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.formats import atomic
from ldm.training import checkpoint

POINTS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")  # of os: what a save does to the disk, besides filling files


def child(work: Callable[[], None], kill_after_s: float | None = None) -> bool:
    """Run `work` in a forked process; whether it came to its end before it was killed.

    Raises:
        AssertionError: if it failed by itself; its traceback is printed.
    """
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def dying_at(point: int, work: Callable[[], None]) -> Callable[[], None]:
    """`work`, but it is killed before the point-th time that it touches the disk."""

    def run() -> None:
        left = [point]

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*words: Any, **named: Any) -> Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return real(*words, **named)

            return call

        for name in POINTS:
            setattr(os, name, counted(getattr(os, name)))
        atomic.write_tensors = counted(atomic.write_tensors)
        work()

    return run


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """A small state that tells its step in every value."""
    made = torch.Generator().manual_seed(step)
    return {
        "model": {"a": torch.full((40, 30), float(step)), "b": torch.rand(500, generator=made)},
        "ema": {"a": torch.full((40, 30), step + 0.5)},
        "optimizer": {"0.exp_avg": torch.full((40, 30), -float(step))},
    }


def save(folder: Path, step: int, keep: int = 1) -> Path:
    """Commit such a state."""
    return checkpoint.save_state(folder, step, tensors(step), checkpoint.Meta(key="k", step=step, images=step), keep)


def is_whole(found: Any, step: int) -> bool:
    """Whether a loaded state is that of the step and of nothing else."""
    _, loaded, meta = found
    wanted = tensors(step)
    same = loaded.keys() == wanted.keys() and all(
        torch.equal(loaded[group][name], value) for group in wanted for name, value in wanted[group].items()
    )
    return bool(same) and meta.step == step


def flip(folder: Path, chance: random.Random) -> Callable[[], None]:
    """Turn one bit of one file of a folder; returns what turns it back."""
    file = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    data = bytearray(file.read_bytes())
    place, bit = chance.randrange(len(data)), 1 << chance.randrange(8)
    data[place] ^= bit
    file.write_bytes(data)

    def back() -> None:
        data[place] ^= bit
        file.write_bytes(data)

    return back
