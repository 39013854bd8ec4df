"""Concatenation and mixture of data sets: each part repeated, or two in fixed shares (DreamBooth's prior preservation)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, Positive, config
from ldm.data.buckets import sizes_of
from ldm.data.content import HasMarks, mark
from ldm.data.dataset import DataSet, HasViews, Split, asked, expect, loaded
from ldm.data.fields import Fields, Known, gather
from ldm.data.filter import HasFields
from ldm.data.folder import FolderSource
from ldm.data.hugging_face import DatasetsSource
from ldm.data.images import Shape
from ldm.data.photos import left_out
from ldm.data.shards import ShardsSource
from ldm.data.views import ViewKind
from ldm.diffusion.batch import ImageBatch, cat, taken

R = TypeVar("R")


class Concatenation:
    """Concatenated data sets, one part after the other, each repeated until it has so many samples.

    Args:
        parts: at least one.
        counts: samples of each part.
    """

    def __init__(self, parts: Sequence[DataSet], counts: Sequence[int]) -> None:
        self.parts, self.counts = tuple(parts), tuple(counts)
        self._ends = np.cumsum(counts)

    @property
    def mirrors(self) -> bool:
        """Whether captions of all parts stay true when a picture is mirrored."""
        return all(part.mirrors for part in self.parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _numbers(self, part: int) -> NDArray[np.int64]:
        """Which of its own samples a part's are."""
        return np.arange(self.counts[part]) % len(self.parts[part])

    def _grouped(self, index: Sequence[int]) -> Iterator[tuple[DataSet, list[int], list[int]]]:
        """By part: the data, the rows of `index` that are its, and their numbers there."""
        wanted = np.asarray(index, np.int64)
        owner = np.searchsorted(self._ends, wanted, side="right")
        for part in np.unique(owner).tolist():
            rows = np.flatnonzero(owner == part)
            numbers = (wanted[rows] - (self._ends[part] - self.counts[part])) % len(self.parts[part])
            yield self.parts[part], rows.tolist(), numbers.tolist()

    def _each(self, index: Sequence[int], ask: Callable[[DataSet, list[int], list[int]], Sequence[R]]) -> list[R]:
        """What each part says of its rows, in the order of `index`."""
        found: dict[int, R] = {}
        for data, rows, numbers in self._grouped(index):
            found |= zip(rows, ask(data, rows, numbers), strict=True)
        return [found[row] for row in range(len(found))]

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Samples.load`."""
        return self.load_bytes(index, position, resolution, seed, flip).to("cpu")

    def load_bytes(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Decoded.load_bytes`, where all parts have bytes; else numbers."""
        found, order = [], []
        for data, rows, numbers in self._grouped(index):
            found.append(loaded(data, numbers, [position[row] for row in rows], resolution, seed, flip and self.mirrors))
            order += rows
        if any(batch.image.dtype != torch.uint8 for batch in found):
            found = [batch.to("cpu") for batch in found]
        if any(batch.mask is not None for batch in found):  # a part without masks counts whole
            found = [batch if batch.mask is not None else replace(batch, mask=_all_of(batch.image)) for batch in found]
        return taken(cat(found), np.argsort(order).tolist())

    def ahead(self, index: Sequence[int]) -> None:
        """As `ldm.data.dataset.ReadsAhead.ahead`, of the parts that do."""
        for data, _, numbers in self._grouped(index):
            expect(data, numbers)

    def views(self) -> Mapping[str, ViewKind]:
        """What all parts offer alike."""
        every = [part.views() if isinstance(part, HasViews) else {} for part in self.parts]
        return {name: kind for name, kind in every[0].items() if all(other.get(name) == kind for other in every)}

    def with_views(self, names: tuple[str, ...]) -> Self:
        """As `ldm.data.dataset.HasViews.with_views`, of every part."""
        found = copy.copy(self)
        found.parts = tuple(asked(part, names) for part in self.parts)
        return found

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return self._each(index, lambda data, rows, numbers: data.captions(numbers, [position[row] for row in rows], seed))

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return self._each(index, lambda data, rows, numbers: data.all_captions(numbers))

    def origin(self, index: int) -> str:
        """As the part's."""
        return self._each([index], lambda data, rows, numbers: [data.origin(numbers[0])])[0]

    def sizes(self) -> NDArray[np.int32] | None:
        """Of all samples, where every part knows them."""
        known = [sizes_of(part) for part in self.parts]
        found = [sizes[self._numbers(part)] for part, sizes in enumerate(known) if sizes is not None]
        return np.concatenate(found) if len(found) == len(self.parts) else None

    def fields(self) -> Fields:
        """Of all samples; unknown where a part does not know them."""
        known = [part.fields() if isinstance(part, HasFields) else gather([Known()] * len(part)) for part in self.parts]
        found = [fields[self._numbers(part)] for part, fields in enumerate(known)]
        names = ("height", "width", "aesthetic", "watermark")
        return Fields(*(np.concatenate([getattr(fields, name) for fields in found]) for name in names))

    def marks(self) -> NDArray[np.uint64] | None:
        """As `ldm.data.content.HasMarks.marks`, of all parts; None where one has none."""
        known = [part.marks() if isinstance(part, HasMarks) else None for part in self.parts]
        found = [marks ^ np.array([mark(str(n)), 0], np.uint64) for n, marks in enumerate(known) if marks is not None]
        return np.concatenate(found) if len(found) == len(self.parts) else None

    def describe(self) -> dict[str, object]:
        """Counts and rejections of all parts, what each says of itself, and the fingerprint."""
        said = [part.describe() for part in self.parts]
        return {"kind": "several", "images": len(self), **left_out(said), "parts": said, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Of the parts and how often they come."""
        said = ["joined", 1, *(part.fingerprint() for part in self.parts), *self.counts]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _all_of(image: torch.Tensor) -> torch.Tensor:
    """A mask of images in which everything counts."""
    return torch.full((len(image), 1, *image.shape[2:]), 255 if image.dtype == torch.uint8 else 1.0, dtype=image.dtype)


@config
class RepeatedSource:
    """A source with its number of repeats."""

    source: Annotated[FolderSource | ShardsSource | DatasetsSource, BY_KIND]  # where its images and captions come from
    repeats: Positive = 1  # how often each of its training samples comes in an epoch


@config
class ConcatenationSource:
    """Concatenated sources: the parts' samples in one order, each as often in an epoch as its part repeats."""

    kind: Literal["several"] = "several"
    parts: tuple[RepeatedSource, ...]  # such as [{source: {kind: folder, path: a}, repeats: 10}, {source: {kind: shards, path: b}}]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("parts: none; give at least one source")

    def build(self, split: Split) -> Concatenation:
        """The training or the held-out parts.

        Raises:
            UserError: as the first source that cannot be built.
        """
        parts = [part.source.build(split) for part in self.parts]
        return Concatenation(
            parts, [len(data) * (part.repeats if split == "train" else 1) for data, part in zip(parts, self.parts, strict=True)]
        )


class Mixture(Concatenation):
    """Mixture of `first` and `second`, the latter `share` of all; each once in an epoch at least, the fewer ones as often as that takes.

    Args:
        share: of the second, between 0 and 1.
    """

    def __init__(self, first: DataSet, second: DataSet, share: float) -> None:
        total = max(math.ceil(len(first) / (1 - share)), math.ceil(len(second) / share))
        others = max(1, round(total * share))  # samples of the second
        super().__init__((first, second), (total - others, others))
        self.share = share

    def describe(self) -> dict[str, object]:
        """The first's own, and how many there are of the second."""
        return {
            **self.parts[0].describe(),
            "of_its_kind": len(self.parts[1]),
            "share_of_its_kind": self.share,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Of both parts and the share."""
        said = ["mixed", 1, *(part.fingerprint() for part in self.parts), self.share]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()
