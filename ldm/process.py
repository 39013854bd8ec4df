"""What must be set in a process before torch is loaded, and how many threads it should use afterwards."""

from __future__ import annotations

import ctypes
import os
import sys
import time

# glibc's mallopt parameters
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def prepare() -> None:
    """Settings that only count before torch is loaded; what the user has set stays.

    Threads spin a little while they wait for each other, where OpenMP's own default is six times as long: sleeping at once
    costs a small training step all that a second idle core brings, and long spinning costs several times that where
    others use the cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def keep_blocks() -> None:
    """From now on the allocator keeps large blocks that are given back, so that they are not faulted in anew at every step.

    Meant for work whose steps are alike. What is allocated before stays as it is: weights that are loaded first, and given
    back one by one, leave no holes. What the user has set stays.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_MAX_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, 64 * 2**20)


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def calibrate() -> str:
    """Choose torch's thread count by timing a convolution with one thread and with all cores; says what it found.

    On a machine whose cores are busy elsewhere more threads can be slower than one. OMP_NUM_THREADS decides where it is set.
    """
    import torch

    cores = usable_cores()
    if "OMP_NUM_THREADS" in os.environ or cores == 1:
        return f"{torch.get_num_threads()} of {cores} threads"
    image, weight = torch.randn(32, 64, 16, 16), torch.randn(64, 64, 3, 3)
    found: dict[int, float] = {}
    for threads in (1, cores):
        torch.set_num_threads(threads)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.conv2d(image, weight, padding=1)
            times.append(time.perf_counter() - start)
        found[threads] = sorted(times[1:])[2]
    best = cores if found[cores] < found[1] else 1
    torch.set_num_threads(best)
    said = ", ".join(f"{threads}: {1000 * seconds:.1f} ms" for threads, seconds in found.items())
    return f"{best} of {cores} threads (a convolution with {said})"
