"""A run as one self-contained page: pictures, measurements, curves, timings, and how to do it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm import log, report_metrics
from ldm.cli import call
from ldm.errors import UserError
from ldm.report_curves import curve
from ldm.report_page import figure, folded, page, picture, prompt_list, table, tiles

FILE = "report.html"
PICTURES_BYTES = 3_200_000  # of all pictures together, before they become a third more as text
CHECKPOINTS = 12  # sample grids of one stage, evenly spaced, the last among them
PROMPTS = "prompts.json"


@dataclass(frozen=True)
class Stage:
    """What a run folder tells of one stage."""

    name: str
    settings: Mapping[str, Any]  # of config.yaml
    done: Mapping[str, Any] | None  # done.json; None: not finished
    folder: Path
    lines: Sequence[Mapping[str, Any]]  # its logged steps

    @property
    def kind(self) -> str:
        """train, encode, evaluate, export."""
        return str(self.settings.get("kind") or (self.done or {}).get("kind") or "")

    @property
    def state(self) -> str:
        """finished, unfinished or waiting."""
        if self.done is not None:
            return "finished"
        return "unfinished" if self.lines or self.folder.is_dir() else "waiting"

    @property
    def images(self) -> int:
        """How many it has seen."""
        return int((self.done or {}).get("images") or (self.lines[-1].get("images", 0) if self.lines else 0))

    @property
    def result(self) -> Mapping[str, Any]:
        """Of done.json."""
        found = (self.done or {}).get("result")
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Story:
    """What a run folder tells of the run, as far as it goes."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    text: str  # config.yaml as it stands
    stages: Sequence[Stage]
    notes: Sequence[str]

    @property
    def finished(self) -> bool:
        """Whether every stage is."""
        return bool(self.stages) and all(stage.done is not None for stage in self.stages)


def main(words: Sequence[str]) -> int:
    """`ldm report RUN`: the exit code."""
    return call(_verb, words, "ldm report")


def _verb(run: Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart; it may be unfinished.")]) -> int:
    """Write the page of a run, report.html, anew."""
    print(report(run))
    return 0


def report(run_folder: Path | str) -> Path:
    """Write report.html of a run folder, from whatever is there, and return its path.

    Raises:
        UserError: if the folder holds nothing of a run.
    """
    story = read_story(Path(run_folder))
    path = story.folder / FILE
    temporary = path.with_name(f".{FILE}.partial")
    temporary.write_text(render(story), encoding="utf-8")
    temporary.replace(path)
    return path


def read_story(folder: Path) -> Story:
    """All that the files of a run folder tell; files that are missing or damaged tell nothing.

    Raises:
        UserError: if there is neither a configuration nor a log nor a stage.
    """
    if not any((folder / name).exists() for name in ("config.yaml", log.LOG, "stages")):
        raise UserError(f"{folder}: no run here; a folder with config.yaml, {log.LOG} or stages/ was expected")
    text, config = _config(folder / "config.yaml")
    lines = log.read(folder / log.LOG)
    declared = config.get("stages")
    settings = {str(k): v if isinstance(v, Mapping) else {} for k, v in declared.items()} if isinstance(declared, Mapping) else {}
    there = sorted((p for p in folder.glob("stages/*") if p.is_dir() and ".replaced-" not in p.name), key=lambda p: p.stat().st_mtime)
    names = [*settings, *(p.name for p in there if p.name not in settings)]
    stages = [_stage(name, settings.get(name, {}), folder / "stages" / name, lines) for name in names]
    notes = [str(line["note"]) for line in lines if "note" in line]
    return Story(folder, str(config.get("name") or folder.resolve().name), config, text, stages, notes)


def _stage(name: str, settings: Mapping[str, Any], folder: Path, lines: Sequence[Mapping[str, Any]]) -> Stage:
    done = read_json(folder / "done.json")
    own = [line for line in lines if line.get("stage") == name and isinstance(line.get("images"), int | float) and "step" in line]
    own.sort(key=lambda line: line["images"])
    return Stage(name, settings, done if isinstance(done, Mapping) else None, folder, own)


def _config(path: Path) -> tuple[str, Mapping[str, Any]]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text, {}
    return text, found if isinstance(found, Mapping) else {}


def read_json(path: Path) -> Any:
    """The file's value, or None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def render(story: Story) -> str:
    """The page."""
    measured = {stage.name: stage for stage in story.stages if stage.kind == "evaluate" and stage.result}
    required = {name: stage.settings.get("require") or {} for name, stage in measured.items()}
    results = {name: stage.result for name, stage in measured.items()}
    left = escape(", ".join(stage.name for stage in story.stages if stage.done is None))
    state = '<span class="good">finished</span>' if story.finished else f'<span class="bad">unfinished</span>: {left} to do'
    seconds = sum(_seconds(stage) for stage in story.stages)
    facts = [(duration(seconds), "in all stages")] if seconds else []
    seen = sum(stage.images for stage in story.stages if stage.kind == "train")
    facts += [(short(seen), "images trained on")] if seen else []
    header = f"<h1>{escape(story.name)}</h1><p>{state}</p>{tiles([*report_metrics.headlines(results), *facts])}"
    return page(story.name, header, (
        ("pictures", "Pictures", _pictures(story)),
        ("measurements", "Measurements", report_metrics.measurements(results, required)),
        ("curves", "Curves", _curves(story)),
        ("stages", "Stages", _timings(story)),
        ("again", "Do it again", _again(story)),
        ("settings", "Settings", _settings(story)),
    ))  # fmt: skip


def _pictures(story: Story) -> str:
    """What each stage drew: a stage's grids over time behind a slider, an evaluation's side by side. The last stage comes first."""
    shown = [(stage, _chosen(sorted((stage.folder / "samples").glob("*.png")))) for stage in story.stages]
    count = sum(len(paths) for _, paths in shown)
    parts = []
    for stage, paths in reversed(shown):
        timed = bool(paths) and all(path.stem.isdigit() for path in paths)
        figures = []
        prompts = read_json(stage.folder / "samples" / PROMPTS)
        prompts = prompts if isinstance(prompts, Mapping) else {}
        for path in paths:
            found = picture(path, PICTURES_BYTES // count, 820 if timed else 540)
            if found is None:
                continue
            caption = f"after {int(path.stem):,} images" if timed else caption_of(path.stem)
            own = prompts.get("" if timed else path.stem)
            figures.append(figure(found + ("" if timed else _folded_prompts(own)), caption))
        if figures:
            below = _folded_prompts(prompts.get("")) if timed else ""
            kind = "row slides" if timed else "row"
            parts.append(f'<h3>{escape(stage.name)}</h3><div class="{kind}">{"".join(figures)}</div>{below}')
    return "".join(parts)


def _folded_prompts(prompts: Any) -> str:
    return folded("prompts, row by row", prompt_list([str(text) for text in prompts])) if isinstance(prompts, list) else ""


def _chosen(paths: Sequence[Path]) -> list[Path]:
    """At most CHECKPOINTS of them, evenly spaced, first and last among them."""
    if len(paths) <= CHECKPOINTS:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (CHECKPOINTS - 1))] for i in range(CHECKPOINTS)]


def caption_of(stem: str) -> str:
    """What an evaluation's picture shows, from its file's name."""
    kind, _, rest = stem.partition("-")
    if kind == "reconstruction":
        return f"originals, each with its reconstruction on the right, {rest} px"
    if kind == "adherence":
        *pairs, size = rest.split("-") if rest[-1:].isdigit() else [*rest.split("-"), ""]
        told = "seen in training" if pairs == ["seen"] else "never seen in training"
        return f"colour-shape pairs {told}{f', {size} px' if size else ''}"
    return stem


def _curves(story: Story) -> str:
    """Loss, its terms, speed and gauges over images, by stage."""
    parts = []
    for stage in story.stages:
        terms, gauges = (_names(stage.lines, group) for group in ("terms", "gauges"))
        plain = [("loss", None), *((name, "terms") for name in terms if len(terms) > 1), ("lr", None), ("images_per_s", None)]
        first = "".join(_drawn(stage, name, group) for name, group in plain)
        if not first:
            continue
        more = "".join(_drawn(stage, name, "gauges") for name in gauges)
        inside = f'<div class="curves">{more}</div>' if more else ""
        parts.append(f'<h3>{escape(stage.name)}</h3><div class="curves">{first}</div>{folded(f"gauges of {stage.name}", inside)}')
    note = '<p class="note">Over images seen. Pale: as logged; strong: running mean.</p>' if parts else ""
    return note + "".join(parts)


def _names(lines: Sequence[Mapping[str, Any]], group: str) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in (line.get(group) or {})))


def _drawn(stage: Stage, name: str, group: str | None) -> str:
    points = []
    for line in stage.lines:
        value = (line.get(group) or {}).get(name) if group else line.get(name)
        if isinstance(value, int | float):
            points.append((line["images"], value))
    drawing = curve(*zip(*points, strict=True)) if points else None
    caption = {"lr": "learning rate", "images_per_s": "images/s"}.get(name, name.replace("_", " "))
    return figure(drawing, f"{caption}: {points[-1][1]:.4g} at the end") if drawing else ""


def _seconds(stage: Stage) -> float:
    if stage.done is not None:
        return float(stage.done.get("seconds") or 0)
    return log.seconds_by_stage(list(stage.lines)).get(stage.name, 0.0)


def _timings(story: Story) -> str:
    """What every stage was, how long it took and what it needed."""
    longest = max((_seconds(stage) for stage in story.stages), default=0) or 1
    rows = []
    for stage in story.stages:
        seconds, images = _seconds(stage), stage.images
        memory = max((float(line.get("peak_memory_mb") or 0) for line in stage.lines), default=0)
        wanted = stage.settings.get("images") if stage.kind == "train" else None
        amount = f"{images:,}" if images else ""
        if stage.done is None and isinstance(wanted, int):
            amount = f"{images:,} of {wanted:,}"
        side = f"{stage.settings['resolution']} px" if stage.settings.get("resolution") else ""
        colour = "" if stage.done is not None else ' class="bad"'
        rows.append([
            f"<b>{escape(stage.name)}</b>", escape(" ".join(filter(None, (stage.kind, str(stage.settings.get("family") or ""))))),
            f"<span{colour}>{stage.state}</span>", side, amount,
            f'<td class="bar" style="--share:{100 * seconds / longest:.1f}%">{duration(seconds) if seconds else ""}</td>',
            f"{images / seconds:,.0f}" if images and seconds else "", f"{memory:,.0f} MB" if memory else "",
        ])  # fmt: skip
    return table(("stage", "kind", "state", "size", "images", "time", "images/s", "peak memory"), rows)


def _again(story: Story) -> str:
    """The commands that repeat, use and measure this run."""
    prompt, folder = _prompt(story), story.folder.as_posix()
    train = f"python train.py {folder}/config.yaml"
    commands = [f"{train}   # goes on where it stopped", f"{train} out=runs/again   # from the beginning, elsewhere"]
    if (story.folder / "model").is_dir():
        source = story.config.get("data") or {}
        kind = source.get("kind")
        on = f"scenes --tier {source.get('tier')}" if kind == "scenes" else str(source.get("path", "DIR"))
        commands += [f'python sample.py "{prompt}" --model {folder} --n 4', f"python -m ldm evaluate {folder} --on {on} --json result.json"]
    commands.append(f"python -m ldm report {folder}   # writes this page anew")
    return f"<pre>{escape(chr(10).join(commands))}</pre>" + _versions(story)


def _prompt(story: Story) -> str:
    for stage in reversed(story.stages):
        found = read_json(stage.folder / "samples" / PROMPTS)
        for prompts in found.values() if isinstance(found, Mapping) else ():
            if prompts and isinstance(prompts, list):
                return str(prompts[0]).replace('"', "").replace("\n", " ")
    return "a picture"


def _versions(story: Story) -> str:
    import importlib.metadata as metadata
    import platform

    from ldm import __version__

    def versions() -> Iterator[str]:
        for name in ("torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "numpy"):
            try:
                yield f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                continue

    here = ", ".join([f"ldm {__version__}", f"Python {platform.python_version()}", *versions(), platform.platform(terse=True)])
    ran = [note for note in story.notes if note.startswith("ldm ")]
    by = f"<p>It ran with {escape(ran[-1])}{f', in {len(ran)} starts' if len(ran) > 1 else ''}.</p>" if ran else ""
    return f'{by}<p class="note">This page was written with {escape(here)}.</p>'


def _settings(story: Story) -> str:
    """The configuration, the log's words, and the content hashes."""
    hashes = [[escape(s.name), *(f"<code>{escape(str((s.done or {}).get(k) or '')[:16])}</code>" for k in ("key", "product"))]
              for s in story.stages if s.done is not None]  # fmt: skip
    warned = [note for note in story.notes if note.startswith("warning")]
    told = f'<p class="bad">{"<br>".join(escape(note) for note in dict.fromkeys(warned))}</p>' if warned else ""
    return told + "".join((
        folded("config.yaml, with every default", f"<pre>{escape(story.text)}</pre>" if story.text else ""),
        folded("what the log says", f"<pre>{escape(chr(10).join(story.notes))}</pre>" if story.notes else ""),
        folded("content hashes", table(("stage", "key", "product"), hashes, words=True)),
    ))  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds as a reader says them."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def short(count: float) -> str:
    """A count in thousands or millions."""
    for size, name in ((1e9, " G"), (1e6, " M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if name == 'k' else size):.3g}{name}"
    return f"{count:,.0f}"
