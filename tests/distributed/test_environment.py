"""A process is prepared before torch loads: allocator, waiting threads, and as many threads as pay."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.distributed import environment

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test sets is put back, and mallopt is not called in this process."""
    for name in NAMES:
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)


def faults(*, prepared: bool) -> int:
    """Page faults of a process that fills and frees 32 MB twenty times."""
    code = (
        "import resource\nfrom ldm.distributed.environment import keep_blocks\n"
        + ("keep_blocks()\n" if prepared else "")
        + "for _ in range(20): b'x' * (32 << 20)\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    return int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_large_blocks_are_kept_instead_of_faulted_in_anew() -> None:
    without, prepared = faults(prepared=False), faults(prepared=True)
    pages = (32 << 20) // os.sysconf("SC_PAGE_SIZE")
    if without < 10 * pages:
        pytest.skip("large pages hide the faults here")
    assert prepared < without / 4, (without, prepared)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_blocks_that_are_given_back_leave_no_holes() -> None:
    code = (
        "from ldm.distributed.environment import return_blocks\nreturn_blocks()\n"
        "kept = []\nfor _ in range(4):\n    blocks = [bytes(3 << 20) for _ in range(40)]\n    kept += blocks[::10]\n    del blocks\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))"
    )
    used = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout)
    assert used < 120 * 1024, f"{used} KiB, of which 48 MiB are in use"  # 3 of 4 blocks of 480 MiB were given back


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment.prepare()
    assert [os.environ.get(name) for name in NAMES] == ["active", None, "false", "1"]
    monkeypatch.delenv("OMP_WAIT_POLICY")
    environment.prepare()
    assert os.environ["GOMP_SPINCOUNT"] == "50000"
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "100")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("the allocator is the user's"))
    environment.keep_blocks()


def test_elsewhere_the_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(name)

    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(sys, "platform", "linux")
    environment.keep_blocks()  # musl
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("no glibc here"))
    for name in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", name)
        environment.keep_blocks()


def test_the_thread_count_is_the_users_or_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    threads = torch.get_num_threads()
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert environment.calibrate() == f"{threads} of {environment.usable_cores()} threads"
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(environment, "usable_cores", lambda: 2)
        said = environment.calibrate()
        assert torch.get_num_threads() in (1, 2)
        assert said.startswith(f"{torch.get_num_threads()} of 2 threads (a convolution with 1: ") and " ms, 2: " in said
    finally:
        torch.set_num_threads(threads)


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= environment.usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert environment.usable_cores() == (os.cpu_count() or 1)


def test_what_a_library_misses_for_itself_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")  # a package for 4-bit products, which nothing here makes
    monkeypatch.setattr(log, "level", logging.NOTSET)
    environment.prepare()
    assert not log.isEnabledFor(logging.WARNING) and log.isEnabledFor(logging.ERROR)
