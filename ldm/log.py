"""Console progress, log.jsonl and an optional tracker behind one call."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOG = "log.jsonl"
PLAIN_EVERY_S = 5.0  # between lines where the console is no terminal


class Log:
    """What a run says: to its reader, to log.jsonl always, and to a tracker when asked.

    A tracker that fails is told of once and then left alone; it never stops a run.

    Args:
        folder: the run folder.
        tracker: "wandb" or nothing.
        console: whether to speak on standard error.
        write: whether to write log.jsonl and to the tracker (one process of a launch does).
    """

    def __init__(self, folder: Path, *, tracker: str = "", console: bool = True, write: bool = True) -> None:
        self.path = folder / LOG
        self.console = console
        self.started = time.time()
        self._file: Any = None
        self._tracker: Any = None
        self._bar: Any = None
        self._earlier: dict[str, float] = {}
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            self._earlier = _mend(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        if write and tracker:
            self._tracker = _start_tracker(folder, self.note)

    def note(self, text: str) -> None:
        """One line for the reader, and in the log."""
        self._write({"note": text, "time": round(time.time(), 3)})
        if self.console:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def seconds_before(self, stage: str) -> float:
        """Time that interrupted starts had spent in a stage, as far as their last logged step."""
        return self._earlier.get(stage, 0.0)

    @contextmanager
    def stage(self, name: str, total: int, start: int) -> Iterator[StageLog]:
        """Progress of one stage over `total` images, of which `start` are done already (0 in all: unknown)."""
        log = StageLog(self, name, total, start)
        bar = self._progress()
        if bar is None:
            yield log
            return
        with bar:
            self._bar = bar
            log.task = bar.add_task(name, total=total or None, completed=start, rate="", said="")
            try:
                yield log
            finally:
                self._bar = None

    def close(self) -> None:
        """End of the run: flush everything."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tracker is not None:
            try:
                self._tracker.finish()
            except Exception as error:
                print(f"tracker: {error}", file=sys.stderr)
            self._tracker = None

    def _progress(self) -> Any:
        if not self.console or not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        return Progress(
            TextColumn("{task.description:<16}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"), console=Console(stderr=True), refresh_per_second=4,
        )  # fmt: skip

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            # A full disk must not cost the training; its checkpoints have their own word on it.
            print(f"{self.path}: not written ({error.strerror})", file=sys.stderr)

    def _track(self, line: Mapping[str, Any], stage: str, images: int) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.log({f"{stage}/{name}": value for name, value in line.items()} | {f"{stage}/images": images})
        except Exception as error:
            self._tracker = None
            self.note(f"tracker: {error}; the run goes on without it")


class StageLog:
    """The progress of one stage."""

    def __init__(self, log: Log, name: str, total: int, start: int) -> None:
        self.log, self.name, self.total = log, name, total
        self.task: Any = None
        self.began = time.monotonic()
        self.images = self.first = start
        self._said = 0.0
        self._window = (self.began, start)

    def step(
        self, *, step: int, images: int, terms: Mapping[str, float], gauges: Mapping[str, float], lr: float
    ) -> None:
        """One logged step: a line in log.jsonl, the tracker's point, and the bar."""
        now = time.monotonic()
        before, seen = self._window
        rate = (images - seen) / max(now - before, 1e-9)
        self._window = (now, images)
        line = {
            "stage": self.name, "step": step, "images": images, "loss": sum(terms.values()), "terms": dict(terms),
            "gauges": dict(gauges), "lr": lr, "images_per_s": round(rate, 2), "seconds": round(now - self.began, 3),
            "peak_memory_mb": peak_memory_mb(), "time": round(time.time(), 3),
        }  # fmt: skip
        self.log._write(line)
        self.log._track({"loss": line["loss"], **terms, **gauges, "lr": lr, "images_per_s": rate}, self.name, images)
        self._show(images, rate, "  ".join(f"{name} {value:.4g}" for name, value in list(terms.items())[:4]))

    def advance(self, images: int) -> None:
        """So many images more are done, without a line in the log."""
        self.images += images
        rate = (self.images - self.first) / max(time.monotonic() - self.began, 1e-9)
        self._show(self.images, rate, "")

    def progress(self, done: int, total: int, said: str = "") -> None:
        """`done` of `total` parts of the work are done."""
        self.total = total
        rate = done / max(time.monotonic() - self.began, 1e-9)
        self._show(done, rate, said)

    def pictures(self, path: Path) -> None:
        """A picture file was written."""
        self.log._write({"stage": self.name, "pictures": str(path), "time": round(time.time(), 3)})
        tracker = self.log._tracker
        if tracker is not None:
            try:
                import wandb

                tracker.log({f"{self.name}/samples": wandb.Image(str(path))})
            except Exception as error:
                self.log._tracker = None
                self.log.note(f"tracker: {error}; the run goes on without it")

    def _show(self, done: int, rate: float, said: str) -> None:
        bar = self.log._bar
        if bar is not None:
            bar.update(self.task, completed=done, total=self.total or None, rate=f"{rate:,.1f}/s", said=said)
            return
        now = time.monotonic()
        if not self.log.console or (now - self._said < PLAIN_EVERY_S and done < self.total):
            return
        self._said = now
        left = (self.total - done) / rate if rate > 0 and self.total else 0
        percent = f"{100 * done / self.total:3.0f}%" if self.total else ""
        line = f"{self.name:<16} {percent} {done:,} of {self.total:,}  {rate:,.1f}/s  left {_clock(left)}  {said}"
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory_mb() -> float:
    """Largest memory of this process so far: the accelerator's where there is one, else resident memory, MB."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    import resource

    unit = 1e6 if sys.platform == "darwin" else 1e3
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _mend(path: Path) -> dict[str, float]:
    """Drop a half-written last line, and lines of a stage that a later start repeats; seconds spent per stage.

    A stage that was interrupted goes on from its checkpoint, so its later lines would stand there twice: the reader
    (`read`) keeps the last line of each step.
    """
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) != len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return seconds_by_stage(read(path))


def seconds_by_stage(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The time that all starts together spent in each stage, as far as their last logged steps."""
    spent: dict[str, float] = {}
    last: dict[str, float] = {}
    for line in lines:
        name, seconds = line.get("stage"), line.get("seconds")
        if name is None or seconds is None:
            continue
        spent[name] = spent.get(name, 0.0) + (seconds - last[name] if seconds >= last.get(name, seconds + 1) else seconds)
        last[name] = seconds
    return spent


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a log.jsonl; of a step that stands there twice, since a start was interrupted, the later one."""
    found: list[dict[str, Any]] = []
    where: dict[tuple[str, int], int] = {}
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if "step" in line:
            address = (line["stage"], line["step"])
            if address in where:
                found[where[address]] = line
                continue
            where[address] = len(found)
        found.append(line)
    return found


def _start_tracker(folder: Path, say: Callable[[str], None]) -> Any:
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        settings = wandb.Settings(init_timeout=20)
        return wandb.init(project="ldm", name=folder.name, dir=str(folder), id=None, settings=settings)
    except Exception as error:
        say(f"tracker: wandb did not start ({error}); the run goes on without it")
        return None
