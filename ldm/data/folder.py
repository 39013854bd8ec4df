"""Image folder data set with captions: any sizes and modes, broken files rejected or replaced."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, PathGiven, Positive, PositiveFloat, config, refuse_unread
from ldm.data.caption_tables import TABLES, CaptionTable
from ldm.data.captions import SIDECARS
from ldm.data.content import ContentHashes
from ldm.data.dataset import Split
from ldm.data.fields import Fields
from ldm.data.file_names import FORMATS, split
from ldm.data.folder_scan import Listing, scan
from ldm.data.folder_views import MAPS, Layout, half
from ldm.data.images import MAX_PIXELS, Rejected, read_file
from ldm.data.kept import Kept, Repeated
from ldm.data.photos import LISTED, Photos, Rejection, counted, refuse_bad, tolerated
from ldm.data.view_files import tells
from ldm.data.views import ViewKind
from ldm.diffusion.batch import View


@config
class FolderSource:
    """Image folder: pictures below it, captioned by .txt files beside them, metadata.jsonl/csv/parquet or names."""

    kind: Literal["folder"] = "folder"
    path: PathGiven  # the folder; folders inside it are read too
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
        if self.caption and not self.caption.strip():
            raise UserError(f"caption: got {self.caption!r}, a text of blanks alone; set captions=none for no words, or leave it out")
        if self.caption and self.captions in ("txt", "filename", "none"):
            refuse_unread(self, ("captions",), "beside caption, which every picture has; leave one of the two out")

    def build(self, split: Split) -> FolderData:
        """The training or the held-out part.

        Raises:
            UserError: if the folder is missing, has no usable image or caption, or too many files are bad.
        """
        return FolderData(self, split)


class FolderData(Photos):
    """A split of an image folder, in the order of names.

    Headers are checked when it is built. A file that turns out damaged when it is decoded is replaced by the next
    usable one, so that every rank and every run agrees; it is logged once and counted.
    """

    def __init__(self, source: FolderSource, split: Split) -> None:
        self.source, self.root = source, Path(source.path)
        self._scan = scan(source, partial(_refuse_empty, source))
        self.found_views, self.rejected = self._scan.views, self._scan.rejected
        file, told = self._scan.file, self._scan.file.told
        self.tables: list[str] = told["tables"]
        self.total = len(file)  # usable images in both parts
        first = f"the first is {self.rejected[0]}" if self.rejected else ""
        refuse_bad(str(self.root), self.total, Counter(r.reason for r in self.rejected), first, source.max_bad)
        super().__init__(str(self.root), source, split, tolerated(source.max_bad, self.total + len(self.rejected)))
        rows = Kept(len(file), np.array(told["val"], np.int64), out=split == "train")
        self.distinct = len(rows)
        times = file.column("times")
        if split == "train" and times.max(initial=1) > 1:
            rows = Repeated(rows, times)
        self._rows = rows
        self._told: Mapping[str, Any] = told["parts"][split]
        self._fingerprint = str(self._told["fingerprint"])
        self._contents = _Contents(self)

    def __len__(self) -> int:
        return len(self._rows)

    def entry(self, index: int) -> list[str]:
        """A sample's name, hash, mask and captions."""
        return self._scan.entry(int(self._rows.rows(index)))

    def name(self, index: int) -> str:
        """The path below the folder."""
        return self.entry(index)[0]

    @property
    def names(self) -> list[str]:
        """Of all samples."""
        return [self.name(index) for index in range(len(self))]

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return [self.entry(int(i))[3:] for i in index]

    def _column(self, name: str) -> np.ndarray:
        return self._scan.file.column(name)[self._rows.rows()]

    def fields(self) -> Fields:
        """As `Photos.fields`."""
        sides = [self._column(f"original_{name}").astype(np.int32) for name in ("height", "width")]
        return Fields(sides[0], sides[1], self._column("aesthetic"), self._column("watermark"))

    def sizes(self) -> np.ndarray:
        """As `Photos.sizes`."""
        return np.stack([self._column(name).astype(np.int32) for name in ("height", "width")], 1)

    def read(self, index: int) -> bytes:
        """As `Photos.read`."""
        try:
            data = read_file(self.root / self.name(index))
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
                few = len(set(lacking))
                raise UserError(
                    f"view {name}: {few} of {plural(self.distinct, 'picture')} {'has' if few == 1 else 'have'} none, such as {lacking[0]};"
                    " add them, or set"
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
                raise UserError(f"view {name}: what is told of {plural(len(broken), 'picture')} cannot be read, such as {picture}: {why}")
            if self.split == "train" and name in self.found_views.words and not any(map(tells, self._words(name))):
                raise UserError(
                    f"view {name}: nothing is told of any of these {plural(self.distinct, 'picture')}; add some, or leave the view out"
                )
        if any(name in self.found_views.words for name in names):
            told = [self._scan.words.get(picture, {}) for picture in self.names]
            said = [[repr(words.get(name)) for name in names] for words in told]
            found._fingerprint = hashlib.sha256(json.dumps([found._fingerprint, said]).encode()).hexdigest()
        return found

    def read_view(self, index: int, name: str) -> bytes:
        """As `Photos.read_view`."""
        try:
            if self.source.layout == "ab":
                return half(read_file(self.root / self.name(index)), right=False)
            return read_file(self.root / self.found_views.maps[name][self.name(index)])
        except OSError as error:
            raise Rejected(f"unreadable {name}", str(error.strerror)) from None

    def words_of(self, index: int, name: str) -> View | None:
        """As `Photos.words_of`."""
        return self._scan.words.get(self.name(index), {}).get(name)

    def _words(self, name: str) -> list[View | None]:
        return [self.words_of(index, name) for index in range(len(self))]

    def read_mask(self, index: int) -> bytes | None:
        """As `Photos.read_mask`."""
        try:
            return read_file(self.root / name) if (name := self.entry(index)[2]) else None
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
            **{f"with_{name}": sum(picture in told for picture in set(self.names)) for name, told in self.found_views.maps.items()},
            **{f"with_{name}": sum(map(tells, self._words(name))) for name in self.found_views.words},
            **({"with_mask": self._told["masks"]} if self.source.masks == "beside" else {}),
            "captions": self._told["captions"],
            "captions_from": self.tables or self.source.captions,
            "rejected": dict(Counter(r.reason for r in self.rejected)),
            "rejected_files": [str(r) for r in self.rejected[:LISTED]],
            "notes": self._scan.file.told["notes"],
            "replaced_when_decoded": dict(sorted(self.replaced.items())[:LISTED]),
            "fingerprint": self.fingerprint(),
        }


class _Contents(Sequence[str]):
    """Hashes of a part's pictures, one at a time."""

    def __init__(self, data: FolderData) -> None:
        self._scan, self._rows = data._scan, data._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._scan.entry(int(self._rows.rows(index)))[1]


def _refuse_empty(source: FolderSource, found: Listing, usable: int, rejected: list[Rejection], table: CaptionTable) -> None:
    root, counts = found.root, Counter(r.reason for r in rejected)
    if usable == 0 and not rejected:
        if packed := found.archives:
            many = f"{len(packed)} archives" if packed[1:] else "an archive"
            raise UserError(f"{root}: no images here, but {many} ({packed[0]}); {how_to_unpack(packed[0])}")
        raise UserError(f"{root}: no images here; put {', '.join(FORMATS)} files into it or correct data.path")
    uncaptioned = counts["no caption"] + counts["empty caption"]
    if usable == 0 and uncaptioned:
        blank = counts["empty caption"]
        blank_of = next((one.name for one in rejected if one.reason == "empty caption"), "")
        near = f"; {found.near[0]} lies there, and a table is read under the name {_nearest(found.near[0])}" if found.near else ""
        raise UserError(
            f"{root}: {plural(uncaptioned, 'image')} but no captions (data.captions={source.captions}); "
            + (table.unmatched + "; correct it, or " if table.unmatched else "")
            + (f"{plural(blank, 'text file is', 'text files are')} empty, the first is that of {blank_of}; fill them, or " if blank else "")
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
