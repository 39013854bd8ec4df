"""Two hosts in network namespaces, and what breaks between them: a peer that does not come, cables, launchers, stopped processes, restarts,
a host that is lost in each stage.

About twenty minutes of two cores.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import hosts
import pytest
import tiny
from hosts import DEBIAN, Host, Started
from test_hosts import LONG, SLURM, WORDS, as_tasks, product

pytestmark = [pytest.mark.soak, pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing()), pytest.mark.timeout(900)]
TORCHRUN = str(Path(sys.executable).parent / "torchrun")
SHORT = [*LONG, "stages.autoencoder.images=1600"]


def agents(both: list[Host], *words: str, machines: str = "2", restarts: int = 0) -> list[Started]:
    """A torchrun on each host."""
    how = ["--nnodes", machines, "--nproc-per-node", "1", "--max-restarts", str(restarts), "--rdzv-backend", "c10d"]
    how += ["--rdzv-endpoint", "gpu1:29500", "train.py", *WORDS, *words]
    return [host.start(TORCHRUN, *how, LDM_TIMEOUT_S="30") for host in both]


def last(one: Started) -> str:
    """The last word of ldm's."""
    return [line for line in one.said.splitlines() if line.startswith("ldm train: ")][-1]


def until_saved(folder: Path) -> None:
    """Wait for the first checkpoint."""
    end = time.monotonic() + 250
    while not list(folder.glob("run/stages/autoencoder/state/images-*")):
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended stays in the table of a host whose first process asks for nobody."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("absent", [0, 1])
def test_a_peer_that_does_not_come_is_told_after_ten_seconds_and_given_up(absent: int, tmp_path: Path) -> None:
    with hosts.hosts(tmp_path, DEBIAN) as both:
        started = as_tasks(both[1 - absent : 2 - absent], f"out={tmp_path / 'run'}")[0]
        where = r"gpu1:24711" if absent == 0 else ""
        awaited = rf"rank 1 waits for rank 0 at {where}" if where else "1 of 2 processes are here; waiting for rank 1"
        assert started.wait(150) == 2
        assert re.search(rf"ldm: {awaited} \(1\d s; ends after 30, LDM_TIMEOUT_S\)", started.said), started.said
        ended = rf"rank 0 was not reached at {where} within 30 s" if where else r"rank 1 did not come within 30 s \(LDM_TIMEOUT_S\)"
        assert re.search(ended, started.said.strip().splitlines()[-1]), started.said


def test_a_cable_that_is_out_ends_both_by_name(tmp_path: Path) -> None:
    with hosts.hosts(tmp_path) as both:
        started = as_tasks(both, *LONG, f"out={tmp_path / 'run'}")
        started[0].until("of 80,000", 200)
        both[1].unplug()
        assert [one.wait(120) for one in started] == [1, 1]
        assert last(started[0]).startswith(
            "ldm train: rank 1 gives no sign of life any more, killed or stopped (rank 0 waits in autoencoder"
        )
        assert last(started[1]).startswith(
            "ldm train: rank 0 gives no sign of life any more, killed or stopped (rank 1 waits in autoencoder"
        )


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_of_one_host_ends_the_other_s(stopped: int, tmp_path: Path) -> None:
    with hosts.hosts(tmp_path) as both:
        started = as_tasks(both, *LONG, f"out={tmp_path / 'run'}")
        started[0].until("of 80,000", 200)
        os.kill(started[stopped].leader, signal.SIGSTOP)
        assert started[1 - stopped].wait(120) == 1
        assert re.search(rf"rank {stopped} (gives no sign of life any more|is gone)", last(started[1 - stopped])), started[1 - stopped].said


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_launcher_leaves_no_process_behind(killed: int, tmp_path: Path) -> None:
    with hosts.hosts(tmp_path, DEBIAN) as both:
        started = agents(both, *LONG, f"out={tmp_path / 'run'}")
        started[0].until("of 80,000", 200)
        workers = [*started[0].workers, *started[1].workers]
        os.kill(started[killed].leader, signal.SIGKILL)
        assert started[1 - killed].wait(150) != 0
        end = time.monotonic() + 30
        while any(map(alive, workers)) and time.monotonic() < end:
            time.sleep(0.2)
        assert not any(map(alive, workers))
        assert any("launcher" in line for one in started for line in one.said.splitlines() if line.startswith("ldm train: ")), started[
            1
        ].said


def test_two_launchers_start_all_again_after_a_killed_process(tmp_path: Path) -> None:
    with hosts.hosts(tmp_path, DEBIAN) as both:
        started = agents(both, *SHORT, f"out={tmp_path / 'run'}", restarts=1)
        until_saved(tmp_path)
        os.kill(started[1].workers[0], signal.SIGKILL)
        assert [one.wait(300) for one in started] == [0, 0]
        told = started[0].said + started[1].said  # the agents may give their ranks anew
        assert told.count("launched by torchrun: 2 processes on 2 machines") == 2 and "of 1600 images" in told
        assert product(tmp_path / "run")


def test_one_host_goes_on_where_the_other_is_lost(tmp_path: Path) -> None:
    with hosts.hosts(tmp_path, DEBIAN) as both:
        started = agents(both, *SHORT, f"out={tmp_path / 'run'}", machines="1:2", restarts=2)
        until_saved(tmp_path)
        both[1].die()
        assert started[0].wait(400) == 0
        assert re.search(r"going on from [\d,]+ of 1600 images", started[0].said), started[0].said
        assert "autoencoder: batch 8, precision" in started[0].said and product(tmp_path / "run")


EACH_LONG = [  # so that each of the quickstart's stages goes on for some seconds
    "data.images=4000",
    "data.val=400",
    "stages.text.images=8000",
    "stages.text.save_every_images=800",
    "stages.autoencoder.images=800",
    "stages.autoencoder.save_every_images=80",
    "stages.autoencoder-gate.metrics=[{kind: reconstruction, images: 400}]",
    "stages.diffusion-low.images=3200",
    "stages.diffusion-low.save_every_images=320",
    "stages.diffusion-high.images=3200",
    "stages.diffusion-high.save_every_images=320",
    "stages.evaluation.metrics=[{kind: adherence, tier: one, prompts: 200, steps: 10}]",
    "stages.evaluation.require=null",
]
STAGES = ["text", "autoencoder", "autoencoder-gate", "latents-low", "diffusion-low", "latents-high", "diffusion-high", "evaluation"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_lost_in_any_stage_is_named_and_the_next_start_goes_on(lost: int, tmp_path: Path) -> None:
    def both_start(both: list[Host]) -> list[Started]:
        words = [sys.executable, "train.py", "configs/quickstart.yaml", *tiny.WORDS, *EACH_LONG, f"out={tmp_path / 'run'}"]
        return [host.start(*words, SLURM_PROCID=str(host.number), **SLURM, LDM_TIMEOUT_S="30") for host in both]

    for stage in STAGES:
        with hosts.hosts(tmp_path) as both:
            started = both_start(both)
            end = time.monotonic() + 400
            while not re.search(rf"^{stage} +[1-9]\d?% ", started[0].said, re.MULTILINE):
                assert time.monotonic() < end and started[0].process.poll() is None, f"{stage} was not seen:\n{started[0].said}"
                time.sleep(0.02)
            both[lost].die()
            left = started[1 - lost]
            assert left.wait(120) == 1, left.said
            assert re.match(rf"ldm train: rank {lost} (is gone|gives no sign of life any more)", last(left)), left.said
            assert f"waits in {stage}" in last(left), left.said
    with hosts.hosts(tmp_path) as both:
        started = both_start(both)
        assert [one.wait(600) for one in started] == [0, 0], started[0].said
        assert "going on from" in started[0].said or "done already" in started[0].said
    assert product(tmp_path / "run")
