"""Daemon threads that do not delay interpreter shutdown, and that never abort it.

Where Python ends while such a thread is inside torch, the thread is torn down when it comes back, and with it the process ("terminate
called without an active exception", exit code -6): letting go of a large tensor is enough. So the end waits for the pieces of work that
are under way, and no other is begun.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE_S = 5.0  # for pieces under way; one that hangs in a read is cut off there without harm

_changed = threading.Condition()
_under_way = 0
_over = False


class ProcessEnds(BaseException):
    """Shutdown: a piece of work is not begun any more, as the process ends."""


def start(work: Callable[..., object], name: str, *args: object) -> threading.Thread:
    """A thread of which the process' end waits only for the `piece` under way."""
    thread = threading.Thread(target=work, args=args, name=name, daemon=True)
    thread.start()
    return thread


@contextmanager
def piece() -> Iterator[None]:
    """A piece of work with tensors, which are let go within it.

    Raises:
        ProcessEnds: once the process ends.
    """
    global _under_way
    with _changed:
        if _over:
            raise ProcessEnds
        _under_way += 1
    try:
        yield
    finally:
        with _changed:
            _under_way -= 1
            _changed.notify_all()


@atexit.register
def _end() -> None:
    global _over
    with _changed:
        _over = True
        _changed.wait_for(lambda: not _under_way, PATIENCE_S)
