"""Prompt adherence of images by the scenes' exact checker: attribute binding (`bind`), `strict` and every attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.scenes.captions import Target
from ldm.data.scenes.checker import Reading, read
from ldm.data.scenes.geometry import relation_of
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import TierName, pairs_of
from ldm.metrics import shapes
from ldm.metrics.bench import Bench, Values, floats

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


@config
class Adherence:
    """Whether pictures show what their prompts state, read by the scenes' exact checker."""

    kind: Literal["adherence"] = "adherence"
    tier: TierName  # whose prompts
    prompts: Positive = 100  # with colour-shape pairs seen in training, and as many with held-out pairs
    guidance: tuple[NonNegative, ...] = ()  # guidance scales that are compared; none: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    size: Count = 0  # px; 0: the model's own
    seed: Count = 0  # of prompts and pictures
    pairs: tuple[str, ...] = ()  # as many prompts more with these colour-shape pairs alone, as in [cyan cross, blue ring]: chosen.bind

    asks = "sample"  # of the model
    of_prompts = True  # and it is to read them, or views of what they say

    def __post_init__(self) -> None:
        try:
            pairs_of(self.pairs)
        except ValueError as error:
            raise UserError(f"pairs: {error}") from None

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        groups = ("seen", "held_out", *(("chosen",) if self.pairs else ()))
        outlines = tuple(f"shapes.{pairs}.{name}" for pairs in (*groups, "ideal") for name in ("iou", "iou_worst"))
        return (*(f"{pairs}.{name}" for pairs in groups for name in METRICS), *outlines)

    def run(self, bench: Bench) -> Values:
        """Means by attribute and the quality of shapes at the first guidance scale, all with intervals, and the checker's own score."""
        groups = {pairs: prompts(self.tier, self.prompts, self.seed, pairs) for pairs in ("seen", "held-out")}
        if self.pairs:
            groups["chosen"] = prompts(self.tier, self.prompts, self.seed, "seen", self.pairs)
        own = replace(bench.asked, steps=self.steps or None, sampler=self.sampler or None)
        scales = self.guidance or (bench.model.settings().guidance,)
        size = (self.size, self.size) if self.size else None
        intervals: Values = {}
        outlines: Values = {}
        total, done = len(groups) * self.prompts * len(scales), 0
        for scale in scales:
            per_pairs: Values = {}
            for pairs, asked in groups.items():
                seeds = [self.seed * 1_000_003 + i for i in range(len(asked))]

                def on_step(step: int, steps: int, base: int = done, many: int = len(asked), scale: float = scale) -> None:
                    bench.progress(base + many * step // steps, total, f"guidance {scale:g}")

                images = bench.sample(asked.text, seeds, replace(own, guidance=scale), size=size, on_step=on_step)
                done += len(asked)
                reading = read(images.numpy())
                scores = grade(reading, asked.targets)
                per_pairs[pairs] = {name: value.to_dict() for name, value in summary(scores).items()}
                if scale == scales[0]:
                    outlines[pairs.replace("-", "_")] = shapes.summary(shapes.overlaps(images.numpy(), reading))
                    shown = f"adherence-{pairs}-{images.shape[1]}"  # another size's pictures may stand beside them
                    bench.show(shown, floats(images[:32]), 8, asked.text[:32])
            intervals[f"{scale:g}"] = per_pairs
        first = intervals[f"{scales[0]:g}"]
        means = {pairs.replace("-", "_"): {k: round(v["mean"], 4) for k, v in found.items()} for pairs, found in first.items()}
        used = bench.model.settings(replace(own, guidance=scales[0]))
        protocol = {
            "tier": self.tier,
            "prompts": self.prompts,
            "guidance": list(scales),
            "steps": used.steps,
            "sampler": used.sampler,
            "spacing": used.spacing,
            "seed": self.seed,
            "size": self.size or bench.model.defaults["size"][0],
            **bench.besides(),
            "intervals": "95 % bootstrap over prompts, 1000 resamples",
        }
        best, outlines["ideal"] = self._checker(groups, protocol["size"])
        return {**means, "intervals": intervals, "shapes": outlines, "checker": best, "protocol": protocol}

    def _checker(self, groups: Any, size: int) -> tuple[Values, Values]:
        """The checker's score and the shapes of perfect answers, drawn at the size that is measured: nothing can score more."""
        found, overlaps = {}, []
        for pairs, asked in groups.items():
            images = to_bytes(render(asked.specs, size))
            reading = read(images)
            found[pairs.replace("-", "_")] = round(float(grade(reading, asked.targets)["bind"].mean()), 4)
            overlaps.append(shapes.overlaps(images, reading))
        return found, dict(shapes.summary(np.concatenate(overlaps)))
