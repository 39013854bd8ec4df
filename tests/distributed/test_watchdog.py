"""The process that kept the store is killed: those left end, and say so once in the same words, whichever of their threads notices."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several

ROOT, WORKER = Path(__file__).parents[2], Path(__file__).with_name("watchdog_worker.py")
GONE = "ldm train: rank 0 is gone, killed or out of memory (rank 1 waits in autoencoder, step 5, backward pass)\n"


def left(kind: str, cause: str = "", *, kill_after: float = 1.2) -> tuple[int, str]:
    """Exit code and last words of the process that is left when the keeper is killed."""
    port = str(several.free_port())
    running = []
    try:
        for words in (["keeper", port, *([cause] if cause else [])], [kind, port]):
            running.append(
                subprocess.Popen(
                    [sys.executable, str(WORKER), *words],
                    cwd=ROOT,
                    env=several.environment(0, 1, 0),
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            assert running[-1].stdout is not None and running[-1].stdout.readline() == "there\n", running[-1].stderr
        if not cause:  # long enough for the watchdog to have looked; where a cause is told, it ends by itself
            time.sleep(kill_after)
            running[0].kill()
        said = running[1].communicate(timeout=60)[1]
        return running[1].returncode, said
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["waiting", "both"])
def test_a_killed_keeper_is_told_of_once(kind: str) -> None:
    assert left(kind) == (1, GONE)


@pytest.mark.slow
@pytest.mark.parametrize(("user", "code"), [(False, 1), (True, 2)])
def test_a_cause_that_was_told_is_not_told_again(user: bool, code: int) -> None:
    cause = json.dumps({"rank": 0, "place": "", "error": "ValueError: the wheel came off", "user": user})
    assert left("waiting", cause) == (code, "")
