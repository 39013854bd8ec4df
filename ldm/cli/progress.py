"""Progress of a verb on a terminal: a bar where pictures are counted, a line where nothing can be."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ldm.config.terminal import raw, shown

PLANNING = "planning: reading the data, counting weights and operations"


@contextmanager
def bar(total: int, watched: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and time left, on a terminal."""
    if not watched:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("left"), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=raw(sys.stderr))) as progress:
        task, started, done = progress.add_task("", total=total, rate=""), time.monotonic(), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress.update(task, completed=done, rate=f"{done / max(1e-9, time.monotonic() - started):,.0f} images/s")

        yield advance


@contextmanager
def working(on: str) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is being done and for how long, gone at the end; nothing where the output is piped.

    What it yields prints a line above it, on standard error, and does so in a pipe, too. Print nothing else meanwhile.
    """
    if not sys.stderr.isatty():
        yield _tell
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    console = Console(file=raw(sys.stderr))
    # Standard output may be a file, and what is printed to either goes through the guard of secrets and control codes.
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    progress.add_task(shown(on), total=None)

    def tell(text: str) -> None:
        progress.stop()
        _tell(text)
        progress.start()

    with progress:
        yield tell


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
