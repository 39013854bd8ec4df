"""Sample filter by metadata (size, aesthetic and watermark scores), before any picture is decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, NonNegative, config, plain
from ldm.data.dataset import DataSet, HasViews, asked, expect, loaded
from ldm.data.fields import Fields
from ldm.data.images import Shape
from ldm.data.views import ViewKind
from ldm.diffusion.batch import ImageBatch


@config
class Filter:
    """Filter of samples by metadata; one whose value is unknown is left out."""

    min_side: Count = 0  # px, the original's shorter side is at least so long; 0: any
    min_aesthetic: NonNegative = 0.0  # its aesthetic score (0 to 10) is above this; 0: any
    max_watermark: Fraction = 1.0  # its probability of bearing a watermark is below this; 1: any

    def wants(self) -> dict[str, str]:
        """The fields that ask for something, each with what it reads."""
        asked = {
            "min_side": (self.min_side > 0, "original sizes (columns width and height)"),
            "min_aesthetic": (self.min_aesthetic > 0, "aesthetic scores (column aesthetic)"),
            "max_watermark": (self.max_watermark < 1, "watermark probabilities (column pwatermark)"),
        }
        return {name: reads for name, (on, reads) in asked.items() if on}


@runtime_checkable
class HasFields(Protocol):
    """Data set with metadata of its samples."""

    def fields(self) -> Fields:
        """Original sizes and scores of all samples."""
        ...


def filter_samples(data: DataSet, chosen: Filter, where: str) -> DataSet:
    """Filter a data set: the samples that pass, numbered anew; the data itself where nothing is asked.

    Args:
        where: the filter's field, such as stages.diffusion.filter, for messages.

    Raises:
        UserError: if the data does not know what is asked of it, or no sample passes.
    """
    wants = chosen.wants()
    if not wants:
        return data
    fields = data.fields() if isinstance(data, HasFields) else None
    kept = np.ones(len(data), bool)
    left: dict[str, int] = {}
    for name, reads in wants.items():
        known, passes = _judge(fields, chosen, name) if fields is not None else (np.zeros(0, bool), np.zeros(0, bool))
        if not known.any():
            kind = data.describe().get("kind", "data")
            raise UserError(f"{where}.{name}: this data ({kind}) tells no {reads}; add them to its table, or leave {name} out")
        kept &= passes
        left[name] = int(passes.sum())
    if not kept.any():
        said = ", ".join(f"{name} alone keeps {count:,}" for name, count in left.items())
        raise UserError(f"{where}: none of {plural(len(data), 'sample')} passes ({said}); ask for less")
    return FilteredSamples(data, np.flatnonzero(kept), chosen)


def _judge(fields: Fields, chosen: Filter, name: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of how many samples a field's subject is known, and which of them pass; each (N,)."""
    if name == "min_side":
        side = np.minimum(fields.height, fields.width)
        return side > 0, side >= chosen.min_side
    score = fields.aesthetic if name == "min_aesthetic" else fields.watermark
    known = ~np.isnan(score) if name == "min_aesthetic" else (score >= 0) & (score <= 1)  # -1 stands for unknown: it is no probability
    with np.errstate(invalid="ignore"):
        passes = score > chosen.min_aesthetic if name == "min_aesthetic" else score < chosen.max_watermark
    return known, known & passes


class FilteredSamples:
    """Filtered view (subset) of a data set, in its order."""

    def __init__(self, data: DataSet, kept: NDArray[np.int64], chosen: Filter) -> None:
        self.data, self.kept, self.chosen = data, kept, chosen

    @property
    def mirrors(self) -> bool:
        """As the data's."""
        return self.data.mirrors

    def __len__(self) -> int:
        return len(self.kept)

    def _rows(self, index: Sequence[int]) -> list[int]:
        return [int(row) for row in self.kept[np.asarray(index, np.int64)]]

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Samples.load`."""
        return self.data.load(self._rows(index), position, resolution, seed, flip)

    def load_bytes(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Decoded.load_bytes`, where the data is such."""
        return loaded(self.data, self._rows(index), position, resolution, seed, flip)

    def ahead(self, index: Sequence[int]) -> None:
        """As `ldm.data.dataset.ReadsAhead.ahead`, where the data does."""
        expect(self.data, self._rows(index))

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return self.data.captions(self._rows(index), position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return self.data.all_captions(self._rows(index))

    def origin(self, index: int) -> str:
        """As the data's."""
        return self.data.origin(int(self.kept[index]))

    def views(self) -> Mapping[str, ViewKind]:
        """As the data's."""
        return self.data.views() if isinstance(self.data, HasViews) else {}

    def with_views(self, names: tuple[str, ...]) -> FilteredSamples:
        """Of the samples that passed."""
        return FilteredSamples(asked(self.data, names), self.kept, self.chosen)

    def fields(self) -> Fields:
        """Of the samples that passed."""
        assert isinstance(self.data, HasFields)
        return self.data.fields()[self.kept]

    def sizes(self) -> NDArray[np.int32] | None:
        """Of the samples that passed; None where the data does not know them."""
        from ldm.data.buckets import sizes_of

        found = sizes_of(self.data)
        return None if found is None else found[self.kept]

    def describe(self) -> dict[str, object]:
        """The data's own, with what was asked and how many passed."""
        return {**self.data.describe(), "filter": plain(self.chosen), "images": len(self), "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Of the data and of which samples passed."""
        digest = hashlib.sha256(json.dumps(["sifted", 1, self.data.fingerprint()]).encode())
        digest.update(np.ascontiguousarray(self.kept, "<i8").tobytes())
        return digest.hexdigest()
