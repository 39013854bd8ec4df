"""Prompt adherence of images by the scenes' exact checker: attribute binding (`bind`), `strict` and every attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.captions import Target
from ldm.data.scenes.checker import Reading, read
from ldm.data.scenes.geometry import relation_of

ATTRIBUTES = ("colour", "shape", "size", "cell", "fill")
WEIGHTS = np.array([0.9999, 1.01, 0.999, 1.0, 1.0])  # of agreeing facts in the match: one each, but for ties
METRICS = (*ATTRIBUTES, "bind", "rel", "count", "strict", "tone", "texture", "bg")
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Interval:
    """Mean over images with its bootstrap confidence interval."""

    mean: float
    low: float
    high: float
    n: int  # images that state the fact

    def to_dict(self) -> dict[str, float | int]:
        """As it stands in metrics.json."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def score(images: NDArray, targets: Sequence[Target]) -> Scores:
    """Grade images (N,H,W,3), uint8 or floating point in [0,1], against what their captions state.

    Stated and detected objects are matched one to one for the most agreeing facts; shares are taken of max(stated, detected), so that
    surplus objects cost. An image whose colour the detected objects do not explain earns 0 everywhere.

    Returns:
        (N,) in [0,1] by name, NaN where the caption does not state the fact. `colour`, `shape`, `size`, `cell`, `fill`: share of objects
        that are right; `bind`: colour and shape right on the same object; `rel`: the relation holds between two bound objects; `count`:
        as many objects as stated; `strict` (0 or 1): count, every bind and all stated sizes, cells and relations; `tone`, `texture` and
        `bg` (both) of the background, which `strict` leaves apart.

    Raises:
        ValueError: if there are not as many targets as images, or the images cannot be read.
    """
    if len(images) != len(targets):
        raise ValueError(f"{len(images)} images but {len(targets)} targets")
    return grade(read(images), targets)


def grade(reading: Reading, targets: Sequence[Target]) -> Scores:
    """The scores of images that have been read."""
    facts = np.stack([getattr(reading, name) for name in ATTRIBUTES], 1)
    rows = []
    for i, target in enumerate(targets):
        at = reading.objects(i)
        rows.append(
            _grade(target, facts[at], reading.x[at], reading.y[at], bool(reading.valid[i]), (int(reading.tone[i]), int(reading.texture[i])))
        )
    table = np.array(rows, np.float64).reshape(len(targets), len(METRICS))
    return {name: table[:, k] for k, name in enumerate(METRICS)}


def _grade(target: Target, found: NDArray, x: NDArray, y: NDArray, valid: bool, ground: tuple[int, int]) -> list[float]:
    """One image's scores in the order of METRICS."""
    wanted = np.array([[getattr(phrase, name) for name in ATTRIBUTES] for phrase in target.objects])
    stated = wanted >= 0
    many, surplus = len(wanted), max(0, len(found) - len(wanted))
    agree = (wanted[:, None] == found[None]) & stated[:, None]  # (T,D,5)
    right = np.zeros((many, len(ATTRIBUTES)), bool)
    partner = np.full(many, -1)
    if valid and len(found):
        mine, theirs = matched(agree)
        right[mine] = agree[mine, theirs]
        partner[mine] = theirs
    shares = [_share(right[:, k].sum(), stated[:, k].sum(), surplus) for k in range(len(ATTRIBUTES))]
    bound = right[:, 0] & right[:, 1]
    bind = _share(bound.sum(), (stated[:, 0] & stated[:, 1]).sum(), surplus)
    relation = np.nan
    if target.relation >= 0:
        a, b = partner[0], partner[target.phrases[0].count]
        ends = bound[0] and bound[target.phrases[0].count]
        relation = float(ends and relation_of(x[b] - x[a], y[b] - y[a]) == target.relation)
    count = float(valid and len(found) == many)
    strict = float(count and (right | ~stated)[:, :4].all() and relation != 0)
    tone, texture = (
        np.nan if want < 0 else float(valid and got == want) for want, got in ((target.tone, ground[0]), (target.texture, ground[1]))
    )
    both = [value for value in (tone, texture) if value == value]
    return [*shares, bind, relation, count, strict, tone, texture, min(both) if both else np.nan]


def matched(agree: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The one-to-one match with most agreeing facts; ties go to agreeing shapes, then cells, colours and sizes."""
    if agree.shape[:2] == (1, 1):
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(agree @ WEIGHTS, maximize=True)


def _share(right: int, stated: int, surplus: int) -> float:
    return float(right) / (stated + surplus) if stated else float("nan")


def summary(scores: Mapping[str, NDArray[np.float64]], seed: int = 0, resamples: int = 1000) -> dict[str, Interval]:
    """Means over images with 95 % bootstrap intervals (percentiles of resampled means); facts that no caption states are left out.

    Args:
        scores: as `score` returns them.
        seed: of the resampling.
        resamples: how many.
    """
    first = next(iter(scores.values()))
    n = len(first)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(n, np.full(n, 1 / n), resamples).astype(np.float64) if n else np.zeros((resamples, 0))
    out = {}
    for name, values in scores.items():
        known = ~np.isnan(values)
        if not known.any():
            continue
        mass = draws @ known
        means = (draws @ np.where(known, values, 0))[mass > 0] / mass[mass > 0]
        low, high = np.percentile(means, (2.5, 97.5))
        out[name] = Interval(float(values[known].mean()), float(low), float(high), int(known.sum()))
    return out
