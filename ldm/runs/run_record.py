"""Record of a run, read from its folder with care: what is missing or damaged tells nothing and costs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.yaml_reader import parse
from ldm.formats.records import Damaged, mapping, number, numbers, read_object
from ldm.runs.run_folder import is_stage_name
from ldm.training import log

PLAIN = ("loss", "lr", "images_per_s", "data_wait", "mfu", "seconds", "peak_memory_mb")  # numbers of a logged step
GROWS = ("seconds", "peak_memory_mb")
MOST = 1024  # steps of a stage that are told apart at least; of more, as many beside each other count as one as make that possible


@dataclass(frozen=True)
class StepRecord:
    """One logged step."""

    images: float  # seen so far
    values: Mapping[str, float]  # those of PLAIN that stand there
    terms: Mapping[str, float]
    gauges: Mapping[str, float]


@dataclass(frozen=True)
class LevelRecord:
    """Losses by noise level after so many images, from clean to noisy."""

    images: float
    sigma: Sequence[float]
    train: Sequence[float]
    held_out: Sequence[float]


@dataclass(frozen=True)
class StageRecord:
    """What a run folder tells of one stage."""

    name: str
    settings: Mapping[str, Any]  # of config.yaml
    done: Mapping[str, Any] | None  # done.json; None: not finished
    folder: Path
    steps: Sequence[StepRecord]
    alarms: Sequence[str] = ()  # what was odd, in the order of time
    changes: Sequence[str] = ()  # of settings, where it went on from the state of others: after how many images, and what
    levels: Sequence[LevelRecord] = ()  # of training and of held-out samples
    sweep: Sequence[Mapping[str, float]] = ()  # measures of EMAs of several lengths
    buckets: Sequence[Mapping[str, float]] = ()  # as the last start told them: width, height, images, cut, updates, missed

    @property
    def kind(self) -> str:
        """train, encode, evaluate, export."""
        return str(self.settings.get("kind") or (self.done or {}).get("kind") or "")

    @property
    def state(self) -> str:
        """finished, unfinished or waiting."""
        if self.done is not None:
            return "finished"
        return "unfinished" if self.steps or self.folder.is_dir() else "waiting"

    @property
    def images(self) -> int:
        """How many it has seen."""
        return int(number((self.done or {}).get("images")) or (self.steps[-1].images if self.steps else 0))

    @property
    def wanted(self) -> int:
        """How many it is to see; 0: unknown."""
        return int(number(self.settings.get("images")) or 0)

    @property
    def seconds(self) -> float:
        """How long it took, or has taken as far as the log tells."""
        if self.done is not None:
            return max(0.0, number(self.done.get("seconds")) or 0.0)
        lines = [{"stage": self.name, "seconds": step.values["seconds"]} for step in self.steps if "seconds" in step.values]
        return max(0.0, log.seconds_by_stage(lines).get(self.name, 0.0))

    @property
    def result(self) -> Mapping[str, Any]:
        """Of done.json."""
        return mapping((self.done or {}).get("result"))

    @property
    def required(self) -> Mapping[str, float]:
        """The least values that its settings ask for."""
        return numbers(self.settings.get("require"))


@dataclass(frozen=True)
class Story:
    """What a run folder tells of the run, as far as it goes."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    text: str  # config.yaml as it stands
    stages: Sequence[StageRecord]
    notes: Sequence[str]
    damaged: Sequence[str] = ()  # files of it that cannot be read, and why: what they tell is missing
    failed: str = ""  # the cause that ended the last start

    @property
    def finished(self) -> bool:
        """Whether every stage is."""
        return bool(self.stages) and all(stage.done is not None for stage in self.stages)


def read_story(folder: Path) -> Story:
    """All that the files of a run folder tell; files that are missing or damaged tell nothing.

    Raises:
        UserError: if there is neither a configuration nor a log nor a stage.
    """
    return StoryReader(folder).read()


class StoryReader:
    """Reader of a run folder that may look again, and then reads of its log what is new alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = log.Follower(folder / log.LOG)
        self._begin()

    def _begin(self) -> None:
        self._stages: dict[str, _Logged] = {}
        self._notes: list[str] = []
        self._odd, self._failed = 0, ""

    def read(self) -> Story:
        """As `read_story`."""
        folder = self.folder
        if not folder.exists():
            raise UserError(f"{folder}: no such folder; a run folder is needed, such as runs/quickstart")
        if not any((folder / name).exists() for name in ("config.yaml", log.LOG, "stages")):
            raise UserError(f"{folder}: no run here; a folder with config.yaml, {log.LOG} or stages/ was expected")
        damaged: list[str] = []
        text, config = _config(folder / "config.yaml", damaged)
        anew, lines, odd = self._log.read()
        if anew:
            self._begin()
        for line in lines:
            self._take(line)
        self._odd += odd
        if self._odd:
            damaged.append(f"{folder / log.LOG}: {plural(self._odd, 'damaged line')}")
        settings = {name: mapping(each) for name, each in mapping(config.get("stages")).items() if is_stage_name(name)}
        there = sorted((p for p in folder.glob("stages/*") if p.is_dir() and is_stage_name(p.name)), key=lambda p: p.stat().st_mtime)
        names = [*settings, *(p.name for p in there if p.name not in settings)]
        nothing = _Logged()
        stages = [
            _stage(name, settings.get(name, {}), folder / "stages" / name, self._stages.get(name, nothing), damaged) for name in names
        ]
        name = config.get("name")
        shown = name if isinstance(name, str) and name else folder.resolve().name
        return Story(folder, shown, config, text, stages, tuple(self._notes), damaged, self._failed)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "note" in line:
            self._notes.append(line["note"])
        if "failed" in line:
            self._failed = str(line["failed"])
        elif "launch" in line or "step" in line:
            self._failed = ""
        if "stage" in line:
            self._stages.setdefault(line["stage"], _Logged()).take(line)


@dataclass
class _Logged:
    """What the log tells of a stage."""

    alarms: list[str] = field(default_factory=list)
    levels: list[LevelRecord] = field(default_factory=list)
    buckets: list[Mapping[str, float]] = field(default_factory=list)
    _spans: list[_Span] = field(default_factory=list)  # all of `_stride` steps, but for the last
    _stride: int = 1

    @property
    def steps(self) -> list[StepRecord]:
        """Its steps by images; of very many, means of those beside each other, all of as many."""
        return [span.record() for span in sorted(self._spans, key=lambda span: span.images)]

    def take(self, line: Mapping[str, Any]) -> None:
        """One line more."""
        if isinstance(line.get("buckets"), list):
            self.buckets = [numbers(row) for row in line["buckets"]]
        if "alarm" in line:
            self.alarms.append(line["alarm"])
        images = number(line.get("images"))
        if "step" in line and images is not None and images >= 0:
            if not self._spans or self._spans[-1].count == self._stride:
                self._halve()
                self._spans.append(_Span(images))
            self._spans[-1].take(images, line)
        if "loss_by_level" in line and images is not None:
            self.levels.append(LevelRecord(images, **line["loss_by_level"]))

    def _halve(self) -> None:
        if len(self._spans) < 2 * MOST:
            return
        self._spans.sort(key=lambda span: span.images)
        for first, second in zip(self._spans[::2], self._spans[1::2], strict=True):
            first.add(second)
        self._spans, self._stride = self._spans[::2], 2 * self._stride


class _Span:
    """Logged steps beside each other, as one: means of what they tell, but for what only grows."""

    __slots__ = ("count", "images", "told")

    def __init__(self, images: float) -> None:
        self.images, self.count = images, 0
        self.told: tuple[_Sums, _Sums, _Sums] = ({}, {}, {})  # of values, terms and gauges

    def take(self, images: float, line: Mapping[str, Any]) -> None:
        """One line more."""
        self.images, self.count = images, self.count + 1
        values, terms, gauges = self.told
        _sum(values, ((key, line[key]) for key in PLAIN if key in line))
        _sum(terms, line.get("terms", {}).items())
        _sum(gauges, line.get("gauges", {}).items())

    def add(self, later: _Span) -> None:
        """The steps of the next span, too."""
        self.images, self.count = later.images, self.count + later.count
        for own, others in zip(self.told, later.told, strict=True):
            for key, (total, often) in others.items():
                known, before = own.get(key, _NONE)
                own[key] = (total, often) if key in GROWS else (known + total, before + often)

    def record(self) -> StepRecord:
        """As one step."""
        return StepRecord(self.images, *({key: total / often for key, (total, often) in sums.items()} for sums in self.told))


_Sums = dict[str, tuple[float, int]]  # by name the sum, and of how many; of what only grows the last alone
_NONE = (0.0, 0)


def _sum(sums: _Sums, told: Iterable[tuple[str, Any]]) -> None:
    for key, value in told:
        if (found := number(value)) is not None:
            total, often = _NONE if key in GROWS else sums.get(key, _NONE)
            sums[key] = total + found, often + 1


def read_told(path: Path, damaged: list[str] | None = None) -> Mapping[str, Any]:
    """The object in a JSON file; an empty one where it is missing, or damaged, which is added to what is `damaged`."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except Damaged as error:
        if damaged is not None:
            damaged.append(str(error))
        return {}


def _stage(name: str, settings: Mapping[str, Any], folder: Path, logged: _Logged, damaged: list[str]) -> StageRecord:
    done = read_told(folder / "done.json", damaged)
    steps = sorted(logged.steps, key=lambda step: step.images)
    history = read_told(folder / "extends.json", damaged).get("changes")
    entries = [mapping(one) for one in history] if isinstance(history, list) else []
    changes = [f"after {number(one.get('images')) or 0:,.0f} images: {'; '.join(map(str, _listed(one.get('changed'))))}" for one in entries]
    told = read_told(folder / "ema-sweep.json", damaged).get("rows")
    sweep = [found for row in _listed(told) if "length" in (found := numbers(row))]
    alarms, levels = tuple(logged.alarms), tuple(logged.levels)
    return StageRecord(name, settings, done or None, folder, steps, alarms, changes, levels, sweep, logged.buckets)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _config(path: Path, damaged: list[str]) -> tuple[str, Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "", {}
    except OSError as error:
        damaged.append(f"{path}: {error.strerror or error}")
        return "", {}
    try:
        found = parse(text, str(path))
    except (ValueError, RecursionError) as error:
        damaged.append(str(error))
        return text, {}
    return text, mapping(found)
