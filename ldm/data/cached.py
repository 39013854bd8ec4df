"""Latent cache, reading: a committed cache as a data set (`ldm.data.cache` writes it)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.data.cache import DATA, RECORD, VIEW_PARTS, Read, ShardRecord, column, joined, read_plan, rebuilt, shard_folder
from ldm.data.dataset import draw_captions, draw_flips
from ldm.data.images import Shape
from ldm.data.views import mirrored_view
from ldm.diffusion.batch import MomentBatch, Text, View
from ldm.formats.atomic import MANIFEST, sha256, verify
from ldm.formats.records import read_as

IN_MEMORY_BYTES = 2**32  # a cache up to this size is read into memory, a larger one is mapped


def _arrays(file: Path, in_memory: bool) -> dict[str, Tensor]:
    """The arrays of a safetensors file, in memory or mapped."""
    # Torch takes no read-only memory; pages of mode "c" are copied on a write, which never reaches the file.
    raw: np.ndarray = np.fromfile(file, np.uint8) if in_memory else np.memmap(file, np.uint8, mode="c")
    length = int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8 : 8 + length].tobytes())
    kinds = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "I16": np.int16, "I32": np.int32}
    found: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = torch.from_numpy(raw[start:end].view(kinds[entry["dtype"]]).reshape(entry["shape"]))
    return found


def _places(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each how many equal ones stand before it."""
    found = np.empty(len(numbers), np.int64)
    for number in np.unique(numbers):
        here = np.flatnonzero(numbers == number)
        found[here] = np.arange(len(here))
    return found


class CachedLatents:
    """Latent cache as a data set of posterior moments (MomentBatch).

    Args:
        folder: as `write_cache` left it.
        in_memory_bytes: a cache up to this size is read into memory after its sums are checked; a larger one is mapped
            unchecked, and must not be rewritten while it is read.

    Raises:
        UserError: naming the shard that is missing, damaged or of another plan.
    """

    def __init__(self, folder: Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self.folder = folder
        self.plan = read_plan(folder)
        every = range(self.plan.shards)
        if (gone := next((n for n in every if not (shard_folder(folder, n) / DATA).is_file()), None)) is not None:
            missing = self.plan.shards - sum(1 for _ in folder.glob(f"shard-*/{DATA}"))
            raise UserError(f"{folder}: {missing} of {self.plan.shards} shards missing ({shard_folder(folder, gone).name}); encode again")
        shards = [shard_folder(folder, n) for n in every]
        self.bytes = sum((s / DATA).stat().st_size for s in shards)
        self.in_memory = self.bytes <= in_memory_bytes
        self._captions: list[list[str]] = []
        self._words: dict[str, list[Any]] = {}
        self._asked: tuple[str, ...] = ()
        self._shards: list[dict[str, Tensor]] = []
        rows, numbers = [], []
        digest = hashlib.sha256(self.plan.hash.encode())
        for shard in shards:
            try:
                if self.in_memory:
                    verify(shard)
                record = read_as(shard / RECORD, ShardRecord)
                self._shards.append(_arrays(shard / DATA, self.in_memory))
                digest.update((shard / MANIFEST).read_bytes())
            except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                raise UserError(f"{shard}: damaged ({error}); remove it and encode again") from None
            if record.plan != self.plan.hash:
                raise UserError(f"{shard}: made for another autoencoder, data set or size; encode again")
            self._captions += record.captions
            for name, said in record.words.items():
                self._words.setdefault(name, []).extend(said)
            if self.plan.shapes:
                numbers.append(np.array(record.buckets, np.int64))
                rows.append(_places(numbers[-1]))
        if len(self._captions) != len(self):
            raise UserError(f"{folder}: {plural(len(self._captions), 'caption')} of {plural(len(self), 'sample')}; encode again")
        self._names = {name.partition(".")[0] for shard in self._shards for name in shard}
        self._bucket = np.concatenate(numbers) if numbers else None  # (N,) number of each sample's shape
        self._row = np.concatenate(rows) if rows else None  # (N,) its place among those of its shape in its shard
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self.plan.images

    @property
    def mirrors(self) -> bool:
        """As the data that was encoded."""
        return self.plan.mirrors

    def require(self, *, autoencoder: str | None = None, resolution: Shape | None = None, data: str | None = None) -> None:
        """Check that the cache is what the caller means to train on; None: do not care.

        Raises:
            UserError: naming what differs.
        """
        wanted = {"autoencoder": autoencoder, "resolution": resolution, "data": data}
        for name, value in wanted.items():
            if value is not None and getattr(self.plan, name) != value:
                raise UserError(
                    f"{self.folder}: its latents were made with {name} {str(getattr(self.plan, name))[:12]}, "
                    f"not {str(value)[:12]}; encode again"
                )

    def require_shapes(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Check that latents are kept in these buckets (height, width px); none: in squares.

        Raises:
            UserError: where they are not.
        """
        if set(wanted) != set(self.plan.shapes):
            own, other = (", ".join(f"{w}x{h}" for h, w in shapes) or "squares" for shapes in (self.plan.shapes, wanted))
            raise UserError(
                f"{self.folder}: its latents are kept in {own}, not {other}; encode again {'with' if wanted else 'without'} buckets,"
                " or set the stage's buckets alike"
            )

    def with_views(self, names: tuple[str, ...]) -> CachedLatents:
        """The same latents, whose batches have these views.

        Raises:
            UserError: naming those that are not kept.
        """
        if absent := [name for name in names if name not in self.plan.views]:
            kept = ", ".join(self.plan.views) or "no views"
            raise UserError(
                f"{self.folder}: keeps {kept}, but {', '.join(absent)} is asked for; encode again (ldm data encode: --views {absent[0]})"
            )
        found = copy.copy(self)
        found._asked = names
        return found

    def buckets(self) -> tuple[Sequence[tuple[int, int]], NDArray[np.int64]] | None:
        """Height and width of the buckets, px, and the number (N,) of each sample's; None: squares."""
        return None if self._bucket is None else (self.plan.shapes, self._bucket)

    def sizes(self) -> NDArray[np.int32] | None:
        """Height and width (N,2) px that the pictures had; None where latents are squares."""
        if self._bucket is None:
            return None
        found = np.empty((len(self), 2), np.int32)
        for number, shape in enumerate(self.plan.shapes):
            rows = np.flatnonzero(self._bucket == number)
            for s, shard in enumerate(self._shards):
                here = rows[rows // self.plan.shard_images == s]
                if len(here):
                    found[here] = shard[column("size", shape)][self._row[here], :2].numpy()  # type: ignore[index]
        return found

    def _shape(self, rows: np.ndarray) -> tuple[int, int] | None:
        """The one that all of these samples have; None: squares."""
        if self._bucket is None or not len(rows):
            return None
        return self.plan.shapes[int(self._bucket[rows[0]])]

    def _check_shape(self, rows: np.ndarray, wanted: Shape) -> None:
        if self._bucket is None:
            self.require(resolution=wanted)
            return
        shape = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        number = self.plan.shapes.index(shape) if shape in self.plan.shapes else -1
        wrong = rows[self._bucket[rows] != number]
        if len(wrong):
            high, wide = self.plan.shapes[int(self._bucket[wrong[0]])]
            raise UserError(f"{self.origin(int(wrong[0]))}: kept in {wide}x{high} px; it cannot be read in another shape ({wanted})")

    def require_text(self, read: Read) -> None:
        """Check that the kept states of captions are those that the caller's text encoder gives.

        Raises:
            UserError: where they are not.
        """
        kept, own = self._text(np.zeros(1, np.int64)), read(self._captions[0])
        for one, other in ((kept.tokens, own.tokens), (kept.pooled, own.pooled)):
            if one is None or other is None or one.shape != other.shape:
                alike = one is other
            else:
                alike = float((one - other.cpu()).abs().max()) <= 0.01 * float(other.abs().max())
            if not alike:
                raise UserError(f"{self.folder}: its text states are another text encoder's; encode again with --text, or without")

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> MomentBatch:
        """As `ldm.data.dataset.Samples.load`; the crop is the stored one, flip and caption are drawn by position.

        Raises:
            UserError: if `resolution` is not the stored one, or `flip` is asked of a cache without mirrored copies.
        """
        rows = np.asarray(index, np.int64)
        self._check_shape(rows, resolution)
        flip = flip and self.mirrors
        if flip and not self.plan.flip:
            raise UserError(f"{self.folder}: has no mirrored copies; encode with flip=true or train with flip=false")
        mirror = np.asarray(draw_flips(seed, position, flip), bool)
        return MomentBatch(
            mean=self._gather("mean", rows, mirror),
            std=self._gather("std", rows, mirror) if "std" in self._names else None,
            caption=tuple(self.captions(index, position, seed)),
            size=self._gather("size", rows, mirror),
            text=self._text(rows) if self.plan.text else None,
            mask=self._gather("mask", rows, mirror) if "mask" in self._names else None,
            position=torch.tensor([int(p) for p in position], dtype=torch.int64),
            views={name: self._view(name, rows, mirror) for name in self._asked} or None,
        )

    def _view(self, name: str, rows: np.ndarray, mirror: np.ndarray) -> View:
        """One view of samples, turned with their pictures."""
        found: list[View] = []
        for i, turned in zip(rows.tolist(), mirror.tolist(), strict=True):
            number, local = divmod(i, self.plan.shard_images)
            shape, row = self._shape(np.array([i])), local if self._row is None else int(self._row[i])
            shard = self._shards[number]
            columns = {part: column(f"view-{name}{part}", shape) for part in VIEW_PARTS}
            parts = {part: shard[key][row : row + 1] for part, key in columns.items() if key in shard}
            view = rebuilt(parts, [self._words[name][i]] if name in self._words else [])
            found.append(mirrored_view(view) if turned else view)
        return joined(found)

    def _text(self, rows: np.ndarray) -> Text:
        """The kept states of the samples' captions."""
        plain = np.zeros(len(rows), bool)
        pooled = self._gather("text_pooled", rows, plain) if "text_pooled" in self._names else None
        return Text(tokens=self._gather("text_tokens", rows, plain), mask=self._gather("text_mask", rows, plain).bool(), pooled=pooled)

    def _gather(self, name: str, rows: np.ndarray, mirror: np.ndarray) -> Tensor:
        """Rows of one column in float32; of codes int64."""
        shard, local = np.divmod(rows, self.plan.shard_images)
        shape = self._shape(rows)
        local = local if self._row is None else self._row[rows]
        places = zip(shard.tolist(), local.tolist(), mirror.tolist(), strict=True)
        # Joined from views and converted at once: three times as fast as an index array, which gathers value by value.
        plain, other = column(name, shape), column(f"mirrored_{name}", shape)
        found = [self._shards[s][other if m else plain][r] for s, r, m in places]
        rows_found = torch.stack(found) if found else self._like(name)[:0]
        return rows_found.float() if rows_found.is_floating_point() else rows_found.long()

    def _like(self, name: str) -> Tensor:
        """Any shard's rows of a column."""
        return next(rows for held, rows in self._shards[0].items() if held.partition(".")[0] == name)

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return draw_captions([self._captions[i] for i in index], position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return [list(self._captions[i]) for i in index]

    def origin(self, index: int) -> str:
        """The shard and the row in it."""
        number, row = divmod(index, self.plan.shard_images)
        return f"{shard_folder(self.folder, number)}:{row}"

    def describe(self) -> dict[str, object]:
        """What is stored, under which plan."""
        return {
            "kind": "latents",
            "images": len(self),
            "captions": sum(map(len, self._captions)),
            "shape": list(self._like("mean").shape[1:]) if self._bucket is None else "by bucket",
            "bytes": self.bytes,
            "in_memory": self.in_memory,
            **{k: v for k, v in asdict(self.plan).items() if k not in ("images", "format")},
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Hash of the plan and of the sums of every shard."""
        return self._fingerprint


def cache_hash(folder: Path) -> str:
    """Of all that a committed cache holds, by its manifest.

    Raises:
        UserError: if there is none.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no finished latent cache here ({MANIFEST} is missing); make one by ldm data encode, or start it again")
    return sha256(folder / MANIFEST)
