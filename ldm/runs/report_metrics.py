"""Metrics in a report: headline figures, and tables with the protocol beside every figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from ldm.formats.records import mapping, number, numbers
from ldm.runs.report_curves import Point, intervals
from ldm.runs.report_page import figure, folded, share_cell, table
from ldm.runs.report_words import explained
from ldm.runs.tradeoff import curve_of, drawing

Group = tuple[str, str, Mapping[str, Point]]  # guidance, pairs, shares by name
Results = Mapping[str, Mapping[str, Any]]  # by stage: the results by metric
SHOWN = ("bind", "strict", "colour", "shape", "size", "cell", "fill", "rel", "count", "tone", "texture", "bg")
OUTLINES = {"iou": "median", "iou_worst": "5 % worst"}
ABILITIES = (
    "object",
    "colour",
    "position",
    "two_objects",
    "binding",
    "relation",
    "counting",
    "background",
    "unseen_pair",
    "partial",
    "wording",
)
SHARES = frozenset({*SHOWN, *ABILITIES, "ssim"})
BOUND = "right colour and shape (bind)"  # in the words of whoever sees it first


def headlines(results: Results) -> Iterator[tuple[str, str, str]]:
    """The figures at the top of the page with their intervals, each of the last stage that measured it."""
    found: dict[str, tuple[str, str]] = {}
    for result in results.values():
        for kind, values in result.items():  # a second one of a kind, as adherence_2, measures something on the side
            if not isinstance(values, Mapping):
                continue
            if kind == "adherence":
                for pairs in ("seen", "held-out"):
                    _note(
                        found, mapping(values.get(pairs.replace("-", "_"))), "bind", f"{BOUND}, {pairs} pairs", ".3f", _first(values, pairs)
                    )
            elif kind == "reconstruction":
                _note(found, values, "bind", f"{BOUND}, reconstructions", ".3f")
                _note(found, values, "psnr", "dB PSNR of reconstructions", ".1f")
            elif kind == "frechet":
                floor = number(values.get("real_real_floor"))
                _note(found, values, "distance", f"Fréchet distance{'' if floor is None else f' (real pictures {floor:.1f})'}", ".1f")
    order = sorted(found, key=lambda what: (what.startswith("dB"), "Fréchet" in what, "reconstructions" in what))
    return ((*found[what], what) for what in order)


def _note(found: dict[str, tuple[str, str]], values: Mapping[str, Any], name: str, what: str, form: str, within: str = "") -> None:
    value = number(values.get(name))
    if value is not None:
        found[what] = (format(value, form), within)


def _first(values: Mapping[str, Any], pairs: str) -> str:
    """The interval of bind at the first guidance scale, whose mean the headline tells."""
    for by_pairs in mapping(values.get("intervals")).values():
        point = _point(mapping(mapping(by_pairs).get(pairs)).get("bind"))
        return f"95 %: {point[1]:.2f} – {point[2]:.2f}" if point else ""
    return ""


def _point(value: Any) -> Point | None:
    """(mean, low, high), where all three are numbers."""
    found = numbers(value)
    return (found["mean"], found["low"], found["high"]) if {"mean", "low", "high"} <= set(found) else None


def measurements(results: Results, required: Mapping[str, Mapping[str, float]]) -> str:
    """Every stage's tables, and whether it reached what was required."""
    parts = []
    for stage, result in results.items():
        shown = "".join(_one(name, values) for name, values in result.items() if isinstance(values, Mapping))
        curve = curve_of(result)
        shown += drawing({stage: curve}) if curve is not None else ""
        if shown:
            parts.append(f"<h3>{escape(stage)}</h3>{_required(result, required.get(stage, {}))}{shown}")
    return "".join(reversed(parts))


def _required(result: Mapping[str, Any], required: Mapping[str, float]) -> str:
    said = []
    for path, least in required.items():
        found: Any = result
        for word in path.split("."):
            found = mapping(found).get(word)
        value = number(found)
        if value is not None:
            met = value >= least
            said.append(
                f'<span class="{"good" if met else "bad"}">{escape(path)} {value:.3f} '
                f"{'reaches' if met else 'stays below'} {least:g}</span>"
            )
    return f"<p>{'<br>'.join(said)}</p>" if said else ""


def _one(name: str, values: Mapping[str, Any]) -> str:
    protocol = values.get("protocol")
    told = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in protocol.items()) if isinstance(protocol, Mapping) else ""
    note = f'<p class="note">{escape(name.replace("_", " "))}: {escape(told)}</p>' if told else ""
    by_scale = mapping(values.get("intervals"))
    if by_scale:
        return _adherence(values, by_scale) + note
    if "skipped" in values:
        return f'<p class="note">{escape(name)}: not measured, {escape(str(values["skipped"]))}</p>'
    plain = numbers(values)
    cells = [share_cell(v) if k in SHARES else f"{v:.2f}" for k, v in plain.items()]
    return table([escape(k.replace("_", " ")) for k in plain], [cells] if cells else []) + explained(plain) + note


def _adherence(values: Mapping[str, Any], by_scale: Mapping[str, Any]) -> str:
    """Rows of guidance and pairs, the interval below each share; bind and strict over guidance where there are several."""
    groups: list[Group] = [
        (scale, pairs, {name: point for name in SHOWN if (point := _point(mapping(found).get(name)))})
        for scale, by_pairs in by_scale.items()
        for pairs, found in mapping(by_pairs).items()
    ]
    names = [name for name in SHOWN if any(name in found for _, _, found in groups)]
    rows = []
    for scale, pairs, found in groups:
        cells = [share_cell(found[k][0], f"{found[k][1]:.2f} – {found[k][2]:.2f}") if k in found else "" for k in names]
        rows.append([f"{escape(pairs)} pairs, guidance {escape(scale)}", *cells])
    best = ", ".join(f"{value:.3f} {escape(pairs.replace('_', '-'))}" for pairs, value in numbers(values.get("checker")).items())
    ceiling = f'<p class="note">The checker reads bind {best} from perfect pictures.</p>' if best else ""
    sets = [name.replace("-", "_") for _, name, _ in groups]
    return table(["", *names], rows) + explained([*names, *sets]) + _shapes(values) + _over_guidance(groups) + ceiling


def _shapes(values: Mapping[str, Any]) -> str:
    """How far drawn objects cover the ideal shape, and what the same says of perfect pictures."""
    found = {pairs: numbers(outlines) for pairs, outlines in mapping(values.get("shapes")).items()}
    rows = [
        ["perfect pictures" if pairs == "ideal" else f"{escape(pairs.replace('_', '-'))} pairs", *(f"{of.get(k, 0):.3f}" for k in OUTLINES)]
        for pairs, of in found.items()
        if of
    ]
    return table(["overlap with the ideal shape", *OUTLINES.values()], rows) + explained(["iou"]) if rows else ""


def _over_guidance(groups: list[Group]) -> str:
    drawings = []
    for name in ("bind", "strict"):
        lines: dict[str, dict[float, Point]] = {}
        for scale, pairs, found in groups:
            if name in found and (at := _float(scale)) is not None:
                lines.setdefault(f"{pairs} pairs", {})[at] = found[name]
        drawing = intervals(lines)
        if drawing:
            drawings.append(figure(drawing, f"{name} over guidance"))
    return folded("over guidance", f'<div class="curves">{"".join(drawings)}</div>') if drawings else ""


def _float(text: str) -> float | None:
    try:
        return number(float(text))
    except ValueError:
        return None


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
