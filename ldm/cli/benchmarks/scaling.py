"""Benchmark of data-parallel scaling: images a second of one process and of two, each with the same batch and one thread of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file

from ldm.cli.benchmarks.models import QUICKSTART, TINY, build_family, distance, moments, small
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.cli.benchmarks.training import Precision, trainer
from ldm.config.files import isolated
from ldm.diffusion.batch import rows
from ldm.distributed.processes import leave

WORLD = 2
STEPS = {"small": 2, "quickstart": 5, "tiny": 1}  # updates of one measurement
BATCH = {"small": 4, "quickstart": 64, "tiny": 2}  # of each process
NAMES = {"small": "small UNet, 32x32 latents, fp32", "quickstart": "quickstart's UNet, 8x8 latents, bf16", "tiny": "toy UNet, fp32"}


def two_processes(setup: Setup) -> Iterator[Case]:
    """B22: processes that live as long as a case, and wait at a pipe while the others are timed."""
    for shape in ["tiny"] if setup.tiny else ["small", "quickstart"]:
        with ExitStack() as open_:
            one = open_.enter_context(Team(1, shape, setup.folder))
            two = open_.enter_context(Team(WORLD, shape, setup.folder))
            apart = open_.enter_context(Team(WORLD, shape, setup.folder, connected=False))
            tolerance, found = 5e-2 if shape == "quickstart" else 1e-4, distance([two.gradients()], [one.gradients()])

            def check(found: float = found) -> float:
                return found  # of the weights as they were at the start

            # Two that have nothing to do with each other tell what sharing the machine's memory costs by itself.
            for peer, against in ((one, "one"), (apart, "two that are not connected")):
                yield Case(
                    name=f"{NAMES[shape]}, batch {BATCH[shape]} each; against {against}",
                    kind="equal",
                    ours=two.seconds,
                    theirs=peer.seconds,
                    check=check,
                    tolerance=tolerance,
                    returned="seconds",
                    error="relative error of the gradients of all samples by one",
                    notes={"processes": WORLD, "threads_each": 1, "steps": STEPS[shape], "batch_each": BATCH[shape]},
                )


class Team:
    """Pool of training processes, told what to do through pipes: together, or not `connected`, each by itself."""

    def __init__(self, world: int, shape: str, folder: Path, connected: bool = True) -> None:
        self.world, self.shape, self.folder = world, shape, folder
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        self.members = [
            subprocess.Popen(
                isolated("ldm.cli.benchmarks.scaling", shape, str(folder)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_environment(rank, world if connected else 1, port),
            )
            for rank in range(world)
        ]

    def __enter__(self) -> Team:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for member in self.members:
            member.kill()
            member.communicate()

    def tell(self, *words: str) -> list[str]:
        """What each answers, rank by rank."""
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write(" ".join(words) + "\n")
            member.stdin.flush()
        said = [member.stdout.readline().strip() for member in self.members if member.stdout is not None]
        if not all(said):
            raise RuntimeError(f"a process of {self.world} ended; what it said stands above")
        return said

    def seconds(self) -> float:
        """Wall time of an image, by the slowest."""
        steps = STEPS[self.shape]
        return max(float(text) for text in self.tell("train", str(steps))) / (steps * BATCH[self.shape] * self.world)

    def gradients(self) -> torch.Tensor:
        """Of the first samples of two processes, averaged."""
        file = self.folder / f"gradients-{self.world}.safetensors"
        self.tell("gradients", str(file))
        return load_file(file)["gradients"]


def _environment(rank: int, world: int, port: str) -> dict[str, str]:
    said = {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if world == 1 else ()
    return {name: value for name, value in {**os.environ, **said}.items() if name not in left_out}


def member(name: str, folder: Path) -> None:
    """One process: reads `train N` and `gradients FILE` from its input until that ends."""
    torch.set_num_threads(1)
    shape = {"small": small(False), "quickstart": QUICKSTART, "tiny": TINY}[name]
    family = build_family(shape, "cpu")
    torch.manual_seed(0)
    samples, nothing = moments(replace(shape, batch=WORLD * BATCH[name])), None
    world = int(os.environ.get("WORLD_SIZE", "1"))
    precision: Precision = "bf16" if name == "quickstart" else "fp32"
    made = trainer(family, precision, folder, nothing, shape.pixels, world * BATCH[name])
    model = made.processes.wrap(family)
    shares = [rows(samples, i * BATCH[name], (i + 1) * BATCH[name]) for i in range(WORLD)]
    own = shares[made.processes.rank]
    for line in sys.stdin:
        order, word = line.split()
        if order == "gradients":
            parts = shares if world == 1 else [own]
            for part in parts:
                made.gradients(model, part)
            found = [p.grad.flatten() / len(parts) for _, p in sorted(family.denoiser.named_parameters()) if p.grad is not None]
            if made.processes.main:
                save_file({"gradients": torch.cat(found)}, word)
            family.zero_grad(set_to_none=True)
            print("written", flush=True)
            continue
        made.processes.wait()
        began = time.perf_counter()
        for _ in range(int(word)):
            made._update(model, own)
            made.step += 1
        print(time.perf_counter() - began, flush=True)
    leave(0)


if __name__ == "__main__":
    member(sys.argv[1], Path(sys.argv[2]))
