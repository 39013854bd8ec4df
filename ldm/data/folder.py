"""A folder of photographs with captions, as people have it: any sizes, any modes, and a few files that are broken."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ldm.batch import ImageBatch
from ldm.config import Count, Fraction, Positive, Share, config
from ldm.data.captions import SIDECARS, TABLES, Table, from_name, read_tables, sidecar
from ldm.data.dataset import Split, draw_captions, draw_flips
from ldm.data.images import FORMATS, MAX_PIXELS, Rejected, View, probe, to_tensor, view
from ldm.errors import UserError
from ldm.rng import Rng, mix

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_IMAGES = (".avif", ".bmp", ".eps", ".gif", ".heic", ".heif", ".jxl", ".pdf", ".svg", ".tif", ".tiff")
LISTED = 20  # rejected files that describe() names; `rejected` has all
TOLERATED = 10  # bad files that never stop a run, however small the folder
HARMLESS = ("too small", "format not supported", "no caption")  # left out by a rule, not because they are broken
SCAN_THREADS = 8

_log = logging.getLogger(__name__)


@config
class FolderSource:
    """JPEG, PNG and WebP files below a folder, captioned by .txt files beside them, metadata.jsonl/csv or names."""

    kind: Literal["folder"] = "folder"
    path: str  # the folder; folders inside it are read too
    captions: Literal["auto", "txt", "metadata", "filename"] = "auto"  # where captions are; auto: metadata, else .txt
    val_share: Share = 0.02  # share held out by a hash of the name; at least one
    min_side: Count = 32  # px; images with a shorter side are left out
    max_pixels: Positive = MAX_PIXELS  # images with more are left out; guards the memory
    crop: Literal["random", "centre"] = "random"  # where the training square lies; held-out images use the centre
    max_bad: Fraction = 0.1  # share of unusable files above which the run stops; ten are always tolerated

    def build(self, split: Split) -> FolderData:
        """The training or the held-out part.

        Raises:
            UserError: if the folder is missing, has no usable image or caption, or too many files are bad.
        """
        return FolderData(self, split)


@dataclass(frozen=True)
class Rejection:
    """A file that is not used, and why."""

    name: str  # relative to the folder; a row as file:line
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class _Entry:
    name: str
    bytes: int
    mtime_ns: int
    captions: tuple[str, ...]
    rejection: Rejection | None


class FolderData:
    """One part of a folder of captioned images, in the order of their names.

    Headers are checked when it is built. A file that turns out damaged when it is decoded is replaced by the next
    usable one, so that every rank and every run agrees; it is logged once and counted.
    """

    mirrors = True  # whoever asks for flips knows that the captions name no sides

    def __init__(self, source: FolderSource, split: Split) -> None:
        self.source, self.split = source, split
        self.root = Path(source.path)
        entries, self.rejected, self.tables = scan(self.root, source)
        total = len(entries)
        self._tolerated = max(TOLERATED, int(source.max_bad * (total + len(self.rejected))))
        _refuse_empty(self.root, source, total, self.rejected, self._tolerated)
        held_out = held_out_names([e.name for e in entries], source.val_share)
        kept = [e for e in entries if (e.name in held_out) == (split == "val")]
        self.total = total  # usable images in both parts
        self.names: list[str] = [e.name for e in kept]
        self._captions: list[tuple[str, ...]] = [e.captions for e in kept]
        digest = hashlib.sha256()
        view_options = (split, source.val_share, source.crop, source.min_side, source.max_pixels)
        digest.update(json.dumps(["folder", 1, *view_options]).encode())
        for e in kept:
            digest.update(json.dumps([e.name, e.bytes, e.mtime_ns, e.captions]).encode())
        self._fingerprint = digest.hexdigest()
        self.replaced: dict[str, str] = {}  # by name, why a file was replaced when it was decoded

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: Sequence[int], position: Sequence[int], resolution: int, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Samples.load`."""
        if self.source.crop == "random" and self.split == "train":
            at = Rng(seed, position).uniform("crop", (2,)).tolist()
        else:
            at = [(0.5, 0.5)] * len(position)
        flips = draw_flips(seed, position, flip)
        pixels = np.empty((len(index), resolution, resolution, 3), np.uint8)
        sizes: list[tuple[int, ...]] = []
        used: list[int] = []
        for row, (i, where, mirror) in enumerate(zip(index, at, flips, strict=True)):
            found, seen = self._view(int(i), resolution, (where[0], where[1]), mirror)
            pixels[row] = seen.pixels
            sizes.append(seen.size)
            used.append(found)
        return ImageBatch(
            image=to_tensor(pixels),
            caption=tuple(self.captions(used, position, seed)),
            size=torch.tensor(sizes, dtype=torch.float32).view(-1, 6),
            position=torch.tensor([int(p) for p in position], dtype=torch.int64),
        )

    def _view(self, index: int, resolution: int, at: tuple[float, float], flip: bool) -> tuple[int, View]:
        for i in range(index, index + len(self)):
            name = self.names[i % len(self)]
            if name in self.replaced:
                continue
            try:
                return i % len(self), view(self._read(name), resolution, at, flip, self.source.max_pixels)
            except Rejected as error:
                self._replace(name, error)
        raise UserError(f"{self.root}: none of its {len(self)} images can be decoded any more; was the folder changed?")

    def _read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise Rejected("unreadable file", str(error.strerror)) from None

    def _replace(self, name: str, error: Rejected) -> None:
        self.replaced[name] = str(error)
        if len(self.replaced) > self._tolerated:
            raise UserError(
                f"{self.root}: {len(self.replaced)} of {len(self)} images could not be decoded "
                f"({_counts(Counter(v.split(':')[0] for v in self.replaced.values()))}; the last was {name}); "
                f"mend or remove them, or raise max_bad (now {self.source.max_bad})"
            )
        _log.warning("%s: replaced by the next image: %s", self.root / name, error)

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return draw_captions([self._captions[i] for i in index], position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return [list(self._captions[i]) for i in index]

    def origin(self, index: int) -> str:
        """The image's path."""
        return str(self.root / self.names[index])

    def describe(self) -> dict[str, object]:
        """Counts, rejections by reason with the first few names, files replaced so far, and the fingerprint."""
        return {
            "kind": "folder",
            "path": str(self.root),
            "split": self.split,
            "images": len(self),
            "images_in_both_parts": self.total,
            "captions": sum(map(len, self._captions)),
            "captions_from": self.tables or self.source.captions,
            "rejected": dict(Counter(r.reason for r in self.rejected)),
            "rejected_files": [str(r) for r in self.rejected[:LISTED]],
            "replaced_when_decoded": dict(sorted(self.replaced.items())[:LISTED]),
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Hash of names, sizes, modification times, captions and the options that change a view."""
        return self._fingerprint


def held_out_names(names: Sequence[str], share: float) -> set[str]:
    """The names whose hash lies below `share`, and the one with the lowest hash if there are none.

    A name's part depends on the name alone, so files that are added later do not move the others.
    """
    place = {name: mix("val", name) / 2**64 for name in names}
    chosen = {name for name, p in place.items() if p < share}
    if len(chosen) == len(names) and names:
        chosen.discard(max(place, key=lambda n: place[n]))
    return chosen or ({min(place, key=lambda n: place[n])} if place else set())


def scan(root: Path, source: FolderSource) -> tuple[list[_Entry], list[Rejection], list[str]]:
    """Usable images sorted by name, everything rejected, and the metadata files read; headers are checked in threads.

    Raises:
        UserError: if the folder is missing or a metadata file cannot be understood.
    """
    if not root.is_dir():
        raise UserError(f"data.path: {root} is not a folder; give the folder that holds your images")
    images, tables, rejected = _files(root)
    table = Table()
    if source.captions in ("auto", "metadata"):
        table = read_tables(root, tables)
    rejected += [Rejection(*row) for row in table.rejected]
    absent = sorted(set(table.captions) - {name for name, _ in images})
    rejected += [Rejection(name, "listed but missing") for name in absent]

    def look(item: tuple[str, os.stat_result]) -> _Entry:
        name, status = item
        captions: tuple[str, ...] = ()
        rejection = None
        try:
            captions = _captions(root / name, name, source, table)
            height, width = probe(root / name, source.max_pixels)
            if min(height, width) < source.min_side:
                raise Rejected("too small", f"{width}x{height}; at least {source.min_side} px")
        except Rejected as error:
            rejection = Rejection(name, error.reason, error.detail)
        except OSError as error:
            rejection = Rejection(name, "unreadable file", str(error.strerror))
        return _Entry(name, status.st_size, status.st_mtime_ns, captions, rejection)

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        looked = list(pool.map(look, images))
    rejected += [e.rejection for e in looked if e.rejection is not None]
    return [e for e in looked if e.rejection is None], rejected, table.files


def _captions(image: Path, name: str, source: FolderSource, table: Table) -> tuple[str, ...]:
    found: tuple[str, ...] = ()
    if source.captions in ("auto", "metadata"):
        found = tuple(table.captions.get(name, ()))
    if not found and source.captions in ("auto", "txt"):
        found = sidecar(image)
    if source.captions == "filename":
        found = from_name(image)
    if not found:
        raise Rejected("no caption")
    return found


def _files(root: Path) -> tuple[list[tuple[str, os.stat_result]], list[Path], list[Rejection]]:
    images: list[tuple[str, os.stat_result]] = []
    tables: list[Path] = []
    rejected: list[Rejection] = []
    for path, status in _walk(root, set()):
        name = path.relative_to(root).as_posix()
        suffix = path.suffix.lower()
        if not _is_text(name):
            rejected.append(Rejection(os.fsencode(name).decode("utf-8", "backslashreplace"), "name not UTF-8"))
        elif path.name in TABLES:
            tables.append(path)
        elif suffix in SUFFIXES:
            images.append((name, status))
        elif suffix in OTHER_IMAGES:
            rejected.append(Rejection(name, "format not supported", f"{suffix}; convert it to PNG, JPEG or WebP"))
    return sorted(images), sorted(tables), rejected


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(folder: Path, visited: set[tuple[int, int]]) -> Iterator[tuple[Path, os.stat_result]]:
    """Every file below a folder, links followed once, hidden and __MACOSX ones left out."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda e: e.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        try:
            if entry.is_dir():
                yield from _walk(folder / entry.name, visited)
            elif entry.is_file():
                yield folder / entry.name, entry.stat()
        except OSError:  # a folder that may not be read, or a file that has just gone
            _log.warning("%s cannot be read", entry.path)


def _refuse_empty(root: Path, source: FolderSource, usable: int, rejected: list[Rejection], tolerated: int) -> None:
    counts = Counter(r.reason for r in rejected)
    if usable == 0 and not rejected:
        raise UserError(f"{root}: no images here; put {', '.join(FORMATS)} files into it or correct data.path")
    uncaptioned = counts["no caption"] + counts["empty caption"]
    if usable == 0 and uncaptioned:
        raise UserError(
            f"{root}: {uncaptioned} images but no captions (data.captions={source.captions}); write x{SIDECARS[0]} "
            f"beside each x.jpg, or a {TABLES[0]} with file_name and text, or set data.captions=filename"
        )
    if usable == 0:
        raise UserError(f"{root}: no usable image ({_counts(counts)}); {_first(rejected)}")
    if usable == 1:
        raise UserError(f"{root}: only one usable image; it takes two, as one is held out ({_counts(counts)})")
    bad = sum(n for reason, n in counts.items() if reason not in HARMLESS)
    if bad > tolerated:
        raise UserError(
            f"{root}: {bad} of {usable + len(rejected)} files are unusable ({_counts(counts)}); {_first(rejected)}; "
            f"mend or remove them, or raise data.max_bad (now {source.max_bad})"
        )


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "none rejected"


def _first(rejected: list[Rejection]) -> str:
    return f"the first is {rejected[0]}"
