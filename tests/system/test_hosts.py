"""Two hosts in network namespaces: the commands of docs/distributed.md train to the end, and a host that is lost ends the other by name."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import hosts
import pytest
import tiny
from hosts import DEBIAN, Host, Started
from safetensors.numpy import load_file
from test_distributed import PLAIN

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing()), pytest.mark.timeout(600)]
WORDS = ["configs/quickstart.yaml", *tiny.WORDS, *PLAIN]
LONG = ["stages.autoencoder.images=80000", "stages.autoencoder.save_every_images=80", "stages.autoencoder.log_every_steps=5"]
SLURM = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_JOB_ID": "4711",
}


def line_of_the_page(begins: str, number: int) -> list[str]:
    """A command of the page as it is typed on a machine, with one process there in place of one for each GPU."""
    page = (tiny.ROOT / "docs" / "distributed.md").read_text().replace("\\\n", " ")
    (line,) = (line for line in page.splitlines() if line.startswith(begins))
    for said, here in (("--nproc-per-node gpu", "--nproc-per-node 1"), ("--num_processes 16", "--num_processes 2")):
        line = line.replace(said, here)
    line = line.replace("--machine_rank 0", f"--machine_rank {number}")
    words = shlex.split(line, comments=True)
    return [str(Path(sys.executable).parent / words[0]), *words[1 : words.index("CONFIG")]]


def as_tasks(both: list[Host], *words: str, **more: str) -> list[Started]:
    """`srun python train.py` on two hosts."""
    return [
        host.start(sys.executable, "train.py", *WORDS, *words, SLURM_PROCID=str(host.number), **SLURM, LDM_TIMEOUT_S="30", **more)
        for host in both
    ]


def product(out: Path) -> dict[str, Any]:
    """The autoencoder's weights."""
    return load_file(out / "stages/autoencoder/model/vae/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("by", ["torchrun --nnodes 2", "accelerate launch --config_file configs/accelerate/several-machines.yaml", "srun"])
def test_the_commands_of_the_page_train_on_two_hosts(by: str, tmp_path: Path) -> None:
    """Each host's own name leads to 127.0.1.1, as Debian installs it."""
    with hosts.hosts(tmp_path, DEBIAN) as both:
        out = f"out={tmp_path / 'run'}"
        if by == "srun":
            started = as_tasks(both, out)
        else:
            started = [host.start(*line_of_the_page(by, host.number), *WORDS, out) for host in both]
        assert [one.wait(280) for one in started] == [0, 0]
        assert re.search(r"launched by .*: 2 processes on 2 machines \(", started[0].said), started[0].said
        assert all(bool((value == value).all()) for value in product(tmp_path / "run").values())


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_whose_power_is_cut_ends_the_other_by_name(lost: int, tmp_path: Path) -> None:
    with hosts.hosts(tmp_path) as both:
        started = as_tasks(both, *LONG, f"out={tmp_path / 'run'}")
        started[0].until("of 80,000", 200)
        both[lost].die()
        left = started[1 - lost]
        assert left.wait(90) == 1
        last = left.said.strip().splitlines()[-1]
        assert re.match(rf"ldm train: rank {lost} (is gone, killed|gives no sign of life any more, killed)", last), left.said
