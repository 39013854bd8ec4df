"""Image folder data set with captions: any sizes and modes, broken files rejected or replaced."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, PathText, Positive, PositiveFloat, config, refuse_unread
from ldm.data.caption_tables import NEAR, TABLES, CaptionTable, is_table, read_tables
from ldm.data.captions import SIDECARS, from_folder, from_name, sidecar
from ldm.data.content import ContentHashes
from ldm.data.dataset import Split
from ldm.data.fields import Known, gather
from ldm.data.file_names import Names, hidden, is_text, leads_out, side_pictures, split
from ldm.data.folder_views import MAPS, FolderViews, Layout, find_views, half
from ldm.data.images import FORMATS, MAX_PIXELS, Rejected, probe, read_file
from ldm.data.photos import LISTED, Photos, Rejection, counted, held_out, refuse_bad, tolerated
from ldm.data.tags import affixed
from ldm.data.views import ViewKind
from ldm.diffusion.batch import View

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
OTHER_IMAGES = (".eps", ".heic", ".heif", ".jp2", ".jxl", ".pdf", ".psd", ".svg")
ARCHIVES = (".tar", ".gz", ".tgz", ".xz", ".zst", ".bz2", ".zip", ".7z", ".rar")
SCAN_THREADS = 8

_log = logging.getLogger(__name__)


@config
class FolderSource:
    """Image folder: pictures below it, captioned by .txt files beside them, metadata.jsonl/csv/parquet or names."""

    kind: Literal["folder"] = "folder"
    path: PathText  # the folder; folders inside it are read too
    # auto: metadata, else .txt; kohya: 10_sks dog/x.png; none: no words at all
    captions: Literal["auto", "txt", "metadata", "filename", "kohya", "none"] = "auto"
    # Where views lie: labels: maps/, boxes: instances.json (COCO), edges: auto (made of the pictures); others in folders of their names.
    views: dict[str, str] = field(default_factory=dict)
    layout: Layout = "plain"  # pairs: ab, pictures beside each other, the left one is the view `source`; A_B, in folders A and B
    caption: str = ""  # of every picture, such as "a photo of sks dog", in place of captions that lie beside them
    prefix: str = ""  # before every caption, such as "sks style,"
    suffix: str = ""  # behind every caption
    val_share: Fraction = 0.02  # share held out by a hash of the name, at least one of several; 0: none
    min_side: Count = 32  # px; images with a shorter side are left out
    max_pixels: Positive = MAX_PIXELS  # images with more are left out; guards the memory
    crop: Literal["random", "centre"] = "random"  # where the training square lies; held-out images use the centre
    masks: Literal["none", "beside", "alpha"] = "none"  # how much each pixel counts, for masked_loss; beside: x-masklabel.png and the like
    max_bad: Fraction = 0.1  # share of unusable files above which the run stops; ten are always tolerated
    max_seconds: PositiveFloat = 20.0  # for reading and decoding one image; a slower one is replaced by the next
    outside: bool = False  # also follow links that lead out of the folder

    def __post_init__(self) -> None:
        if self.layout == "ab" and "source" in self.views:
            raise UserError("views.source: layout ab has it in the pictures' left halves; leave one of the two out")
        if self.caption and self.captions in ("txt", "filename", "none"):
            refuse_unread(self, ("captions",), "beside caption, which every picture has; leave one of the two out")

    def build(self, split: Split) -> FolderData:
        """The training or the held-out part.

        Raises:
            UserError: if the folder is missing, has no usable image or caption, or too many files are bad.
        """
        return FolderData(self, split)


@dataclass(frozen=True)
class _Entry:
    name: str
    content: str  # hash of the file
    captions: tuple[str, ...]
    known: Known
    size: tuple[int, int]  # height, width by the header
    times: int  # that it is seen in an epoch
    rejection: Rejection | None
    mask: str  # the file that is its mask; empty: none
    words: Mapping[str, View]  # boxes, points and graph that tables tell


class FolderData(Photos):
    """A split of an image folder, in the order of names.

    Headers are checked when it is built. A file that turns out damaged when it is decoded is replaced by the next
    usable one, so that every rank and every run agrees; it is logged once and counted.
    """

    def __init__(self, source: FolderSource, split: Split) -> None:
        self.source, self.root = source, Path(source.path)
        found = Listing(self.root, source.outside)
        table = found.tables(source)
        self.found_views = found.views(source, table)
        entries, self.rejected = scan(found, source, table, self.found_views)
        self.tables = table.files
        self.total = len(entries)  # usable images in both parts
        _refuse_empty(found, source, self.total, self.rejected, table)
        super().__init__(str(self.root), source, split, tolerated(source.max_bad, self.total + len(self.rejected)))
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
        digest.update(json.dumps(["folder", 2, *view_options, source.masks]).encode())
        digest.update(json.dumps(source.layout).encode() if source.layout == "ab" else b"")
        for e in kept:
            digest.update(json.dumps([e.name, e.content, e.captions]).encode())
        self._fingerprint = digest.hexdigest()
        self._contents = [e.content for e in kept]
        self._masks = [e.mask for e in kept]
        self._words = [e.words for e in kept]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The path below the folder."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """As `Photos.read`."""
        try:
            data = read_file(self.root / self.names[index])
            return half(data, right=True) if self.source.layout == "ab" else data
        except OSError as error:
            raise Rejected("unreadable file", str(error.strerror)) from None

    def views(self) -> Mapping[str, ViewKind]:
        """As `ldm.data.dataset.HasViews.views`: what lies in the folder."""
        pairs = {"source": MAPS["source"]} if self.source.layout == "ab" else {}
        return pairs | {name: kind for name, kind in self.found_views.kinds.items() if self.source.views.get(name) != "auto"}

    def with_views(self, names: tuple[str, ...]) -> FolderData:
        """As `ldm.data.dataset.HasViews.with_views`.

        Raises:
            UserError: where pictures lack a map.
        """
        found = super().with_views(names)
        for name in names:
            files = self.found_views.maps.get(name)
            if files is None or name not in self.views():
                continue
            if lacking := [picture for picture in self.names if picture not in files]:
                raise UserError(
                    f"view {name}: {len(set(lacking))} of {self.distinct} pictures have none, such as {lacking[0]}; add them, or set"
                    f" data.views.{name}={self.found_views.places.get(name, name)} to leave these pictures out"
                )
            hashes, digest = ContentHashes(self.root), hashlib.sha256(found._fingerprint.encode())
            for file in dict.fromkeys(files[picture] for picture in self.names):
                digest.update(hashes.of(self.root / file, file, (self.root / file).stat()).encode())
            digest.update(repr(self.views()[name]).encode())
            found._fingerprint = digest.hexdigest()
            hashes.save(list(files.values()))
        for name in names:
            if broken := self.found_views.broken.get(name):
                picture, why = next(iter(broken.items()))
                raise UserError(f"view {name}: what is told of {len(broken)} pictures cannot be read, such as {picture}: {why}")
        if any(name in self.found_views.words for name in names):
            said = [[repr(words.get(name)) for name in names] for words in self._words]
            found._fingerprint = hashlib.sha256(json.dumps([found._fingerprint, said]).encode()).hexdigest()
        return found

    def read_view(self, index: int, name: str) -> bytes:
        """As `Photos.read_view`."""
        try:
            if self.source.layout == "ab":
                return half(read_file(self.root / self.names[index]), right=False)
            return read_file(self.root / self.found_views.maps[name][self.names[index]])
        except OSError as error:
            raise Rejected(f"unreadable {name}", str(error.strerror)) from None

    def words_of(self, index: int, name: str) -> View | None:
        """As `Photos.words_of`."""
        return self._words[index].get(name)

    def read_mask(self, index: int) -> bytes | None:
        """As `Photos.read_mask`."""
        try:
            return read_file(self.root / name) if (name := self._masks[index]) else None
        except OSError as error:
            raise Rejected("unreadable mask", str(error.strerror)) from None

    def describe(self) -> dict[str, object]:
        """Counts, rejections by reason with the first few names, files replaced so far, and the fingerprint."""
        return {
            "kind": "folder",
            "path": str(self.root),
            "split": self.split,
            "images": self.distinct,
            **({"with_repeats": len(self)} if len(self) != self.distinct else {}),
            "images_in_both_parts": self.total,
            **{f"with_{name}": sum(picture in files for picture in set(self.names)) for name, files in self.found_views.maps.items()},
            **{f"with_{name}": sum(bool(words.get(name)) for words in self._words) for name in self.found_views.words},
            **({"with_mask": sum(map(bool, self._masks))} if self.source.masks == "beside" else {}),
            "captions": sum(len(set(texts)) for texts in self._captions),
            "captions_from": self.tables or self.source.captions,
            "rejected": dict(Counter(r.reason for r in self.rejected)),
            "rejected_files": [str(r) for r in self.rejected[:LISTED]],
            "replaced_when_decoded": dict(sorted(self.replaced.items())[:LISTED]),
            "fingerprint": self.fingerprint(),
        }


class Listing:
    """Files below a folder, by what they are for.

    Args:
        outside: follow links that lead out of the folder; if not, they are rejected, so that a stranger's folder shows nothing else.

    Raises:
        UserError: if there is no such folder.
    """

    def __init__(self, root: Path, outside: bool = False) -> None:
        if not root.is_dir():
            raise UserError(f"data.path: {root} is not a folder; give the folder that holds your images")
        self.root = root
        self.images: list[tuple[str, os.stat_result]] = []
        self.tables_found: list[str] = []
        self.near: list[str] = []  # that look like tables, and are not read
        self.archives: list[str] = []
        self.rejected: list[Rejection] = []
        texts: dict[str, dict[str, str]] = {suffix: {} for suffix in SIDECARS}
        for path, status in _walk(root, root, set(), outside):
            name = path.relative_to(root).as_posix()
            suffix = path.suffix.lower()
            if status is None:
                self.rejected.append(Rejection(name, "link leads out", "of the folder; set data.outside=true to follow it"))
            elif not is_text(name):
                self.rejected.append(Rejection(os.fsencode(name).decode("utf-8", "backslashreplace"), "name not UTF-8"))
            elif is_table(path.name):
                self.tables_found.append(name)
            elif suffix in SUFFIXES:
                self.images.append((name, status))
            elif suffix in OTHER_IMAGES:
                self.rejected.append(Rejection(name, "format not supported", f"{suffix}; convert it to one of {', '.join(FORMATS)}"))
            elif suffix in texts:
                texts[suffix][split(name)[0]] = name
            elif suffix.startswith(NEAR):
                self.near.append(name)
            elif suffix in ARCHIVES:
                self.archives.append(name)
        self.images.sort()
        self._texts = [Names(found) for found in texts.values()]

    def tables(self, source: FolderSource) -> CaptionTable:
        """What the tables say, where they are asked for.

        Raises:
            UserError: if one cannot be understood.
        """
        asked = source.captions in ("auto", "metadata")
        return read_tables(self.root, sorted(self.tables_found), [name for name, _ in self.images]) if asked else CaptionTable()

    def views(self, source: FolderSource, table: CaptionTable) -> FolderViews:
        """Maps and annotations among the files and in tables.

        Raises:
            UserError: for what the source names and is not there.
        """
        names = [name for name, _ in self.images]

        def captioned(name: str) -> bool:
            return bool(table.captions.get(name) or self.text_of(name))

        alike = bool(source.caption) or source.captions in ("filename", "none")
        return find_views(self.root, names, source.views, source.layout, table.views, None if alike else captioned)

    def text_of(self, name: str) -> str | None:
        """The text file beside an image, in letters of any case."""
        stem = split(name)[0]
        return next((found for texts in self._texts if (found := texts.find(stem))), None)


def scan(found: Listing, source: FolderSource, table: CaptionTable, views: FolderViews) -> tuple[list[_Entry], list[Rejection]]:
    """Usable images sorted by name, and everything rejected; headers are checked in threads, and files that are new here are hashed."""
    rejected = [*found.rejected, *(Rejection(*row) for row in table.rejected)]
    rejected += [Rejection(name, "listed but missing") for name in sorted(set(table.absent))]
    names = [name for name, _ in found.images if name not in views.files]
    side = side_pictures(names, (name for name in names if table.captions.get(name) or found.text_of(name)))
    masks = {kept.of: name for name, kept in sorted(side.items(), reverse=True) if kept.kind == "mask" and kept.of}
    masks = masks if source.masks == "beside" else {}
    used = set(masks.values())
    rejected += [
        Rejection(name, "side picture", f"a {kept.kind}" + f" of {kept.of}" * bool(kept.of))
        for name, kept in side.items()
        if name not in used
    ]

    hashes = ContentHashes(found.root)

    def look(item: tuple[str, os.stat_result]) -> _Entry:
        name, status = item
        captions: tuple[str, ...] = ()
        words: Mapping[str, View] = {}
        content = ""
        rejection = None
        told, size, times = table.known.get(name, Known()), (0, 0), 1
        path = found.root / name
        try:
            if source.captions == "kohya":
                times = _times(name)
            captions = tuple(affixed(said, source.prefix, source.suffix) for said in _captions(found, name, source, table))
            size = probe(path, source.max_pixels)
            told = told.over(Known(*size))
            size = (size[0], size[1] // 2) if source.layout == "ab" else size
            words = views.entries(name, size)
            if min(size) < source.min_side:
                raise Rejected("too small", f"{size[1]}x{size[0]}; at least {source.min_side} px")
            content = hashes.of(path, name, status)
            if mask := masks.get(name, ""):
                content += hashes.of(found.root / mask, mask, (found.root / mask).stat())
        except Rejected as error:
            rejection = Rejection(name, error.reason, error.detail)
        except OSError as error:
            rejection = Rejection(name, "unreadable file", str(error.strerror))
        return _Entry(name, content, captions, told, size, times, rejection, masks.get(name, ""), words)

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        looked = list(pool.map(look, (item for item in found.images if item[0] not in side and item[0] not in views.files)))
    hashes.save([*(e.name for e in looked), *used])
    rejected += [e.rejection for e in looked if e.rejection is not None]
    return [e for e in looked if e.rejection is None], rejected


def _captions(found: Listing, name: str, source: FolderSource, table: CaptionTable) -> tuple[str, ...]:
    if source.caption or source.captions == "none":
        return (source.caption,)
    said: tuple[str, ...] = ()
    if source.captions in ("auto", "metadata"):
        said = tuple(table.captions.get(name, ()))
    if not said and source.captions in ("auto", "txt", "kohya") and (text := found.text_of(name)):
        said = sidecar(found.root / text)
    if not said and source.captions in ("auto", "metadata"):
        said = tuple(table.spare.get(name, ()))
    if not said and source.captions == "kohya" and (folder := from_folder(name)):
        said = (folder[1],)
    if source.captions == "filename":
        said = from_name(Path(name))
    if not said:
        raise Rejected("no caption")
    return said


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


def _walk(root: Path, folder: Path, visited: set[tuple[int, int]], outside: bool) -> Iterator[tuple[Path, os.stat_result | None]]:
    """Every file below a folder, links followed once, hidden and __MACOSX ones left out; None for a link that leads out."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda e: e.name)
    for entry in entries:
        if hidden(entry.name):
            continue
        try:
            if entry.is_symlink() and not outside and leads_out(entry.path, root):
                yield folder / entry.name, None
            elif entry.is_dir():
                yield from _walk(root, folder / entry.name, visited, outside)
            elif entry.is_file():
                yield folder / entry.name, entry.stat()
        except OSError:  # a folder that may not be read, or a file that has just gone
            _log.warning("%s cannot be read", entry.path)


def _refuse_empty(found: Listing, source: FolderSource, usable: int, rejected: list[Rejection], table: CaptionTable) -> None:
    root, counts = found.root, Counter(r.reason for r in rejected)
    if usable == 0 and not rejected:
        if packed := found.archives:
            raise UserError(f"{root}: no images here, but {len(packed)} archives ({packed[0]}); {how_to_unpack(packed[0])}")
        raise UserError(f"{root}: no images here; put {', '.join(FORMATS)} files into it or correct data.path")
    uncaptioned = counts["no caption"] + counts["empty caption"]
    if usable == 0 and uncaptioned:
        near = f"; {found.near[0]} lies there, and a table is read under the name {_nearest(found.near[0])}" if found.near else ""
        raise UserError(
            f"{root}: {uncaptioned} images but no captions (data.captions={source.captions}); "
            + (table.unmatched + "; correct it, or " if table.unmatched else "")
            + f"write x{SIDECARS[0]} beside each x.jpg, or a {TABLES[0]} with file_name and text, or set data.captions=filename,"
            f" or kohya for folders such as '10_sks dog'{near}"
        )
    first = f"the first is {rejected[0]}" if rejected else ""
    if usable == 0:
        raise UserError(f"{root}: no usable image ({counted(counts)}); {first}")
    refuse_bad(str(root), usable, counts, first, source.max_bad)


_UNPACK = {".gz": "gunzip -c", ".tgz": "gunzip -c", ".xz": "xz -dc", ".bz2": "bunzip2 -c", ".zst": "zstd -dc"}


def how_to_unpack(archive: str) -> str:
    """What to do with an archive that lies where a folder of pictures or of plain .tar shards is wanted."""
    stem, suffix = split(archive)
    if suffix == ".tar":
        return "a folder of .tar shards is data.kind=shards"
    if suffix not in _UNPACK:
        return "unpack it to a folder of pictures first"
    plain = stem if stem.lower().endswith(".tar") else f"{stem}.tar"
    return f"unpack it: {_UNPACK[suffix]} {shlex.quote(archive)} > {shlex.quote(plain)}, which data.kind=shards reads"


def _nearest(name: str) -> str:
    suffix = next((s for s in (".jsonl", ".csv", ".tsv", ".parquet") if Path(name).suffix.lower().startswith(s)), ".jsonl")
    return f"metadata{suffix}"
