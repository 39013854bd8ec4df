"""Progress bar of a verb that goes through pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ldm.config.terminal import raw


@contextmanager
def bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar with rate and time left, on a terminal."""
    if not shown:
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
