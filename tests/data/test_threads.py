"""Processes that end while threads compute: whole, with their own exit code, and soon."""

import subprocess
import sys
import time

import pytest

LOADING = """
import random, sys, time
import torch
from ldm.data.loader import ordered

def task():
    x = torch.randn(16, 3, 64, 64)
    for _ in range(4):
        x = torch.nn.functional.interpolate(x, scale_factor=1.1)[..., :64, :64] + 1
    return x

def groups():
    while True:
        yield [task]

loading = ordered(groups(), 2)
for _ in range(3):
    next(loading)
time.sleep(random.random() * 0.01)
sys.exit(3)
"""

HANGING = """
import time
from ldm.data import threads

def work():
    with threads.piece():
        time.sleep(250)

threads.PATIENCE_S = 0.5
threads.start(work, "hangs")
time.sleep(0.2)
"""

LATE = """
import atexit, threading
from ldm.data import threads

go, tried = threading.Event(), threading.Event()

def work():
    go.wait()
    try:
        with threads.piece():
            print("begun", flush=True)
    except threads.ProcessEnds:
        print("refused", flush=True)
    tried.set()

def late():  # runs after the one of ldm.data.threads, which was registered later
    go.set()
    tried.wait(10)

atexit.unregister(threads._end)
atexit.register(late)
atexit.register(threads._end)
threads.start(work, "late")
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("time_of_day", range(3))
def test_a_process_that_ends_while_samples_are_prepared_keeps_its_exit_code(time_of_day: int) -> None:
    done = ended(LOADING)
    assert (done.returncode, done.stderr) == (3, "")


def test_a_thread_that_hangs_keeps_no_process_from_ending() -> None:
    began = time.monotonic()
    done = ended(HANGING)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - began < 120


def test_no_piece_of_work_begins_once_the_process_ends() -> None:
    assert ended(LATE).stdout == "refused\n"
