"""The watch verb: live training curves in the terminal, and the run's report kept up to date."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.command import call
from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.terminal import raw
from ldm.runs.report import duration, report
from ldm.runs.run_record import StageRecord, StepRecord, Story, StoryReader

BARS = "▁▂▃▄▅▆▇█"
NOTES = 3  # of the latest that are shown
REPORT_S = 30.0  # between two reports of an unfinished run: its curves are most of the work of a look
WIDEST = 60  # characters of a curve
CLEAR = "\x1b[H\x1b[2J"


def main(words: Sequence[str]) -> int:
    """`ldm watch RUN`: the exit code."""
    return call(watch, words, "ldm watch")


def watch(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    every: Annotated[float | None, typer.Option(min=0.5, max=3600, help="Seconds between looks; default: 5.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once and stop.")] = False,
) -> int:
    """Show a run's stages, curves, latest pictures and notes until it is finished; report.html is at most half a minute older."""
    if once and every is not None:
        raise UserError("every: changes nothing with --once; leave one of them out")
    before, reader = "", StoryReader(run)
    page: Path | None = None
    drawn = 0.0
    while True:
        story = reader.read()
        if page is None or story.finished or time.monotonic() - drawn >= REPORT_S:
            page, drawn = report(run, story), time.monotonic()
        said = "\n".join(lines(story, page, shutil.get_terminal_size().columns))
        if once or not sys.stdout.isatty():
            if said != before:
                print(said, flush=True)
        else:
            raw(sys.stdout).write(CLEAR)
            print(said, flush=True)
        before = said
        if once or story.finished:
            return 0
        time.sleep(every or 5.0)


def lines(story: Story, page: Path, width: int = 80) -> Iterator[str]:
    """What the terminal shows of a run.

    Args:
        page: the written report.
        width: characters of a line, which curves fill.
    """
    yield f"{story.name}: {'finished' if story.finished else 'unfinished'}  {page}"
    for stage in story.stages:
        yield _headline(stage)
        if stage.steps and stage.done is None:
            yield from _curves(stage, min(WIDEST, max(10, width - 44)))
            yield from (f"    ! {text[: max(20, width - 6)]}" for text in stage.alarms[-NOTES:])
    grids = [path for stage in story.stages for path in sorted((stage.folder / "samples").glob("*.png"))]
    if grids:
        yield f"latest pictures: {max(grids, key=lambda path: path.stat().st_mtime)}"
    yield from (f"  {note}" for note in story.notes[-NOTES:])  # whole: they name commands to copy
    yield from (f"  damaged: {text}" for text in story.damaged)
    if story.failed:
        yield f"FAILED: {story.failed}"


def _headline(stage: StageRecord) -> str:
    amount = ""
    if stage.kind == "train" and stage.wanted:
        amount = f"{stage.images:,} of {plural(stage.wanted, 'image')} ({stage.images / stage.wanted:.0%})"
    elif stage.images:
        amount = plural(stage.images, "image")
    left = _left(stage)
    told = [amount, duration(stage.seconds) if stage.seconds else "", f"{duration(left)} left" if left else ""]
    return f"  {stage.name:<18} {stage.state:<10} {', '.join(filter(None, told))}".rstrip()


def _left(stage: StageRecord) -> float:
    """Seconds at its latest speed; 0: nobody knows."""
    speed = next((step.values["images_per_s"] for step in reversed(stage.steps) if step.values.get("images_per_s", 0) > 0), 0.0)
    return (stage.wanted - stage.images) / speed if speed and stage.done is None else 0.0


def _curves(stage: StageRecord, width: int) -> Iterator[str]:
    """Loss and its terms, the speed, and what gauges tell, a line each."""
    terms = list(dict.fromkeys(name for step in stage.steps for name in step.terms))
    named = [("loss", [step.values.get("loss") for step in stage.steps])]
    if len(terms) > 1:
        named += [(name, [step.terms.get(name) for step in stage.steps]) for name in terms]
    for name, key in (("images/s", "images_per_s"), ("waited for data", "data_wait"), ("MFU", "mfu")):
        named.append((name, [step.values.get(key) for step in stage.steps]))
    named += [(name, [step.gauges.get(name) for step in stage.steps]) for name in _gauges(stage.steps)]
    for name, column in named:
        values = [value for value in column if value is not None]
        if values:
            yield f"    {name:<22} {spark(values, width):<{width}} {values[-1]:>12.4g}"


def _gauges(steps: Sequence[StepRecord]) -> list[str]:
    return list(dict.fromkeys(name for step in steps for name in step.gauges))


def spark(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` characters, each the mean of its part, from the lowest (▁) to the highest (█)."""
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    span = high - low
    return "".join(BARS[min(len(BARS) - 1, int((mean - low) / span * len(BARS)))] if span > 0 else BARS[0] for mean in means)
