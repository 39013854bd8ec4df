"""Start of a command that draws: garbage collection is put off until modules and model are loaded."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[Callable[[], None]]:
    """Without garbage collection until what it gives is called, or the end; and without the one at the end of the process.

    A collection goes through all objects that there are. A start makes a million that stay, and hardly any garbage: a tenth of its time
    would be spent so.
    """
    if not gc.isenabled():
        yield lambda: None
        return
    gc.disable()
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        yield _collect_again
    finally:
        _collect_again()


def _collect_again() -> None:
    """With collection; what is there counts as old, so that the next one need not go through it."""
    if not gc.isenabled():
        gc.freeze()
        gc.unfreeze()
        gc.enable()
