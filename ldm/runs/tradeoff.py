"""Trade-off over guidance: the distance from real pictures against how well prompts are followed, one point for each scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.formats.records import mapping, number
from ldm.runs.report_curves import tradeoff
from ldm.runs.report_page import figure, page, table

FORMS = (".png", ".svg", ".html")


@dataclass(frozen=True)
class Point:
    """One guidance scale."""

    guidance: float
    distance: float  # the lower the better
    score: float  # the higher the better


@dataclass(frozen=True)
class Curve:
    """What a model measures at several guidance scales."""

    points: Sequence[Point]
    distance: str  # what the distances are
    score: str  # what the scores are


def curve_of(result: Mapping[str, Any]) -> Curve | None:
    """The curve that the results of a model hold, by metric; None where fewer than two scales have both.

    The score is the CLIP score where there is one, else the adherence with seen colour-shape pairs.
    """
    distances, features = _by_guidance(result, "frechet", "distance")
    scores, _ = _by_guidance(result, "clip_score", "score")
    said = "CLIP score"
    if len(scores) < 2:
        said = "bind of seen pairs"
        by_scale = mapping(mapping(result.get("adherence")).get("intervals"))
        found = {_float(scale): mapping(mapping(mapping(groups).get("seen")).get("bind")).get("mean") for scale, groups in by_scale.items()}
        scores = {scale: value for scale, mean in found.items() if scale is not None and (value := number(mean)) is not None}
    shared = sorted(set(distances) & set(scores))
    if len(shared) < 2:
        return None
    what = "FID" if features.startswith("inception") else f"Fréchet distance ({features.partition(',')[0]})"
    return Curve([Point(scale, distances[scale], scores[scale]) for scale in shared], what, said)


def _by_guidance(result: Mapping[str, Any], kind: str, name: str) -> tuple[dict[float, float], str]:
    """The values of a metric by guidance, and the features that they were measured in."""
    found: dict[float, float] = {}
    features = ""
    for key, values in result.items():
        if key.rstrip("_0123456789") == kind and isinstance(values, Mapping):
            protocol = mapping(values.get("protocol"))
            scale, value = number(protocol.get("guidance")), number(values.get(name))
            if scale is not None and value is not None and scale not in found:
                found[scale], features = value, str(protocol.get("features", features))
    return found, features


def _float(text: str) -> float | None:
    try:
        return number(float(text))
    except ValueError:
        return None


def drawing(curves: Mapping[str, Curve]) -> str:
    """All curves in one figure, each point with its scale, and their figures below; empty where there are none."""
    if not curves:
        return ""
    first = next(iter(curves.values()))
    drawn = tradeoff(
        {name: [(p.score, p.distance, p.guidance) for p in one.points] for name, one in curves.items()}, first.score, first.distance
    )
    rows = [[escape(name), f"{p.guidance:g}", f"{p.score:.3f}", f"{p.distance:.3f}"] for name, one in curves.items() for p in one.points]
    note = '<p class="note">Each point is a guidance scale: right is closer to the prompt, down is closer to real pictures.</p>'
    shown = figure(str(drawn), f"{first.distance} against {first.score}")
    return note + f'<div class="panel">{shown}</div>' + table(["model", "guidance", escape(first.score), escape(first.distance)], rows)


def check(path: Path) -> None:
    """Raises UserError for a file that is none of what `write` writes."""
    if path.suffix.lower() not in FORMS:
        raise UserError(f"plot: {path}: a file that ends in {', '.join(FORMS)} is needed")


def write(path: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the curves of several models' results into a file: a picture, or a page with the figures.

    Raises:
        UserError: where no model has two scales, or models were measured in different things.
    """
    curves = {name: one for name, result in results.items() if (one := curve_of(result)) is not None}
    if not curves:
        raise UserError("plot: there is no curve to draw: give several scales, such as --guidance 1,2,3,5")
    if len(kinds := {(one.distance, one.score) for one in curves.values()}) > 1:
        raise UserError(f"plot: the models were measured in different things: {'; '.join(sorted(map(str, kinds)))}")
    if path.suffix.lower() == ".html":
        shown = ", ".join(results)
        path.write_text(page(shown, f"<h1>{escape(shown)}</h1>", [("guidance", "Over guidance", drawing(curves))]), encoding="utf-8")
        return
    first = next(iter(curves.values()))
    named = {name: [(p.score, p.distance, p.guidance) for p in one.points] for name, one in curves.items()}
    made = tradeoff(named, first.score, first.distance, path.suffix.lower()[1:])
    path.write_bytes(made if isinstance(made, bytes) else made.encode())
