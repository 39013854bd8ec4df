"""Several processes of one command, connected by gloo, without a launcher's two seconds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny

FAULTY = Path(__file__).with_name("faulty.py")


@dataclass
class Ended:
    """What became of the processes."""

    codes: list[int]  # by rank
    said: list[str]  # by rank
    seconds: float  # from the first end to the last

    @property
    def last(self) -> str:
        """The last line of all who spoke."""
        return [line for text in self.said for line in text.strip().splitlines()][-1]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, world: int, port: int, **more: str) -> dict[str, str]:
    """What a launcher tells each of its processes."""
    said = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "HF_HUB_OFFLINE": 1,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return {**os.environ, **{name: str(value) for name, value in said.items()}, **more}


def train(
    world: int,
    *words: str,
    config: str = "configs/quickstart.yaml",
    fault: str = "",
    limit_s: float = 600,
    within_s: float = 90,
    sizes: Sequence[str] = tuple(tiny.WORDS),
) -> Ended:
    """Train with so many processes, whose fault is `kind:rank:step`; all of them end."""
    port = free_port()
    command = [sys.executable, str(FAULTY), config, *sizes, *words]
    running = [
        subprocess.Popen(
            command,
            cwd=tiny.ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(rank, world, port, FAULT=fault, LDM_TIMEOUT_S=str(limit_s)),
        )
        for rank in range(world)
    ]
    end, first, last = time.monotonic() + within_s, 0.0, 0.0
    try:
        while any(process.poll() is None for process in running) and time.monotonic() < end:
            if not first and any(process.poll() is not None for process in running):
                first = time.monotonic()
            time.sleep(0.02)
            if fault.startswith("stop") and sum(process.poll() is None for process in running) == 1:
                break  # a stopped process does not end by itself
        last = time.monotonic()
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
    said = [process.communicate()[0] for process in running]
    return Ended([process.returncode for process in running], said, last - (first or last))
