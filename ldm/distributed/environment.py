"""Process environment: variables that count before torch is loaded, the allocator, the number of threads."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable

# glibc's mallopt parameters
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4


def prepare() -> None:
    """Settings that only count before torch is loaded; what the user has set stays.

    Threads spin a little while they wait for each other, where OpenMP's own default is six times as long: sleeping at once
    costs a small training step all that a second idle core brings, and long spinning costs several times that where
    others use the cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Torch's own words on a broken connection to another process are some twenty lines; ldm says it in one.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would look through every package that is installed
    # Where it is installed, peft imports it, and it misses a package for something that nothing here does.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def keep_blocks() -> None:
    """From now on the allocator keeps large blocks that are given back, so that they are not faulted in anew at every step.

    Meant for training, whose steps are alike. Elsewhere it gains 2 % at most, and where large weights come and go it costs
    memory, because blocks that are given back one by one leave holes. What the user has set stays.
    """
    _allocator((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 * 2**20))


def return_blocks() -> None:
    """From now on every block of a megabyte or more goes back to the system as soon as it is given back, and leaves no hole."""
    _allocator((M_MMAP_THRESHOLD, 2**20), (M_TRIM_THRESHOLD, 2**20))


def _allocator(*settings: tuple[int, int]) -> None:
    """Tell glibc's allocator; another C library's is left alone, and so is one that the user has set."""
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_MAX_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for name, value in settings:
        mallopt(name, value)


def usable_cores() -> int:
    """Cores this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def computed_in(precision: str, device: str) -> str:
    """The precision that a stage computes in: its own, but fp32 on a CPU without instructions for it.

    There torch emulates bf16 and fp16, which takes tens of times as long as fp32.
    """
    import torch

    if device != "cpu" or precision == "fp32":
        return precision
    supported: dict[str, Callable[[], bool]] = {
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return precision if supported[precision]() else "fp32"


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
