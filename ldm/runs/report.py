"""HTML report of a run: pictures, metrics, curves, timings, and how to reproduce it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from ldm.config.counts import plural
from ldm.config.secrets import redacted, unplaced
from ldm.formats.records import mapping, number
from ldm.runs import report_metrics
from ldm.runs.report_curves import curve, lines
from ldm.runs.report_page import figure, folded, page, picture, prompt_list, table, tiles
from ldm.runs.report_words import explained
from ldm.runs.run_record import StageRecord, StepRecord, Story, read_story, read_told

FILE = "report.html"
PICTURES_BYTES = 3_200_000  # of all pictures together, before they become a third more as text
CHECKPOINTS = 12  # sample grids of one stage, evenly spaced, the last among them
ALARMS = 8  # of a stage's that are shown, the latest
PROMPTS = "prompts.json"


def report(run_folder: Path | str, read: Story | None = None) -> Path:
    """Write report.html of a run folder, from whatever is there, and return its path.

    Args:
        read: what the folder tells, if it was read just now.

    Raises:
        UserError: if the folder holds nothing of a run.
    """
    story = read_story(Path(run_folder)) if read is None else read
    path = story.folder / FILE
    temporary = path.with_name(f".{FILE}.partial")
    temporary.write_text(render(story), encoding="utf-8", errors="backslashreplace")  # half characters
    temporary.replace(path)
    return path


def render(story: Story) -> str:
    """The page."""
    measured = {stage.name: stage for stage in story.stages if stage.kind == "evaluate" and stage.result}
    required = {name: stage.required for name, stage in measured.items()}
    results = {name: stage.result for name, stage in measured.items()}
    left = escape(", ".join(stage.name for stage in story.stages if stage.done is None))
    state = '<span class="good">finished</span>' if story.finished else f'<span class="bad">unfinished</span>: {left} to do'
    seconds = sum(stage.seconds for stage in story.stages)
    facts = [(duration(seconds), "", "in all stages")] if seconds else []
    seen = sum(stage.images for stage in story.stages if stage.kind == "train")
    facts += [(short(seen), "", "images trained on")] if seen else []
    header = f"<h1>{escape(story.name)}</h1><p>{state}</p>{tiles([*report_metrics.headlines(results), *facts])}"
    return page(
        story.name,
        header,
        (
            ("pictures", "Pictures", _pictures(story)),
            ("measurements", "Measurements", report_metrics.measurements(results, required)),
            ("held-out", "Held-out loss", _held_out(story)),
            ("ema", "EMA length", _ema_lengths(story)),
            ("curves", "Curves", _curves(story)),
            ("stages", "Stages", _timings(story)),
            ("again", "Do it again", _again(story)),
            ("settings", "Settings", _settings(story)),
        ),
    )


def _pictures(story: Story) -> str:
    """What each stage drew: a stage's grids over time behind a slider, an evaluation's side by side. The last stage comes first."""
    shown = [(stage, _chosen(sorted((stage.folder / "samples").glob("*.png"), key=_place))) for stage in story.stages]
    count = sum(len(paths) for _, paths in shown)
    parts = []
    for stage, paths in reversed(shown):
        timed = bool(paths) and all(path.stem.isdecimal() for path in paths)
        figures = []
        prompts = read_told(stage.folder / "samples" / PROMPTS)
        for path in paths:
            found = picture(path, PICTURES_BYTES // count, 820 if timed else 540)
            if found is None:
                continue
            caption = f"after {plural(int(path.stem), 'image')}" if timed else caption_of(path.stem)
            own = prompts.get("" if timed else path.stem)
            figures.append(figure(found + ("" if timed else _folded_prompts(own)), caption))
        if figures:
            below = _folded_prompts(prompts.get("")) if timed else ""
            kind = "row slides" if timed else "row"
            parts.append(f'<h3>{escape(stage.name)}</h3><div class="{kind}">{"".join(figures)}</div>{below}')
    return "".join(parts)


def _place(path: Path) -> tuple[bool, str]:
    """Where a picture stands in its stage's row: pairs that training showed come first."""
    return "held-out" in path.stem, path.stem


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
    if kind == "neighbours":
        return f"drawn pictures, each with the training pictures nearest to it on the right, {rest} px"
    if kind == "adherence":
        *pairs, size = rest.split("-") if rest[-1:].isdigit() else [*rest.split("-"), ""]
        told = "seen in training" if pairs == ["seen"] else "never seen in training"
        return f"colour-shape pairs {told}{f', {size} px' if size else ''}"
    if kind == "abilities":
        name, _, size = rest.rpartition("-")
        return f"ability: {name.replace('_', ' ')}, {size} px"
    return stem


def _curves(story: Story) -> str:
    """Loss, its terms, speed and gauges over images, by stage."""
    parts = []
    for stage in story.stages:
        readers: list[tuple[str, Reader]] = [("loss", _value("loss"))]
        terms = _names(step.terms for step in stage.steps)
        if len(terms) > 1:
            readers += [(name, _term(name)) for name in terms]
        readers += [("learning rate", _value("lr")), ("images/s", _value("images_per_s"))]
        readers += [("share waited for data", _value("data_wait")), ("MFU", _value("mfu"))]
        shown = {name: drawing for name, of in readers if (drawing := _drawn(stage, name, of))}
        if not shown:
            continue
        gauges = _names(step.gauges for step in stage.steps)
        more = "".join(_drawn(stage, name, _gauge(name)) for name in gauges)
        inside = f'<div class="curves">{more}</div>{explained(gauges)}' if more else ""
        first = f'<div class="curves">{"".join(shown.values())}</div>{explained(shown)}'
        odd = f'<p class="bad">{"<br>".join(escape(_private(text)) for text in stage.alarms[-ALARMS:])}</p>' if stage.alarms else ""
        parts.append(f"<h3>{escape(stage.name)}</h3>{odd}{first}{folded(f'gauges of {stage.name}', inside)}")
    note = '<p class="note">Over images seen. Pale: as logged; strong: running mean.</p>' if parts else ""
    return note + "".join(parts)


KINDS = {"train": "training samples", "held_out": "held-out samples"}


def _held_out(story: Story) -> str:
    """Loss of training and of held-out samples, over images and by noise level."""
    parts = []
    for stage in story.stages:
        if not stage.levels:
            continue
        last = stage.levels[-1]
        by_level = {said: list(zip(last.sigma, getattr(last, kind), strict=True)) for kind, said in KINDS.items()}
        over = {said: [(at.images, fmean(getattr(at, kind))) for at in stage.levels] for kind, said in KINDS.items()}
        train, held_out = (fmean(getattr(last, kind)) for kind in KINDS)
        told = f"{train:.4g} of training samples, {held_out:.4g} of held-out ones at the end"
        drawn = figure(lines(over) or "", f"over images: {told}")
        drawn += figure(lines(by_level, log_y=True) or "", "over the share of noise, from clean (0) to noise alone (1)")
        parts.append(f'<h3>{escape(stage.name)}</h3><div class="curves">{drawn}</div>')
    note = (
        '<p class="note">Loss of the averaged weights on samples that are trained on and on as many that are not, in noise that never'
        " changes: where the first falls and the second does not follow, the model memorises.</p>"
    )
    return note + "".join(parts) if parts else ""


def _ema_lengths(story: Story) -> str:
    """What a sweep over lengths of the EMA measured."""
    parts = []
    for stage in story.stages:
        if not (rows := stage.sweep):
            continue
        names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("length", "misfit")]
        over = {name: [(row["length"], row[name]) for row in rows if name in row and "length" in row] for name in names}
        groups: dict[str, list[str]] = {
            "loss": [n for n in ("train", "held_out") if n in over],
            "bind": [n for n in names if n.startswith("bind")],
        }
        drawn = "".join(
            figure(drawing, f"{said} over the length of the EMA")
            for said, own in groups.items()
            if (drawing := lines({name.replace("_", " "): sorted(over[name]) for name in own}))
        )
        cells = [[f"{row.get('length', 0):g}", *(f"{row[n]:.4g}" if n in row else "" for n in names)] for row in rows]
        parts.append(f'<h3>{escape(stage.name)}</h3><div class="curves">{drawn}</div>')
        parts.append(table(["length (sigma_rel)", *(escape(n.replace("_", " ")) for n in names)], cells))
    note = '<p class="note">Averages of other lengths, made after training (<code>ldm ema RUN --length X</code> writes the model).</p>'
    return note + "".join(parts) if parts else ""


Reader = Callable[[StepRecord], float | None]


def _value(name: str) -> Reader:
    return lambda step: step.values.get(name)


def _term(name: str) -> Reader:
    return lambda step: step.terms.get(name)


def _gauge(name: str) -> Reader:
    return lambda step: step.gauges.get(name)


def _names(groups: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _drawn(stage: StageRecord, name: str, of: Reader) -> str:
    points = [(step.images, value) for step in stage.steps if (value := of(step)) is not None]
    drawing = curve(*zip(*points, strict=True)) if points else None
    return figure(drawing, f"{name.replace('_', ' ')}: {points[-1][1]:.4g} at the end") if drawing else ""


def _timings(story: Story) -> str:
    """What every stage was, how long it took and what it needed."""
    longest = max((stage.seconds for stage in story.stages), default=0) or 1
    rows = []
    for stage in story.stages:
        seconds, images = stage.seconds, stage.images
        memory = max((step.values.get("peak_memory_mb", 0) for step in stage.steps), default=0)
        amount = f"{images:,}" if images else ""
        if stage.done is None and stage.kind == "train" and stage.wanted:
            amount = f"{images:,} of {stage.wanted:,}"
        resolution = number(stage.settings.get("resolution"))
        side = f"{resolution:g} px" if resolution else ""
        colour = "" if stage.done is not None else ' class="bad"'
        rows.append(
            [
                f"<b>{escape(stage.name)}</b>",
                escape(" ".join(filter(None, (stage.kind, str(stage.settings.get("model") or ""))))),
                f"<span{colour}>{stage.state}</span>",
                side,
                amount,
                f'<td class="bar" style="--share:{100 * seconds / longest:.1f}%">{duration(seconds) if seconds else ""}</td>',
                f"{images / seconds:,.0f}" if images and seconds else "",
                f"{memory:,.0f} MB" if memory else "",
            ]
        )
    shapes = "".join(_buckets(stage) for stage in story.stages if stage.buckets)
    shapes += "".join(f'<p class="note">{escape(stage.name)}, {escape(change)}</p>' for stage in story.stages for change in stage.changes)
    return table(("stage", "kind", "state", "size", "images", "time", "images/s", "peak memory"), rows) + shapes


def _buckets(stage: StageRecord) -> str:
    """The shapes that a stage's pictures had."""
    rows = [
        [f"{row.get('width', 0):g} x {row.get('height', 0):g}", *(f"{row.get(name, 0):,.0f}" for name in ("images", "updates", "missed"))]
        + [f"{row.get('cut', 0):.1%}"]
        for row in stage.buckets
    ]
    return folded(f"shapes of {stage.name}", table(("width x height", "pictures", "updates", "never reached", "cut away"), rows))


def _again(story: Story) -> str:
    """The commands that repeat, use and measure this run."""
    prompt, folder = _prompt(story), _private(story.folder.as_posix())
    train = f"python train.py {folder}/config.yaml"
    commands = [f"{train}   # goes on where it stopped", f"{train} out=runs/again   # from the beginning, elsewhere"]
    if (story.folder / "model").is_dir():
        source = mapping(story.config.get("data"))
        kind = source.get("kind")
        on = f"scenes --tier {source.get('tier')}" if kind == "scenes" else _private(str(source.get("path", "DIR")))
        commands.append(_usage(story, prompt, folder))
        commands.append(f"python -m ldm evaluate {folder} --on {on} --json result.json")
    commands.append(f"python -m ldm report {folder}   # writes this page anew")
    return f"<pre>{escape(chr(10).join(commands))}</pre>" + _versions(story)


def _usage(story: Story, prompt: str, folder: str) -> str:
    """The command that shows what the model does, as its kind has told."""
    use = mapping(read_told(story.folder / "model" / "ldm.json").get("story")).get("use")
    said = use if isinstance(use, str) else 'python sample.py "PROMPT" --model MODEL --n 4'
    return said.replace("MODEL", folder).replace("PROMPT", prompt)


def _prompt(story: Story) -> str:
    for stage in reversed(story.stages):
        for prompts in read_told(stage.folder / "samples" / PROMPTS).values():
            if prompts and isinstance(prompts, list):
                return str(prompts[0]).replace('"', "").replace("\n", " ")
    return "a picture"


def _versions(story: Story) -> str:
    import importlib.metadata as metadata
    import platform

    from ldm.config.version import __version__

    def versions() -> Iterator[str]:
        for name in ("torch", "diffusers", "transformers", "accelerate", "open_clip_torch", "numpy"):
            try:
                yield f"{name} {metadata.version(name)}"
            except metadata.PackageNotFoundError:
                continue

    here = ", ".join([f"ldm {__version__}", f"Python {platform.python_version()}", *versions(), platform.platform(terse=True)])
    ran = [note for note in story.notes if note.startswith("ldm ")]
    by = f"<p>It ran with {escape(_private(ran[-1]))}{f', in {len(ran)} starts' if len(ran) > 1 else ''}.</p>" if ran else ""
    return f'{by}<p class="note">This page was written with {escape(here)}.</p>'


def _settings(story: Story) -> str:
    """The configuration, the log's words, and the content hashes."""
    hashes = [
        [escape(s.name), *(f"<code>{escape(str((s.done or {}).get(k) or '')[:16])}</code>" for k in ("key", "product"))]
        for s in story.stages
        if s.done is not None
    ]
    warned = [*story.damaged, *(note for note in story.notes if note.startswith("warning"))]
    told = f'<p class="bad">{"<br>".join(escape(_private(note)) for note in dict.fromkeys(warned))}</p>' if warned else ""
    return told + "".join(
        (
            folded("config.yaml, with every default", f"<pre>{escape(_private(story.text))}</pre>" if story.text else ""),
            folded("what the log says", f"<pre>{escape(_private(chr(10).join(story.notes)))}</pre>" if story.notes else ""),
            folded("content hashes", table(("stage", "key", "product"), hashes, words=True)),
        )
    )


def _private(text: str) -> str:
    """A text for a page that is shown around: without secrets, and without where it was made."""
    return unplaced(redacted(text))


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
