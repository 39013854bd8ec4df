"""WebDataset tar shards with random access through an index, never unpacked."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, PathText, Positive, PositiveFloat, config
from ldm.data.dataset import Split
from ldm.data.fields import Fields
from ldm.data.images import MAX_PIXELS, Rejected
from ldm.data.photos import LISTED, Photos, counted, held_out, refuse_bad, tolerated
from ldm.data.shard_index import Index, open_index, sample_hash
from ldm.data.storage import Ranges
from ldm.data.tags import affixed


@config
class ShardsSource:
    """WebDataset tar shards of pictures (.jpg, .png, .webp, ...) with .txt or .json of the same name, read in place."""

    kind: Literal["shards"] = "shards"
    path: PathText  # a folder of shards, one shard, a pattern such as {00000..00099}.tar, or any URL that fsspec opens
    index: PathText | None = None  # the index file; null: ldm-index.parquet beside the shards, or in the cache
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


def _whole(column: Any) -> Any:
    """One array of a column, which may have no rows."""
    import pyarrow as pa

    return (
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    )


class _Hashes(Sequence[str]):
    """The index's hashes as texts, one at a time."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return str(self._values[index])


class ShardsData(Photos):
    """A split of a set of tar shards, in their order; every image is compared with the index's hash when it is read."""

    def __init__(self, source: ShardsSource, split: Split) -> None:
        self.source = source
        self.index: Index = open_index(source.path, file=Path(source.index) if source.index else None, outside=source.outside)
        table, shards = self.index.table, self.index.shards
        assert table is not None
        self.rejected: Counter[str] = sum((Counter(s.rejected) for s in shards), Counter())
        height, width = table["height"].to_numpy(), table["width"].to_numpy()
        small = np.minimum(height, width) < source.min_side
        large = height.astype(np.int64) * width > source.max_pixels
        for reason, which in (("too small", small), ("too many pixels", large & ~small)):
            if which.any():
                self.rejected[reason] += int(which.sum())
        usable = np.flatnonzero(~small & ~large)
        self.total = len(usable)
        super().__init__(source.path, source, split, tolerated(source.max_bad, self.total + self.rejected.total()))
        self._refuse_empty()
        keys = table["key"].take(usable).to_pylist()
        shard = table["shard"].to_numpy()[usable]
        stems = [Path(s.name).stem for s in shards]
        out = held_out([f"{stems[s]}/{k}" for s, k in zip(shard.tolist(), keys, strict=True)], source.val_share)
        rows = usable[out == (split == "val")]
        self._table = table.take(rows).combine_chunks()
        self._shard, self._offset = self._table["shard"].to_numpy(), self._table["offset"].to_numpy()
        self._size, self._hash = self._table["size"].to_numpy(), self._table["hash"].to_numpy()
        self._keys, self._texts = (_whole(self._table[name]) for name in ("key", "captions"))
        self._ranges, self._lost = Ranges(), dict[int, str]()
        self._contents = _Hashes(self._hash)
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
            raise UserError(f"{self.where}: {self.total} usable samples in {len(shards)} shards ({counted(self.rejected)}); {said}")
        refuse_bad(self.where, self.total, self.rejected, first, self.source.max_bad)

    def __len__(self) -> int:
        return len(self._shard)

    def name(self, index: int) -> str:
        """Shard and key."""
        return f"{self.index.shards[self._shard[index]].name}/{self._keys[index].as_py()}"

    def read(self, index: int) -> bytes:
        """As `Photos.read`; a shard that cannot be read any more is given up as a whole."""
        shard, size = int(self._shard[index]), int(self._size[index])
        if shard in self._lost:
            raise Rejected("shard unreadable", self._lost[shard])
        try:
            data = self._ranges.read(self.index.path(shard), int(self._offset[index]), size)
        except OSError as error:
            self._lost[shard] = str(error.strerror or error)
            raise Rejected("shard unreadable", self._lost[shard]) from None
        if len(data) < size or sample_hash(data) != int(self._hash[index]):
            raise Rejected("changed since it was indexed", f"{len(data)} of {size} bytes" if len(data) < size else "another hash")
        return data

    def after(self, index: int) -> int:
        """The next sample, behind the shard's end where the whole shard is lost."""
        here = index % len(self)
        shard = int(self._shard[here])
        if shard not in self._lost:
            return index + 1
        return index - here + int(np.searchsorted(self._shard, shard, side="right"))

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        before, behind = self.source.prefix, self.source.suffix
        found = [self._texts[int(i)].as_py() for i in index]
        return [[affixed(text, before, behind) for text in texts] for texts in found] if before or behind else found

    def fields(self) -> Fields:
        """Sizes of the originals where the shards tell them, else of the images; scores as they tell."""
        column = {name: self._table[name].to_numpy() for name in self._table.column_names if name not in ("captions", "key", "hash")}
        height, width = column["original_height"], column["original_width"]
        there = (height > 0) & (width > 0)
        return Fields(
            np.where(there, height, column["height"]), np.where(there, width, column["width"]), column["aesthetic"], column["watermark"]
        )

    def sizes(self) -> np.ndarray:
        """As `Photos.sizes`."""
        return np.stack([self._table["height"].to_numpy(), self._table["width"].to_numpy()], 1)

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
            "captions": len(self._texts.flatten()),
            "rejected": dict(self.rejected),
            "rejected_samples": [f"{s.name}: {': '.join(e)}" for s in shards for e in s.examples][:LISTED],
            "damaged_shards": {s.name: s.damage[:LISTED] for s in shards if s.damage},
            "replaced_when_decoded": dict(sorted(self.replaced.items())[:LISTED]),
            "fingerprint": self.fingerprint(),
        }
