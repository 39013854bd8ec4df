"""Aspect-ratio bucketing: shapes of nearly equal area, and which of them each picture fits best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ldm.config.schema import Count, PositiveFloat, config
from ldm.data.order import BucketedBatches


@config
class Buckets:
    """Aspect-ratio buckets: pictures in shapes near their own in place of squares, a batch in one shape."""

    step: Count = 0  # px, sides are multiples of it; 0: 64 from 256 px on, 8 below
    max_aspect: PositiveFloat = 2.0  # of the longer side to the shorter one

    def shapes(self, resolution: int) -> list[tuple[int, int]]:
        """As `shapes` below, of about resolution² pixels."""
        return shapes(resolution, self.step or usual_step(resolution), self.max_aspect)


@runtime_checkable
class HasSizes(Protocol):
    """A data set that knows the sizes of its pictures before it decodes them."""

    def sizes(self) -> NDArray[np.int32] | None:
        """Height and width (N,2) px; None where they are not known."""
        ...


@runtime_checkable
class HasBuckets(Protocol):
    """A data set whose samples have their shapes already."""

    def buckets(self) -> tuple[Sequence[tuple[int, int]], NDArray[np.int64]] | None:
        """Height and width of the shapes, px, and the number (N,) of each sample's; None: all are squares."""
        ...


def sizes_of(data: object) -> NDArray[np.int32] | None:
    """Height and width (N,2) px of all samples; None where all have one size, or the data does not know them."""
    return data.sizes() if isinstance(data, HasSizes) else None


def usual_step(resolution: int) -> int:
    """What sides are multiples of, px."""
    return 64 if resolution >= 256 else 8


def shapes(resolution: int, step: int = 64, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) px in multiples of `step`, of at most resolution² pixels and as many as fit, widest last.

    As NovelAI's aspect-ratio bucketing (2022): for every side the longest other side that keeps the area.
    """
    found: set[tuple[int, int]] = set()
    for side in range(step, int(resolution * max_aspect**0.5) + step, step):
        other = resolution * resolution // side // step * step
        if other >= step and max(side, other) <= max_aspect * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found or {(resolution, resolution)}, key=lambda s: s[1] / s[0])


def assign(sizes: NDArray[np.int32], choices: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Which shape's aspect ratio is nearest, by its logarithm, to each of the sizes (N,2) height, width."""
    aspect = np.log(sizes[:, 1] / sizes[:, 0])
    offered = np.log([width / height for height, width in choices])
    by_aspect = np.argsort(offered, kind="stable")
    ordered = offered[by_aspect]
    return by_aspect[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, aspect)]  # a table of all distances would not fit for 1e8 pictures


def cut_away(sizes: NDArray[np.int32], choices: Sequence[tuple[int, int]], chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of each picture (N,) that lies outside its bucket after the resize that covers it."""
    aspect = sizes[:, 1] / sizes[:, 0]
    offered = np.array([width / height for height, width in choices])[chosen]
    return np.asarray(1 - np.minimum(aspect / offered, offered / aspect))


def table(sizes: NDArray[np.int32], choices: Sequence[tuple[int, int]], chosen: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Of each bucket that has pictures: width, height, images, the mean share that is cut away, how many are enlarged."""
    lost = cut_away(sizes, choices, chosen)
    rows = []
    for number, (height, width) in enumerate(choices):
        here = chosen == number
        if here.any():
            enlarged = int(((sizes[here, 0] < height) | (sizes[here, 1] < width)).sum())
            cut = round(float(lost[here].mean()), 4)
            rows.append({"width": width, "height": height, "images": int(here.sum()), "cut": cut, "enlarged": enlarged})
    return rows


@dataclass(frozen=True)
class BucketedStage:
    """A training stage's pictures by bucket: order of batches and counts."""

    order: BucketedBatches
    rows: list[dict[str, Any]]  # as `table` gives, and of each bucket its updates and the pictures that these never reach

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Height and width of the buckets in use, the largest first."""
        return sorted(((row["height"], row["width"]) for row in self.rows), key=lambda s: -s[0] * s[1])

    @property
    def missed(self) -> int:
        """Pictures whose turn does not come in this stage."""
        return sum(int(row["missed"]) for row in self.rows)


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of `BucketedStage` for a terminal."""
    return [
        f"{row['width']:>5} x {row['height']:<5} {row['images']:>9,} pictures, {row['cut']:.1%} cut away, {row['updates']:,} updates"
        + (f", {row['missed']:,} never reached" if row["missed"] else "")
        for row in rows
    ]


def bucket_stage(data: object, chosen: Buckets, *, resolution: int, seed: int, batch: int, steps: int) -> BucketedStage | None:
    """Assign a data set to buckets for a stage of so many updates; None where its samples have no sizes of their own.

    Cached latents keep the shapes that they were encoded in, so the order is that of their pictures.
    """
    sizes = sizes_of(data)
    if sizes is None:
        return None
    choices = chosen.shapes(resolution)
    kept = data.buckets() if isinstance(data, HasBuckets) else None
    bucket = assign(sizes, choices) if kept is None else _renumbered(*kept, choices)
    order = BucketedBatches(seed, bucket, choices, batch)
    rows = table(sizes, choices, bucket)
    for row, updates in zip(rows, order.batches(steps).tolist(), strict=True):
        row |= {"updates": updates, "missed": max(0, row["images"] - updates * batch)}
    return BucketedStage(order, rows)


def _renumbered(shapes: Sequence[tuple[int, int]], bucket: NDArray[np.int64], choices: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Numbers of shapes as numbers of equal choices."""
    return np.array([choices.index(shape) for shape in shapes], np.int64)[bucket]


def wrong_step(chosen: Buckets, resolution: int, factor: int, where: str) -> Iterator[str]:
    """What is wrong with the settings `where` for an autoencoder that needs multiples of `factor` px."""
    step = chosen.step or usual_step(resolution)
    if step % factor:
        yield f"{where}.step: got {step}; the autoencoder needs a multiple of {factor}"
    if step > resolution:
        yield f"{where}.step: got {step}; it cannot be more than resolution ({resolution})"
    if chosen.max_aspect < 1:
        yield f"{where}.max_aspect: got {chosen.max_aspect:g}; the longer side is at least as long as the shorter one (1)"
