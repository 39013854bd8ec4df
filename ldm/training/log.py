"""Console progress, log.jsonl and an optional tracker behind one call."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ldm.config.counts import plural
from ldm.config.secrets import cleaned, redacted
from ldm.config.terminal import raw, shown
from ldm.formats.records import number, parse
from ldm.training.throughput import Expected, seconds_after
from ldm.training.trackers import Background

if TYPE_CHECKING:
    from ldm.training.held_out import LossByLevel

T = TypeVar("T")
LOG = "log.jsonl"
FIXED_COLUMNS = 66  # characters of the bar before what is said last: name, bar, share, rate, times
PLAIN_EVERY_S = 5.0  # between lines where the console is no terminal


class Log:
    """What a run says: to its reader, to log.jsonl always, and to a tracker when asked.

    A tracker that fails is told of once and then left alone; it never stops a run.

    Args:
        folder: the run folder.
        tracker: one of `trackers.KINDS`, or nothing.
        console: whether to speak on standard error.
        write: whether to write log.jsonl and to the tracker (one process of a launch does).
    """

    def __init__(self, folder: Path, *, tracker: str = "", console: bool = True, write: bool = True) -> None:
        self.path = folder / LOG
        self.console = console
        self.started = time.time()
        self._file: Any = None
        self._tracker: Background | None = None
        self._bar: Any = None
        self._earlier: dict[str, float] = {}
        self._torn = self._warned = False
        self.expected: dict[str, Expected] = {}  # what the stages will do, where it was counted
        if write:
            folder.mkdir(parents=True, exist_ok=True)
            lines, odd = read_counted(self.path)
            self._earlier = seconds_by_stage(lines)
            self._open()
            if odd:
                self.note(f"{self.path}: {plural(odd, 'damaged line')}; curves and times are told without them")
        if write and tracker:
            self._tracker = Background(tracker, folder, self.note)

    def note(self, text: str) -> None:
        """One line for the reader, and in the log; nothing secret is told."""
        text = redacted(text)
        self._write({"note": text, "time": round(time.time(), 3)})
        if self.console:
            if self._bar is not None:
                self._bar.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def record(self, line: Mapping[str, Any]) -> None:
        """What only the log is told."""
        self._write({**line, "time": round(time.time(), 3)})

    def seconds_before(self, stage: str) -> float:
        """Time that earlier starts had spent in a stage that goes on from their work, as far as their last logged step."""
        return self._earlier.get(stage, 0.0)

    def steps(self, stage: str) -> list[dict[str, Any]]:
        """The lines of a stage's logged steps."""
        return [line for line in read(self.path) if line.get("stage") == stage and "step" in line] if self._file is not None else []

    @contextmanager
    def stage(self, name: str, total: int, start: int) -> Iterator[StageLog]:
        """Progress of one stage over `total` images (0: unknown), of which `start` are done already.

        What log.jsonl tells of the stage beyond `start` is cut: that work is lost, and will be done again.
        """
        if start == 0:
            self._earlier[name] = 0.0
        if self._file is not None:
            self._cut(name, start)
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
        if self._tracker is not None:
            self._tracker.close()
            self._tracker = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _progress(self) -> Any:
        if not self.console or not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        return Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
            console=Console(file=raw(sys.stderr)),
            refresh_per_second=4,
        )

    def _open(self) -> None:
        """Append to the log behind its last whole line."""
        try:
            text = self.path.read_bytes()
            if not text.endswith(b"\n") and text:
                os.truncate(self.path, text.rfind(b"\n") + 1)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._failed(error)
            return
        self._file = self.path.open("ab", buffering=0)

    def _cut(self, stage: str, start: int) -> None:
        kept, beyond = [], False
        lines = [line + b"\n" for line in self.path.read_bytes().split(b"\n")[:-1]] if self.path.is_file() else []
        for one in lines:
            line = _parsed(one)
            if line.get("stage") == stage:
                beyond = beyond or start == 0 or line.get("images", 0) > start
            if not beyond or line.get("stage") != stage:
                kept.append(one)
        if len(kept) == len(lines):
            return
        beside = self.path.with_name(f".{LOG}.cut")
        try:
            with beside.open("wb") as file:
                file.writelines(kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        except OSError as error:
            self._failed(error)
            return
        self._file.close()
        self._open()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        text = (b"\n" if self._torn else b"") + json.dumps(cleaned(line)).encode() + b"\n"
        try:
            self._torn = self._file.write(text) != len(text)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        # A full disk must not cost the training; its checkpoints have their own word on it.
        if not self._warned:
            print(f"{self.path}: not written ({error.strerror}); the run goes on", file=sys.stderr)
        self._warned = True


class StageLog:
    """The progress of one stage."""

    def __init__(self, log: Log, name: str, total: int, start: int) -> None:
        self.log, self.name, self.total = log, name, total
        self.task: Any = None
        self.began = time.monotonic()
        self.images = self.first = start
        self._said = -math.inf
        self._window = (self.began, start)
        self._work, self._told = self.began, (self.began, 0)  # when the present work began; when progress was told last, and how much
        self._waited = 0.0  # for data, since the last logged step, s

    def waiting(self, feed: Iterator[T]) -> Iterator[T]:
        """The same batches; how long each was waited for is counted."""
        while True:
            asked = time.monotonic()
            try:
                batch = next(feed)
            except StopIteration:
                return
            self._waited += time.monotonic() - asked
            yield batch

    def step(
        self,
        *,
        step: int,
        images: int,
        terms: Mapping[str, float],
        gauges: Mapping[str, float],
        lr: float,
        ranks: Mapping[str, list[float]] | None = None,
    ) -> None:
        """One logged step: a line in log.jsonl, the tracker's point, and the bar.

        Args:
            ranks: of each process, seconds a step until its batch was there, and in its forward passes; where there are several.
        """
        now = time.monotonic()
        before, seen = self._window
        spent = max(now - before, 1e-9)
        rate = (images - seen) / spent
        self._window = (now, images)
        waited, self._waited = min(1.0, self._waited / spent), 0.0
        known = self.log.expected.get(self.name)
        used = rate * known.flops / known.peak if known and known.peak else 0.0
        paces = {"images_per_s": round(rate, 2), "data_wait": round(waited, 4), **({"mfu": round(used, 4)} if used else {})}
        seconds = self.log.seconds_before(self.name) + now - self.began
        memory = peak_memory_mb()
        line = {
            "stage": self.name,
            "step": step,
            "images": images,
            "loss": sum(terms.values()),
            "terms": dict(terms),
            "gauges": dict(gauges),
            "lr": lr,
            **paces,
            **({"ranks": dict(ranks)} if ranks else {}),
            "seconds": round(seconds, 3),
            "peak_memory_mb": memory,
            "time": round(time.time(), 3),
        }
        self.log._write(line)
        self.images = images
        if self.log._tracker is not None:
            self.log._tracker.numbers(self.name, images, {"loss": sum(terms.values()), **terms, **gauges, "lr": lr, **paces})
        said = [f"MFU {used:.0%}"] if used else []
        said += [f"data {waited:.0%}", f"{memory / 1e3:.1f} GB"]
        later = seconds_after(self.name, (images - self.first) / max(now - self.began, 1e-9), self.log.expected)
        if later and rate > 0:
            said.insert(0, f"run left {_clock(later + (self.total - images) / rate)}")
        self._show(images, rate, "  ".join([*said, *(f"{name} {value:.4g}" for name, value in list(terms.items())[:4])]))

    def levels(self, images: int, found: LossByLevel) -> None:
        """Held-out loss was measured: a line in log.jsonl, and the tracker's point."""
        values = {name: getattr(found, name) for name in ("sigma", "train", "held_out")}
        self.log._write(
            {"stage": self.name, "images": images, "loss_by_level": values, "samples": found.samples, "time": round(time.time(), 3)}
        )
        if self.log._tracker is not None:
            points = {f"held_out/{name}": value for name, value in found.means().items()}
            for kind in ("train", "held_out"):
                points |= {f"held_out/{kind}_level_{i}": value for i, value in enumerate(values[kind], 1)}
            self.log._tracker.numbers(self.name, images, points)

    def advance(self, images: int) -> None:
        """So many images more are done, without a line in the log."""
        self.images += images
        rate = (self.images - self.first) / max(time.monotonic() - self.began, 1e-9)
        self._show(self.images, rate, "")

    def progress(self, done: int, total: int, said: str = "") -> None:
        """`done` of `total` parts of the work are done; where that is fewer than before, other work has begun, with a rate of its own."""
        now = time.monotonic()
        latest, before = self._told
        if total != self.total or done < before:
            self._work = latest
        self.total, self._told = total, (now, done)
        self._show(done, done / max(now - self._work, 1e-9), said)

    def pictures(self, path: Path) -> None:
        """A picture file was written."""
        self.log._write({"stage": self.name, "pictures": _within(path, self.log.path.parent), "time": round(time.time(), 3)})
        if self.log._tracker is not None:
            self.log._tracker.picture(self.name, self.images, path)

    def _show(self, done: int, rate: float, said: str) -> None:
        bar = self.log._bar
        if bar is not None:
            said = said[: max(0, bar.console.width - FIXED_COLUMNS)]  # else the terminal would cut every column
            bar.update(self.task, completed=done, total=self.total or None, rate=f"{rate:,.1f}/s", said=said)
            return
        now = time.monotonic()
        if not self.log.console or (now - self._said < PLAIN_EVERY_S and (done < self.total or not self.total)):
            return
        self._said = now
        left = (self.total - done) / rate if rate > 0 and self.total else 0
        of = f"{100 * done / self.total:3.0f}% {done:,} of {self.total:,}" if self.total else f"{done:,}"
        clock = f"  left {_clock(left)}" if left else ""
        print(f"{self.name:<16} {of}  {rate:,.1f}/s{clock}  {said}".rstrip(), file=sys.stderr, flush=True)


def _within(path: Path, folder: Path) -> str:
    """A path as a run folder tells it, wherever that lies."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


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


def seconds_by_stage(lines: list[dict[str, Any]]) -> dict[str, float]:
    """The time spent in each stage by the starts that led to its last logged step."""
    return {line["stage"]: float(line["seconds"]) for line in lines if "seconds" in line and "stage" in line}


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log.jsonl, whose FIELDS are what they say; nothing where there is none."""
    return read_counted(path)[0]


def read_counted(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines, and how many were damaged; one that is only begun is not counted, since it may be being written."""
    try:
        text = path.read_bytes()
    except OSError:
        return [], 0
    whole, _, begun = text.rpartition(b"\n")
    found = [_parsed(raw) for raw in whole.split(b"\n") if raw.strip()]
    return [line for line in (*found, _parsed(begun)) if line], found.count({})


class Follower:
    """A log.jsonl that is read on from where it was read before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at, self._tail, self._number = 0, b"", 0  # bytes that were read, the last of them, and the file's number

    def read(self) -> tuple[bool, list[dict[str, Any]], int]:
        """Whether it is another file than before, all of which is read; the lines that are new; and how many of these were damaged."""
        try:
            with self.path.open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                file.seek(self._at - len(self._tail))
                text = file.read()
                if anew := number != self._number or not text.startswith(self._tail):
                    file.seek(0)
                    text = file.read()
                    self._at, self._tail, self._number = 0, b"", number
        except OSError:
            anew, text = self._number != 0, b""
            self._at, self._tail, self._number = 0, b"", 0
        whole, newline, begun = text[len(self._tail) :].rpartition(b"\n")
        found = [_parsed(raw) for raw in whole.split(b"\n") if raw.strip()]
        last = _parsed(begun)  # of one that is only begun nothing is taken yet
        taken = len(whole) + len(newline) + (len(begun) if last else 0)
        self._tail = text[: len(self._tail) + taken][-64:]
        self._at += taken
        return anew, [line for line in (*found, last) if line], found.count({})


def _count(value: Any) -> bool:
    found = number(value)
    return found is not None and found >= 0


def _real(value: Any) -> bool:
    return number(value) is not None or (isinstance(value, float) and not math.isfinite(value))


def _reals(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_real, value.values()))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _levels(value: Any) -> bool:
    """Lists of as many numbers for the shares of noise and both losses."""
    if not isinstance(value, dict) or set(value) != {"sigma", "train", "held_out"}:
        return False
    return all(isinstance(v, list) and v and len(v) == len(value["sigma"]) and all(map(_real, v)) for v in value.values())


# What a line may say, and of what type: a line that says it otherwise is damaged, and nobody who reads the log need look again.
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("stage", "note", "alarm", "pictures", "failed"), _text),
    **dict.fromkeys(("step", "images", "seconds"), _count),
    **dict.fromkeys(("time", "loss", "lr", "images_per_s", "data_wait", "mfu", "peak_memory_mb", "saved", "stalled_s", "written_s"), _real),
    **dict.fromkeys(("terms", "gauges"), _reals),
    "loss_by_level": _levels,
}


def _parsed(raw: bytes) -> dict[str, Any]:
    """One line, or nothing where it is damaged."""
    try:
        line = parse(raw)
    except ValueError:
        return {}
    if not isinstance(line, dict):
        return {}
    for name, value in line.items():
        if (fits := FIELDS.get(name)) is not None and not fits(value):
            return {}
    return line
