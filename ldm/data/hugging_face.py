"""Hugging Face `datasets` source: a save_to_disk folder, parquet files of image bytes, or a hub name."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, PathGiven, Positive, PositiveFloat, config
from ldm.data.at_work import worked
from ldm.data.captions import COLUMNS, caption_texts
from ldm.data.content import content_hash
from ldm.data.dataset import Split
from ldm.data.fields import ALIASES, Known, column_of, gather, known
from ldm.data.file_names import is_side_column, leads_out
from ldm.data.images import FIRST, MAX_PIXELS, Rejected, header, read_file
from ldm.data.photos import LISTED, Photos, Rejection, counted, held_out, refuse_bad, remarks, tolerated
from ldm.data.storage import find
from ldm.data.tags import affixed

IMAGES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "picture", "bytes", "image_bytes")  # columns, if none says its type
THREADS, ROWS = 4, 128  # that look at headers; rows that one looks at together
_CELLS = 512  # of a column that are in memory at a time

_Header = tuple[int, int, str, str, bool]  # height and width px, path, content hash, whether it is several pictures


@config
class DatasetsSource:
    """Hugging Face data set of images and captions: save_to_disk, parquet of bytes, or the hub."""

    kind: Literal["datasets"] = "datasets"
    path: PathGiven  # a folder of save_to_disk, a .parquet file or a folder of them; with hub=true a name on the hub
    hub: bool = False  # whether `path` is a name on the hub, to be downloaded
    part: str = "train"  # which split of a data set that has several
    image: str | None = None  # the column of images; null: the one that holds images
    caption: str | None = None  # the column of captions; null: text, caption, prompt, ...
    prefix: str = ""  # before every caption, such as "sks style,"
    suffix: str = ""  # behind every caption
    val_share: Fraction = 0.02  # share held out by a hash of the image's path, or of the row; at least one of several; 0: none
    min_side: Count = 32  # px; images with a shorter side are left out
    max_pixels: Positive = MAX_PIXELS  # images with more are left out; guards the memory
    crop: Literal["random", "centre"] = "random"  # where the training square lies; held-out images use the centre
    masks: Literal["none", "alpha"] = "none"  # how much each pixel counts, for masked_loss; alpha: by the picture's opacity
    max_bad: Fraction = 0.1  # share of unusable rows above which the run stops; ten are always tolerated
    max_seconds: PositiveFloat = 20.0  # for reading and decoding one image; a slower one is replaced by the next
    outside: bool = False  # also read files outside the data set that links lead to or rows name

    def build(self, split: Split) -> DatasetsData:
        """The training or the held-out part.

        Raises:
            UserError: if there is no such data set, it has no column of images or captions, or too many rows are bad.
        """
        return DatasetsData(self, split)


class DatasetsData(Photos):
    """A split of a `datasets` table, in the order of its rows; pixels stay in the mapped file until they are read."""

    def __init__(self, source: DatasetsSource, split: Split) -> None:
        self.source = source
        table = open_table(source)
        self._roots = _roots(source)
        names = list(table.column_names)
        self.image_column = _image_column(table, source)
        self.caption_column = _caption_column(names, source)
        self._table = table.with_format("arrow")
        before, behind = source.prefix, source.suffix
        captions = [tuple(affixed(said, before, behind) for said in caption_texts(value)) for value in self._cells(self.caption_column)]
        wanted = [c for c in names if c.lower() in {a for n in ("width", "height", "aesthetic", "watermark") for a in ALIASES[n]}]
        columns = {c: list(self._cells(c)) for c in wanted if c not in (self.image_column, self.caption_column)}
        told = [known(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)] or [Known()] * len(captions)
        looked = self._headers()
        self.rejected: list[Rejection] = []
        several: list[tuple[str, str, int]] = []
        usable: list[int] = []
        sizes: list[tuple[int, int]] = []
        places: list[str] = []
        contents: list[str] = []
        for row, (found, texts) in enumerate(zip(looked, captions, strict=True)):
            if isinstance(found, Rejected):
                self.rejected.append(Rejection(f"row {row}", found.reason, found.detail))
            elif not texts:
                self.rejected.append(Rejection(f"row {row}", "no caption", f"column {self.caption_column}"))
            else:
                height, width, path, content, more = found
                several += [(FIRST, f"row {row}", 1)] if more else []
                contents.append(content)
                told[row] = told[row].over(Known(height, width))
                usable.append(row)
                sizes.append((height, width))
                places.append(path or str(row))
        self.total, self.notes = len(usable), remarks(several)
        super().__init__(source.path, source, split, tolerated(source.max_bad, self.total + len(self.rejected)))
        self._refuse_empty()
        mine = held_out(places, source.val_share) == (split == "val")
        self._rows: list[int] = np.asarray(usable)[mine].tolist()
        self._sizes = np.asarray(sizes, np.int32)[mine]
        self._captions, self._fields = [captions[row] for row in self._rows], gather([told[row] for row in self._rows])
        self._contents = [content for content, here in zip(contents, mine, strict=True) if here]
        view_options = (split, source.val_share, source.crop, source.min_side, source.max_pixels, self.image_column, self.caption_column)
        # Not the library's own hash of the table, which follows the files' places and times.
        digest = hashlib.sha256(json.dumps(["datasets", 2, *view_options, source.masks]).encode())
        for content, said in zip(self._contents, self._captions, strict=True):
            digest.update(json.dumps([content, said]).encode())
        self._fingerprint = digest.hexdigest()

    def _cells(self, name: str) -> Iterator[Any]:
        column = self._table.select_columns([name])
        for start in range(0, len(column), _CELLS):
            yield from column[start : start + _CELLS][name].to_pylist()

    def _headers(self) -> list[_Header | Rejected]:
        """Height, width by its header, path, content hash, and whether it is several pictures, of every image."""

        def look(start: int) -> list[_Header | Rejected]:
            column = self._table[start : start + ROWS][self.image_column]
            return [self._header(entry) for entry in column]

        return [found for part in worked(look, range(0, len(self._table), ROWS), THREADS) for found in part]

    def _header(self, entry: Any) -> _Header | Rejected:
        try:
            data, path = self._bytes(entry)
            head = header(data, self.source.max_pixels)
            if min(head.height, head.width) < self.source.min_side:
                raise Rejected("too small", f"{head.width}x{head.height}; at least {self.source.min_side} px")
        except Rejected as error:
            return error
        return head.height, head.width, path, content_hash(data), head.several

    def _bytes(self, entry: Any) -> tuple[bytes, str]:
        return _bytes(entry, self._roots, self.source.outside)

    def _refuse_empty(self) -> None:
        counts = Counter(r.reason for r in self.rejected)
        first = f"the first is {self.rejected[0]}" if self.rejected else ""
        if not self.total:
            raise UserError(
                f"{self.where}: {plural(self.total, 'usable row')} of {len(self._table)} ({counted(counts)}); {first or 'it is empty'}"
            )
        refuse_bad(self.where, self.total, counts, first, self.source.max_bad)

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The row."""
        return f"row {self._rows[index]}"

    def read(self, index: int) -> bytes:
        """As `Photos.read`."""
        return self._bytes(self._table[self._rows[index]][self.image_column][0])[0]

    def describe(self) -> dict[str, object]:
        """Counts, columns, rejections by reason with the first few rows, and the fingerprint."""
        return {
            "kind": "datasets",
            "path": self.where,
            "split": self.split,
            "images": len(self),
            "images_in_both_parts": self.total,
            "captions": sum(map(len, self._captions)),
            "columns": {"image": self.image_column, "caption": self.caption_column},
            "rejected": dict(Counter(r.reason for r in self.rejected)),
            "notes": self.notes,
            "rejected_rows": [str(r) for r in self.rejected[:LISTED]],
            "replaced_when_decoded": dict(sorted(self.replaced.items())[:LISTED]),
            "fingerprint": self.fingerprint(),
        }


def _roots(source: DatasetsSource) -> tuple[Path, ...]:
    """The folders that rows may name files in: the data set's own, or where the library keeps what it gets from the hub."""
    if source.hub:
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)
    place = Path(source.path)
    return (place if place.is_dir() else Path(os.path.commonpath([os.path.dirname(f) for f in _files(source)])),)


def _files(source: DatasetsSource) -> list[str]:
    return [str(Path(p).absolute()) for p in find(source.path, ".parquet", source.outside)]


def _check_saved(place: Path) -> None:
    """Refuse a folder of save_to_disk whose records name files outside it."""
    for record in (place / "dataset_dict.json", place / "state.json"):
        try:
            said = json.loads(record.read_bytes())
        except FileNotFoundError:
            continue
        parts = said.get("splits") or [] if isinstance(said, dict) else []
        files = said.get("_data_files") or [] if isinstance(said, dict) else []
        for part in [*parts, *(file.get("filename") if isinstance(file, dict) else "" for file in files)]:
            if not isinstance(part, str) or leads_out(place / part, place):
                raise UserError(f"data.path: {record} names {part!r}, which leads out of the folder; set data.outside=true to read it")
        for part in parts:
            _check_saved(place / part)


def _bytes(entry: Any, roots: tuple[Path, ...], outside: bool) -> tuple[bytes, str]:
    """An image's bytes and its path, if it has one, of a cell: bytes, or bytes and path, of which one may be missing.

    Args:
        roots: the folders that a path may lie in, the first of which it is relative to.
        outside: it may lie anywhere.

    Raises:
        Rejected: if there are none, or they lie elsewhere.
    """
    value = entry.as_py()
    if isinstance(value, bytes):
        return value, ""
    if not isinstance(value, dict):
        raise Rejected("no image", "an empty cell" if value is None else type(value).__name__)
    path = str(value.get("path") or "")
    if isinstance(value.get("bytes"), bytes):
        return value["bytes"], path
    place = roots[0] / path
    if not outside and all(leads_out(place, root) for root in roots):
        raise Rejected("leads out of the data", f"{path}; set data.outside=true to read it")
    try:
        return read_file(place) if path else b"", path
    except (OSError, ValueError) as error:
        raise Rejected("unreadable file", f"{path}: {getattr(error, 'strerror', error)}") from None


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _is_whole(file: str) -> bool:
    """Whether a file's footer is parquet's."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        pq.ParquetFile(file).close()
    except (OSError, pyarrow.ArrowException):
        return False
    return True


def open_table(source: DatasetsSource) -> Any:
    """The `datasets.Dataset` that a source names.

    Raises:
        UserError: if there is none, or not the part that is asked for.
    """
    import datasets

    place, read = Path(source.path), list[str]()
    try:
        if source.hub:
            found = datasets.load_dataset(source.path)
        elif is_saved(place):
            if not source.outside:
                _check_saved(place)
            found = datasets.load_from_disk(source.path)
        elif place.exists() or "*" in source.path or "{" in source.path:
            read = _files(source)
            found = datasets.load_dataset("parquet", data_files=[glob.escape(file) for file in read], split="train")
        else:
            raise UserError(f"data.path: {source.path} does not exist; correct it, or set data.hub=true if it is a name on the hub")
    except UserError:
        raise
    except Exception as error:  # the library raises kinds of its own, of pyarrow's and of the hub's
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        lines = str(first).strip().splitlines() or [type(first).__name__]
        named = next((file for file in read if len(read) > 1 and not _is_whole(file)), source.path)
        raise UserError(f"data.path: {named} cannot be opened as a data set ({type(first).__name__}: {lines[-1][:300]})") from None
    if isinstance(found, dict):
        if source.part not in found:
            raise UserError(f"data.part: {source.path} has no {source.part!r}; it has {', '.join(map(str, found))}")
        found = found[source.part]
    return found


def _image_column(table: Any, source: DatasetsSource) -> str:
    import datasets

    names = list(table.column_names)
    if source.image is not None:
        if source.image not in names:
            raise UserError(f"data.image: no column {source.image!r}; there are {', '.join(names)}")
        return source.image
    typed = [name for name in names if isinstance(table.features[name], datasets.Image) and not is_side_column(name)]
    plain = [name for name in names if name.lower() in IMAGES]
    found = [name for name in typed if name in plain] or typed or plain
    if not found:
        raise UserError(f"{source.path}: no column of images; name it by data.image (there are {', '.join(names)})")
    if len(found) > 1 and found == typed:
        raise UserError(f"{source.path}: several columns of images ({', '.join(found)}); name the one to learn from by data.image")
    return found[0]


def _caption_column(names: list[str], source: DatasetsSource) -> str:
    if source.caption is not None:
        if source.caption not in names:
            raise UserError(f"data.caption: no column {source.caption!r}; there are {', '.join(names)}")
        return source.caption
    found = next((c for c in (*COLUMNS, column_of("caption", names), "txt") if c in names), None)
    if found is None:
        raise UserError(f"{source.path}: no column of captions; name it by data.caption (there are {', '.join(names)})")
    return found
