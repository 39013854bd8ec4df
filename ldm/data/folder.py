"""Image folder data set with captions: any sizes and modes, broken files rejected or replaced."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, PathText, Positive, PositiveFloat, Share, config
from ldm.data.captions import SIDECARS, TABLES, CaptionTable, from_folder, from_name, read_tables, sidecar
from ldm.data.dataset import Split
from ldm.data.fields import Known, gather
from ldm.data.images import FORMATS, MAX_PIXELS, Rejected, probe
from ldm.data.photos import LISTED, Photos, Rejection, counted, held_out, refuse_bad, tolerated

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
OTHER_IMAGES = (".eps", ".heic", ".heif", ".jp2", ".jxl", ".pdf", ".psd", ".svg")
SCAN_THREADS = 8

_log = logging.getLogger(__name__)


@config
class FolderSource:
    """Image folder: pictures below it, captioned by .txt files beside them, metadata.jsonl/csv/parquet or names."""

    kind: Literal["folder"] = "folder"
    path: PathText  # the folder; folders inside it are read too
    captions: Literal["auto", "txt", "metadata", "filename", "kohya"] = "auto"  # auto: metadata, else .txt; kohya: 10_sks dog/x.png
    caption: str = ""  # of every picture, such as "a photo of sks dog", in place of captions that lie beside them
    val_share: Share = 0.02  # share held out by a hash of the name; at least one
    min_side: Count = 32  # px; images with a shorter side are left out
    max_pixels: Positive = MAX_PIXELS  # images with more are left out; guards the memory
    crop: Literal["random", "centre"] = "random"  # where the training square lies; held-out images use the centre
    max_bad: Fraction = 0.1  # share of unusable files above which the run stops; ten are always tolerated
    max_seconds: PositiveFloat = 20.0  # for reading and decoding one image; a slower one is replaced by the next

    def build(self, split: Split) -> FolderData:
        """The training or the held-out part.

        Raises:
            UserError: if the folder is missing, has no usable image or caption, or too many files are bad.
        """
        return FolderData(self, split)


@dataclass(frozen=True)
class _Entry:
    name: str
    bytes: int
    mtime_ns: int
    captions: tuple[str, ...]
    known: Known
    size: tuple[int, int]  # height, width by the header
    times: int  # that it is seen in an epoch
    rejection: Rejection | None


class FolderData(Photos):
    """A split of an image folder, in the order of names.

    Headers are checked when it is built. A file that turns out damaged when it is decoded is replaced by the next
    usable one, so that every rank and every run agrees; it is logged once and counted.
    """

    def __init__(self, source: FolderSource, split: Split) -> None:
        self.source, self.root = source, Path(source.path)
        entries, self.rejected, self.tables = scan(self.root, source)
        self.total = len(entries)  # usable images in both parts
        super().__init__(str(self.root), source, split, tolerated(source.max_bad, self.total + len(self.rejected)))
        _refuse_empty(self.root, source, self.total, self.rejected)
        kept = [e for e, out in zip(entries, held_out([e.name for e in entries], source.val_share), strict=True) if out == (split == "val")]
        self.distinct = len(kept)
        if split == "train":
            kept = [e for e in kept for _ in range(e.times)]
        self.names: list[str] = [e.name for e in kept]
        self._captions = [e.captions for e in kept]
        self._fields = gather([e.known for e in kept])
        self._sizes = np.array([e.size for e in kept], np.int32).reshape(-1, 2)
        digest = hashlib.sha256()
        view_options = (split, source.val_share, source.crop, source.min_side, source.max_pixels)
        digest.update(json.dumps(["folder", 1, *view_options]).encode())
        for e in kept:
            digest.update(json.dumps([e.name, e.bytes, e.mtime_ns, e.captions]).encode())
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The path below the folder."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """As `Photos.read`."""
        try:
            return (self.root / self.names[index]).read_bytes()
        except OSError as error:
            raise Rejected("unreadable file", str(error.strerror)) from None

    def describe(self) -> dict[str, object]:
        """Counts, rejections by reason with the first few names, files replaced so far, and the fingerprint."""
        return {
            "kind": "folder",
            "path": str(self.root),
            "split": self.split,
            "images": self.distinct,
            **({"with_repeats": len(self)} if len(self) != self.distinct else {}),
            "images_in_both_parts": self.total,
            "captions": sum(map(len, self._captions)),
            "captions_from": self.tables or self.source.captions,
            "rejected": dict(Counter(r.reason for r in self.rejected)),
            "rejected_files": [str(r) for r in self.rejected[:LISTED]],
            "replaced_when_decoded": dict(sorted(self.replaced.items())[:LISTED]),
            "fingerprint": self.fingerprint(),
        }


def scan(root: Path, source: FolderSource) -> tuple[list[_Entry], list[Rejection], list[str]]:
    """Usable images sorted by name, everything rejected, and the metadata files read; headers are checked in threads.

    Raises:
        UserError: if the folder is missing or a metadata file cannot be understood.
    """
    if not root.is_dir():
        raise UserError(f"data.path: {root} is not a folder; give the folder that holds your images")
    images, tables, rejected = _files(root)
    table = CaptionTable()
    if source.captions in ("auto", "metadata"):
        table = read_tables(root, tables)
    rejected += [Rejection(*row) for row in table.rejected]
    absent = sorted(set(table.captions) - {name for name, _ in images})
    rejected += [Rejection(name, "listed but missing") for name in absent]

    def look(item: tuple[str, os.stat_result]) -> _Entry:
        name, status = item
        captions: tuple[str, ...] = ()
        rejection = None
        told, size, times = table.known.get(name, Known()), (0, 0), 1
        try:
            if source.captions == "kohya":
                times = _times(name)
            captions = _captions(root / name, name, source, table)
            size = probe(root / name, source.max_pixels)
            told = told.over(Known(*size))
            if min(size) < source.min_side:
                raise Rejected("too small", f"{size[1]}x{size[0]}; at least {source.min_side} px")
        except Rejected as error:
            rejection = Rejection(name, error.reason, error.detail)
        except OSError as error:
            rejection = Rejection(name, "unreadable file", str(error.strerror))
        return _Entry(name, status.st_size, status.st_mtime_ns, captions, told, size, times, rejection)

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        looked = list(pool.map(look, images))
    rejected += [e.rejection for e in looked if e.rejection is not None]
    return [e for e in looked if e.rejection is None], rejected, table.files


def _captions(image: Path, name: str, source: FolderSource, table: CaptionTable) -> tuple[str, ...]:
    if source.caption:
        return (source.caption,)
    found: tuple[str, ...] = ()
    if source.captions in ("auto", "metadata"):
        found = tuple(table.captions.get(name, ()))
    if not found and source.captions in ("auto", "txt", "kohya"):
        found = sidecar(image)
    if not found and source.captions == "kohya" and (said := from_folder(name)):
        found = (said[1],)
    if source.captions == "filename":
        found = from_name(image)
    if not found:
        raise Rejected("no caption")
    return found


def _times(name: str) -> int:
    """How often a picture in folders named as kohya's scripts have them is seen in an epoch.

    Raises:
        Rejected: as these scripts leave pictures out.
    """
    said = from_folder(name)
    if said is None:
        raise Rejected("no N_words folder", "captions=kohya reads pictures in folders such as '10_sks dog'")
    if not said[0]:
        raise Rejected("repeated 0 times")
    return said[0]


def _files(root: Path) -> tuple[list[tuple[str, os.stat_result]], list[Path], list[Rejection]]:
    images: list[tuple[str, os.stat_result]] = []
    tables: list[Path] = []
    rejected: list[Rejection] = []
    for path, status in _walk(root, set()):
        name = path.relative_to(root).as_posix()
        suffix = path.suffix.lower()
        if not is_text(name):
            rejected.append(Rejection(os.fsencode(name).decode("utf-8", "backslashreplace"), "name not UTF-8"))
        elif path.name in TABLES:
            tables.append(path)
        elif suffix in SUFFIXES:
            images.append((name, status))
        elif suffix in OTHER_IMAGES:
            rejected.append(Rejection(name, "format not supported", f"{suffix}; convert it to one of {', '.join(FORMATS)}"))
    return sorted(images), sorted(tables), rejected


def is_text(name: str) -> bool:
    """Whether a file's name is Unicode text, which other systems' names need not be."""
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


def _refuse_empty(root: Path, source: FolderSource, usable: int, rejected: list[Rejection]) -> None:
    counts = Counter(r.reason for r in rejected)
    if usable == 0 and not rejected:
        raise UserError(f"{root}: no images here; put {', '.join(FORMATS)} files into it or correct data.path")
    uncaptioned = counts["no caption"] + counts["empty caption"]
    if usable == 0 and uncaptioned:
        raise UserError(
            f"{root}: {uncaptioned} images but no captions (data.captions={source.captions}); write x{SIDECARS[0]} "
            f"beside each x.jpg, or a {TABLES[0]} with file_name and text, or set data.captions=filename,"
            " or kohya for folders such as '10_sks dog'"
        )
    first = f"the first is {rejected[0]}" if rejected else ""
    if usable == 0:
        raise UserError(f"{root}: no usable image ({counted(counts)}); {first}")
    if usable == 1:
        raise UserError(f"{root}: only one usable image; it takes two, as one is held out ({counted(counts)})")
    refuse_bad(str(root), usable, counts, first, source.max_bad)
