"""A bound for what must end: no timing, but a limit far above what a slow and busy machine needs and far below what a blow-up takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 60.0


@contextmanager
def ends_soon(limit_s: float = LIMIT_S) -> Iterator[None]:
    """Fails where the block used more CPU seconds of this thread than `limit_s`.

    Inputs are sized so that the right code needs about a hundredth of that, and quadratic or exponential code much more. Other threads of
    the process, left by other tests, are not counted.
    """
    started = time.thread_time()
    yield
    used = time.thread_time() - started
    assert used < limit_s, f"used {used:.0f} CPU seconds, limit {limit_s:.0f}: it does not end in time that grows with its input"
