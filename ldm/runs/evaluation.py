"""Measurements of a model, by the evaluate stage and the evaluate verb."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.metrics.bench import Team


def measure(
    model: Any,
    metrics: Sequence[Any],
    *,
    data: Any,
    resolution: int,
    seed: int,
    pictures: Path | None,
    progress: Callable[[int, int, str], None],
    train: Any = None,
    asked: Any = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """The results of measurements by their kind; a kind that stands there twice gets a number behind it.

    Args:
        model: a family that draws and reconstructs, or a codec that only reconstructs.
        metrics: members of `ldm.metrics.evaluator.Evaluator`.
        data: validation images, or None.
        resolution: px, of reconstructions.
        pictures: folder for example pictures, or None.
        progress: called as progress(done, in all, what).
        train: what the model learned from, or None.
        asked: a `Wanted`, how pictures are drawn where a metric does not say it; None: as the model says.
        team: the processes that call this alike, and share the drawing; None: this one is alone.
    """
    from ldm.metrics.bench import Bench
    from ldm.metrics.evaluator import check_weights

    check_weights(metrics)

    bench = Bench(model, data, resolution, seed, next(model.parameters()).device, pictures, progress, train)
    bench = replace(bench, team=team)
    if asked is not None:
        bench = replace(bench, asked=asked)
    found: dict[str, Any] = {}
    for metric in metrics:
        name, number = metric.kind, 2
        while name in found:
            name, number = f"{metric.kind}_{number}", number + 1
        found[name] = metric.run(bench)
    return found
