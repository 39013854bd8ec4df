"""WebDataset tar shards with random access through an index, never unpacked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, PathGiven, Positive, PositiveFloat, config
from ldm.data.dataset import Split
from ldm.data.fields import Fields
from ldm.data.images import MAX_PIXELS, Rejected
from ldm.data.kept import Kept
from ldm.data.photos import LISTED, Photos, counted, refuse_bad, remarks, tolerated
from ldm.data.read_ahead import Place, ReadAhead
from ldm.data.shard_index import Index, open_index
from ldm.data.shard_reader import FLOATS, place_in_split, sample_hash
from ldm.data.storage import Ranges
from ldm.data.tags import affixed

_ROWS = 2**22  # that are looked at at a time


@config
class ShardsSource:
    """WebDataset tar shards of pictures (.jpg, .png, .webp, ...) with .txt or .json of the same name, read in place."""

    kind: Literal["shards"] = "shards"
    path: PathGiven  # a folder of shards, one shard, a pattern such as {00000..00099}.tar, or any URL that fsspec opens
    index: PathGiven | None = None  # the index file; null: ldm-index.bin beside the shards, or in the cache
    prefix: str = ""  # before every caption, such as "sks style,"
    suffix: str = ""  # behind every caption
    val_share: Fraction = 0.02  # share held out by a hash of shard and key, at least one of several; 0: none
    min_side: Count = 32  # px; images with a shorter side are left out
    max_pixels: Positive = MAX_PIXELS  # images with more are left out; guards the memory
    crop: Literal["random", "centre"] = "random"  # where the training square lies; held-out images use the centre
    masks: Literal["none", "alpha"] = "none"  # how much each pixel counts, for masked_loss; alpha: by the picture's opacity
    max_bad: Fraction = 0.1  # share of unusable samples above which the run stops; ten are always tolerated
    max_seconds: PositiveFloat = 20.0  # for reading and decoding one image; a slower one is replaced by the next
    outside: bool = False  # also follow links that lead out of the folder of shards

    def build(self, split: Split) -> ShardsData:
        """The training or the held-out part; shards that are not indexed yet are read once.

        Raises:
            UserError: if shards are missing, changed or unreadable, none has a usable sample, or too many are bad.
        """
        return ShardsData(self, split)


class _Hashes(Sequence[str]):
    """The index's hashes of a part as texts, one at a time."""

    def __init__(self, index: Index, kept: Kept) -> None:
        self._index, self._kept = index, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return str(self._index.entry(int(self._kept.rows(index))).hash)


def parts(index: Index, source: ShardsSource) -> tuple[Kept, Kept, Counter[str]]:
    """The training and the held-out part of an index, and how many samples are in neither, by reason.

    The rule is `ldm.data.photos.held_out`'s. The index has the upper half of each name's hash, which decides all but one in a thousand
    million; of the others, and where it holds out none or all, names are read.
    """
    lacking: Counter[str] = Counter()
    unusable, out = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    bound = source.val_share * 2**32
    place, height, width = (index.column(name) for name in ("split", "height", "width"))
    for first in range(0, len(index), _ROWS):
        rows = slice(first, first + _ROWS)
        high, wide = height[rows], width[rows]
        small = np.minimum(high, wide) < source.min_side
        large = (high.astype(np.int64) * wide > source.max_pixels) & ~small
        lacking += Counter({"too small": int(small.sum()), "too many pixels": int(large.sum())})
        usable = ~(small | large)
        unusable.append(first + np.flatnonzero(~usable))
        below = (place[rows] < bound - 1) & usable
        near = np.flatnonzero((place[rows] >= bound - 1) & (place[rows] <= bound) & usable)
        below[near] = _places(index, (first + near).tolist()) < source.val_share
        out.append(first + np.flatnonzero(below))
    bad, chosen = np.concatenate(unusable), np.concatenate(out)
    total = len(index) - len(bad)
    if total and len(chosen) == total:
        chosen = chosen[chosen != _extreme(index, place, Kept(len(index), bad, out=True), np.max)]
    elif source.val_share and total > 1 and not len(chosen):
        chosen = np.array([_extreme(index, place, Kept(len(index), bad, out=True), np.min)], np.int64)
    train = Kept(len(index), np.sort(np.concatenate([bad, chosen])), out=True)
    return train, Kept(len(index), chosen), lacking


def _places(index: Index, rows: Sequence[int]) -> np.ndarray:
    """Where names lie between 0 and 1."""
    stems = [Path(index.shards[int(index.shard_of(row))].name).stem for row in rows]
    return np.array([place_in_split(stem, index.entry(row).key) / 2**64 for stem, row in zip(stems, rows, strict=True)], np.float64)


def _extreme(index: Index, place: np.ndarray, usable: Kept, which: Any) -> int:
    """The row of the first or the last name of all."""
    rows = usable.rows()
    rows = rows[place[rows] == which(place[rows])]
    exact = _places(index, rows.tolist())
    return int(rows[np.flatnonzero(exact == which(exact))[0]])


def _fetched(ranges: Ranges, index: Index, shard: int, offset: int, count: int) -> bytes:
    return ranges.read(index.path(shard), offset, count)


class ShardsData(Photos):
    """A split of a set of tar shards, in their order; every image is compared with the index's hash when it is read."""

    patient = True

    def __init__(self, source: ShardsSource, split: Split) -> None:
        self.source = source
        self.index: Index = open_index(source.path, file=Path(source.index) if source.index else None, outside=source.outside)
        shards = self.index.shards
        train, val, lacking = parts(self.index, source)
        self.rejected: Counter[str] = sum((Counter(s.rejected) for s in shards), Counter()) + lacking
        self.total = len(train) + len(val)
        super().__init__(source.path, source, split, tolerated(source.max_bad, self.total + self.rejected.total()))
        self._refuse_empty()
        self._kept = train if split == "train" else val
        self._ranges = Ranges()
        self._ahead = ReadAhead(partial(_fetched, self._ranges, self.index))
        self._contents = _Hashes(self.index, self._kept)
        view_options = (split, source.val_share, source.crop, source.min_side, source.max_pixels)
        more = [source.prefix, source.suffix, source.masks]
        digest = hashlib.sha256(json.dumps(["shards", 1, *view_options, *(more if more != ["", "", "none"] else [])]).encode())
        for record in shards:
            digest.update(json.dumps([record.name, record.sha256, record.samples]).encode())
        self._fingerprint = digest.hexdigest()

    def _refuse_empty(self) -> None:
        shards = self.index.shards
        listed = [f"{k or s.name} in {s.name}: {r}" + (f": {d}" if d else "") for s in shards for k, r, d in s.examples]
        first = f"the first is {listed[0]}" if listed else ""
        if not self.total:
            damage = [f"{s.name} is damaged {s.damage[0]}" for s in shards if s.damage]
            said = "; ".join([*damage[:1], *([first] if first else [])]) or "they hold no image"
            raise UserError(
                f"{self.where}: {plural(self.total, 'usable sample')} in {plural(len(shards), 'shard')} ({counted(self.rejected)}); {said}"
            )
        refuse_bad(self.where, self.total, self.rejected, first, self.source.max_bad)

    def __len__(self) -> int:
        return len(self._kept)

    def _row(self, index: int) -> int:
        return int(self._kept.rows(index))

    def name(self, index: int) -> str:
        """Shard and key."""
        return self.index.name(self._row(index))

    def _place(self, row: int) -> tuple[Place, int]:
        """Where a row's bytes lie, and their hash."""
        entry = self.index.entry(row)
        return Place(row, int(self.index.shard_of(row)), entry.offset, entry.size), entry.hash

    def ahead(self, index: Sequence[int]) -> None:
        """As `ldm.data.dataset.ReadsAhead.ahead`: those that lie near each other in a shard are one request."""
        self._ahead.expect([self._place(row)[0] for row in self._kept.rows(index).tolist()])

    def read(self, index: int) -> bytes:
        """As `Photos.read`. A shard that was there when the run began is never given up by one process for itself.

        Raises:
            UserError: if its shard cannot be read any more, after as many tries as `ldm.data.storage` makes.
        """
        place, wanted = self._place(self._row(index))
        try:
            data = self._ahead.take(place)
            if data is None or sample_hash(data) != wanted:  # what came in a larger request may have been turned on its way
                data = self._ranges.read(self.index.path(place.shard), place.offset, place.size)
        except OSError as error:
            raise UserError(
                f"{self.index.path(place.shard)}: cannot be read any more ({error.strerror or error}); every process must see the same "
                f"samples, so the run ends: restore the shard and start again, which goes on from the last checkpoint"
            ) from None
        if len(data) < place.size or sample_hash(data) != wanted:
            said = f"{len(data)} of {place.size} bytes" if len(data) < place.size else "another hash"
            raise Rejected("changed since it was indexed", said)
        return data

    def after(self, index: int) -> int:
        """The next sample."""
        self._ahead.drop(self._row(index % len(self)))  # it may have been passed over
        return index + 1

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        before, behind = self.source.prefix, self.source.suffix
        found = [self.index.entry(row).captions for row in self._kept.rows(index).tolist()]
        return [[affixed(text, before, behind) for text in texts] if before or behind else list(texts) for texts in found]

    def fields(self) -> Fields:
        """Sizes of the originals where the shards tell them, else of the images; scores as they tell."""
        rows = self._kept.rows()
        sides = ("original_height", "original_width", "height", "width")
        column = {name: self.index.column(name)[rows] for name in (*sides, *FLOATS)}
        there = (column["original_height"] > 0) & (column["original_width"] > 0)
        high, wide = (np.where(there, column[f"original_{name}"], column[name]).astype(np.int32) for name in ("height", "width"))
        return Fields(high, wide, column["aesthetic"], column["watermark"])

    def sizes(self) -> np.ndarray:
        """As `Photos.sizes`."""
        rows = self._kept.rows()
        return np.stack([self.index.column(name)[rows].astype(np.int32) for name in ("height", "width")], 1)

    def describe(self) -> dict[str, object]:
        """Counts, what was rejected and why, what is damaged in which shard, and the fingerprint."""
        shards = self.index.shards
        return {
            "kind": "shards",
            "path": self.where,
            "split": self.split,
            "shards": len(shards),
            "bytes": sum(s.bytes for s in shards),
            "images": len(self),
            "images_in_both_parts": self.total,
            "captions_in_both_parts": sum(s.captions for s in shards),
            "rejected": dict(self.rejected),
            "rejected_samples": [f"{s.name}: {': '.join(e)}" for s in shards for e in s.examples][:LISTED],
            "damaged_shards": {s.name: s.damage[:LISTED] for s in shards if s.damage},
            "notes": remarks((what, f"{s.name}/{first}", n) for s in shards for what, (first, n) in s.remarks.items()),
            "replaced_when_decoded": dict(sorted(self.replaced.items())[:LISTED]),
            "fingerprint": self.fingerprint(),
        }
