"""SVG curves of a report, in the page's text colour for light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 1e100  # of what is drawn: axes reckon in powers beyond their ends
POINTS = 160  # at most in one line of a drawing; denser logs are averaged
COLOURS = ("#3b7dd8", "#e07b39", "#2f9e73", "#b455a0", "#8a8d2a", "#5b6cc4")
INK = "#010203"  # stands for the page's text colour while matplotlib draws
Point = tuple[float, float, float]  # mean and the ends of its interval


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The curve in order of x without values that are not finite or beyond LARGEST; averages of neighbours, at most `points` of them."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    kept = (abs(a) <= LARGEST) & (abs(b) <= LARGEST)  # no number is neither
    a, b = a[kept], b[kept]
    order = np.argsort(a, kind="stable")
    a, b = a[order], b[order]
    if len(a) <= points:
        return a, b
    return tuple(np.array([part.mean() for part in np.array_split(values, points)]) for values in (a, b))  # type: ignore[return-value]


def smoothed(y: NDArray[np.float64], share: float = 0.06) -> NDArray[np.float64]:
    """A centred running mean over `share` of the points, shorter at both ends."""
    half = max(1, int(len(y) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(y)])
    at = np.arange(len(y))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(y))
    return (sums[high] - sums[low]) / (high - low)


def curve(x: Sequence[float], y: Sequence[float]) -> str | None:
    """One quantity over images, as SVG: the logged values pale, their running mean strong; None where there are fewer than two."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    a, b = thinned(x, y)
    if len(a) < 2:
        return None
    figure, axes = _axes()
    smooth = smoothed(b) if len(b) >= 12 else b
    axes.plot(a, b, color=COLOURS[0], linewidth=0.8, alpha=0.35)
    axes.plot(a, smooth, color=COLOURS[0], linewidth=1.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.3g}"))
    if (b > 1 / LARGEST).all() and b.max() > 30 * b.min():
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0 if a[0] >= 0 else a[0], a[-1])
    return _svg(figure)


def intervals(lines: Mapping[str, Mapping[float, Point]]) -> str | None:
    """Shares with their intervals over a number, such as guidance, one line per name; None where there is one number only."""
    if len({x for points in lines.values() for x in points}) < 2:
        return None
    figure, axes = _axes()
    for colour, (name, points) in zip(COLOURS * len(lines), lines.items(), strict=False):
        x = sorted(points)
        mean, low, high = np.array([points[value] for value in x], np.float64).T
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=colour, linewidth=1.6, marker="o", markersize=3, label=name)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower left")
    return _svg(figure)


def lines(named: Mapping[str, Sequence[tuple[float, float]]], log_y: bool = False) -> str | None:
    """Several quantities over one number, one line per name; None where none has two points."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = _axes()
    drawn = 0
    for colour, (name, points) in zip(COLOURS * len(named), named.items(), strict=False):
        a, b = thinned([x for x, _ in points], [y for _, y in points])
        drawn = max(drawn, len(a))
        axes.plot(a, b, color=colour, linewidth=1.6, marker="o", markersize=2.5, label=name)
    if drawn < 2:
        return None
    if log_y and all(1 / LARGEST < y <= LARGEST for points in named.values() for _, y in points):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.3g}"))
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return _svg(figure)


def tradeoff(named: Mapping[str, Sequence[Point]], x: str, y: str, form: str = "") -> str | bytes:
    """Curves of (x, y, label) points, one per name, each point with its number.

    Args:
        form: png or svg, a file of its own; empty: an <svg> for a page.
    """
    from io import BytesIO

    from matplotlib.ticker import ScalarFormatter

    figure, axes = _axes(5.6, 3.6)
    for colour, (name, points) in zip(COLOURS * len(named), named.items(), strict=False):
        axes.plot([p[0] for p in points], [p[1] for p in points], color=colour, linewidth=1.6, marker="o", markersize=3.5, label=name)
        for a, b, number in points:
            axes.annotate(f"{number:g}", (a, b), xytext=(4, 4), textcoords="offset points", fontsize=7, color=INK)
    axes.xaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.set_xlabel(x, color=INK, fontsize=8)
    axes.set_ylabel(y, color=INK, fontsize=8)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    if not form:
        return _svg(figure)
    target = BytesIO()
    figure.savefig(target, format=form, dpi=200, facecolor="white")
    return target.getvalue()


def _axes(width: float = 3.5, height: float = 2.0) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.15, 0.14, 0.8, 0.82))
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
        axes.spines[side].set_alpha(0.4)
    axes.tick_params(colors=INK, labelsize=8, length=2.5)
    axes.grid(color=INK, alpha=0.1, linewidth=0.6)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, axes


def _svg(figure: Any) -> str:
    """The drawing as one <svg> element that fills its place; its names may meet those of another drawing."""
    from matplotlib import rc_context

    target = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldm", "font.size": 8, "axes.formatter.useoffset": False}):
        unsaid = {"Date": None, "Creator": None, "Format": None, "Type": None}
        # As wide as its labels make it: numbers of five digits stand farther out than the axes' place allows.
        figure.savefig(target, format="svg", transparent=True, metadata=unsaid, bbox_inches="tight", pad_inches=0.08)
    text = target.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r'\1 width="100%"', text, count=1)
    text = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"|(?<=<g) id="[^"]*"', "", text)
    text = re.sub(r'font-family: [^;"]*;?', "", text).replace("xlink:href", "href").replace(INK, "currentColor")
    # A tenth of a point is finer than any screen; the labels keep their digits.
    text = re.sub(r' (d|x|y)="[^"]*"', lambda found: re.sub(r"(\d\.\d)\d+", r"\1", found[0]), text)
    return re.sub(r"\s+", " ", text).strip()
