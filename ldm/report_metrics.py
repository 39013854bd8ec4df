"""Measurements of a run, as the parts of its page: headline figures, and tables with the protocol beside every figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from ldm.report_curves import Point, intervals
from ldm.report_page import figure, folded, share_cell, table

Results = Mapping[str, Mapping[str, Any]]  # by stage: the results by metric
SHOWN = ("bind", "strict", "colour", "shape", "size", "cell", "fill", "rel", "count", "tone", "texture", "bg")
SHARES = frozenset({*SHOWN, "ssim"})


def headlines(results: Results) -> Iterator[tuple[str, str]]:
    """The figures at the top of the page, each of the last stage that measured it."""
    found: dict[str, str] = {}
    for result in results.values():
        for kind, values in result.items():  # a second one of a kind, as adherence_2, measures something on the side
            if not isinstance(values, Mapping):
                continue
            if kind == "adherence":
                for pairs in ("seen", "held_out"):
                    _note(found, values.get(pairs), "bind", f"bind, {pairs.replace('_', '-')} pairs", ".3f")
            elif kind == "reconstruction":
                _note(found, values, "bind", "bind of reconstructions", ".3f")
                _note(found, values, "psnr", "dB PSNR of reconstructions", ".1f")
            elif kind == "frechet":
                floor = values.get("real_real_floor")
                told = f" (real pictures {floor:.1f})" if isinstance(floor, int | float) else ""
                _note(found, values, "distance", f"Fréchet distance{told}", ".1f")
    order = sorted(found, key=lambda what: (what.startswith("dB"), "Fréchet" in what, "reconstructions" in what))
    return ((found[what], what) for what in order)


def _note(found: dict[str, str], values: Any, name: str, what: str, form: str) -> None:
    value = values.get(name) if isinstance(values, Mapping) else None
    if isinstance(value, int | float):
        found[what] = format(value, form)


def measurements(results: Results, required: Mapping[str, Mapping[str, float]]) -> str:
    """Every stage's tables, and whether it reached what was required."""
    parts = []
    for stage, result in results.items():
        shown = "".join(_one(name, values) for name, values in result.items() if isinstance(values, Mapping))
        if shown:
            parts.append(f"<h3>{escape(stage)}</h3>{_required(result, required.get(stage, {}))}{shown}")
    return "".join(reversed(parts))


def _required(result: Mapping[str, Any], required: Any) -> str:
    said = []
    for path, least in required.items() if isinstance(required, Mapping) else ():
        value: Any = result
        for word in str(path).split("."):
            value = value.get(word) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            met = value >= least
            said.append(f'<span class="{"good" if met else "bad"}">{escape(str(path))} {value:.3f} '
                        f'{"reaches" if met else "stays below"} {least:g}</span>')  # fmt: skip
    return f"<p>{'<br>'.join(said)}</p>" if said else ""


def _one(name: str, values: Mapping[str, Any]) -> str:
    protocol = values.get("protocol")
    told = ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in protocol.items()) if isinstance(protocol, Mapping) else ""
    note = f'<p class="note">{escape(name.replace("_", " "))}: {escape(told)}</p>' if told else ""
    by_scale = values.get("intervals")
    if isinstance(by_scale, Mapping) and by_scale:
        return _adherence(values, by_scale) + note
    if "skipped" in values:
        return f'<p class="note">{escape(name)}: not measured, {escape(str(values["skipped"]))}</p>'
    numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    cells = [share_cell(v) if k in SHARES else f"{v:.2f}" for k, v in numbers.items()]
    return table([escape(k.replace("_", " ")) for k in numbers], [cells] if cells else []) + note


def _adherence(values: Mapping[str, Any], by_scale: Mapping[str, Any]) -> str:
    """Rows of guidance and pairs, the interval below each share; bind and strict over guidance where there are several."""
    groups = [(scale, pairs, found) for scale, by_pairs in by_scale.items() for pairs, found in by_pairs.items()]
    names = [name for name in SHOWN if any(name in found for _, _, found in groups)]
    rows = []
    for scale, pairs, found in groups:
        cells = [share_cell(found[k]["mean"], f"{found[k]['low']:.2f} – {found[k]['high']:.2f}") if k in found else "" for k in names]
        rows.append([f"{escape(str(pairs))} pairs, guidance {escape(str(scale))}", *cells])
    checker = values.get("checker")
    best = "".join(f"{', ' if i else ''}{v:.3f} {escape(k.replace('_', '-'))}" for i, (k, v) in enumerate(checker.items())) \
        if isinstance(checker, Mapping) else ""  # fmt: skip
    ceiling = f'<p class="note">The checker reads bind {best} from perfect pictures.</p>' if best else ""
    return table(["", *names], rows) + _over_guidance(groups) + ceiling


def _over_guidance(groups: list[tuple[str, str, Mapping[str, Any]]]) -> str:
    drawings = []
    for name in ("bind", "strict"):
        lines: dict[str, dict[float, Point]] = {}
        for scale, pairs, found in groups:
            if name in found:
                point = found[name]
                lines.setdefault(f"{pairs} pairs", {})[float(scale)] = (point["mean"], point["low"], point["high"])
        drawing = intervals(lines)
        if drawing:
            drawings.append(figure(drawing, f"{name} over guidance"))
    return folded("over guidance", f'<div class="curves">{"".join(drawings)}</div>') if drawings else ""


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
