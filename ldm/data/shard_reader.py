"""Reading of a tar shard: one pass finds each sample, where its bytes lie, its size, its captions, and what is wrong."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ldm.config.errors import UserError
from ldm.data import tables
from ldm.data.captions import MAX_SIDECAR_BYTES, caption_texts, clean, text_captions
from ldm.data.fields import ALIASES, Known, column_of, known
from ldm.data.file_names import FORMATS, SUFFIXES, hidden, is_text, printable, side_pictures, split
from ldm.data.folder import how_to_unpack
from ldm.data.folder_scan import OTHER_IMAGES
from ldm.data.images import FIRST, MAX_BYTES, Rejected, header
from ldm.data.index_file import Part, ShardRecord, part_of
from ldm.data.storage import Stat, stream
from ldm.data.tables import in_a_line
from ldm.data.tar import Damage, Member, members
from ldm.diffusion.rng import mix

EXAMPLES = 20  # rejections that a record names
TEXTS = (".txt", ".caption")


@dataclass
class _Group:
    """The members of one key."""

    suffixes: list[str] = field(default_factory=list)
    image: Member | None = None
    size: tuple[int, int] = (0, 0)
    hash: int = 0
    captions: tuple[str, ...] = ()
    table: dict[str, Any] = field(default_factory=dict)
    problem: Rejected | None = None  # of image or caption, the first
    remarks: list[str] = field(default_factory=list)  # what of it is not taken


def sample_hash(data: bytes) -> int:
    """Checksum of an image's bytes in the index (BLAKE2b, 64 bits)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class _Summed:
    """Stream that hashes its bytes as they are read."""

    def __init__(self, inner: BinaryIO) -> None:
        self._inner, self.sum, self.bytes = inner, hashlib.sha256(), 0

    def read(self, count: int = -1) -> bytes:
        """As a file's."""
        data = self._inner.read(count)
        self.sum.update(data)
        self.bytes += len(data)
        return data


def place_in_split(stem: str, key: str) -> int:
    """The 64 bits that decide to which part of a data set a sample belongs (`ldm.data.photos.held_out`)."""
    return mix("val", f"{stem}/{key}")


def shard_part(record: ShardRecord, columns: Mapping[str, Sequence[Any]]) -> Part:
    """What `read_shard` gives, ready to be written."""
    stem = Path(record.name).stem
    numbers = {name: np.array(columns[name], np.float32 if name in FLOATS else np.uint64) for name in COLUMNS if name not in _WORDS}
    numbers["split"] = np.array([place_in_split(stem, key) >> 32 for key in columns["key"]], np.uint64)
    record.captions = sum(map(len, columns["captions"]))
    return part_of(record, numbers, [(key, *captions) for key, captions in zip(columns["key"], columns["captions"], strict=True)])


def read_shard(path: str, name: str, now: Stat) -> tuple[ShardRecord, dict[str, list[Any]]]:
    """The record of a shard and the columns of its index, from one pass over it.

    Keys are member names up to their last dot, whatever their order; a key that stands for several samples is given up,
    since nothing says which picture belongs to which caption.

    Raises:
        UserError: if the shard cannot be read, or is compressed.
    """
    groups: dict[str, _Group] = defaultdict(_Group)
    other: Counter[str] = Counter()
    damage: list[str] = []
    rejected: list[tuple[str, str, str]] = []
    try:
        with stream(path) as raw:
            summed = _Summed(raw)
            first = summed.read(4)
            if first[:2] == b"\x1f\x8b" or first in (b"\x28\xb5\x2f\xfd", b"\xfd7zX") or first[:3] == b"BZh":
                raise UserError(f"{path}: a compressed archive has no addresses; {how_to_unpack(path)}")
            for found in members(_After(first, summed), MAX_BYTES):  # type: ignore[arg-type]
                if isinstance(found, Damage):
                    damage.append(printable(str(found)))
                elif isinstance(found, Member):
                    if hidden(found.name):
                        other["hidden"] += 1
                        continue
                    stem, suffix = split(found.name)
                    if suffix not in (*SUFFIXES, *OTHER_IMAGES, *TEXTS, ".json"):
                        other[printable(suffix) or "no suffix"] += 1
                        continue
                    _take(groups[stem], suffix, found)
                else:
                    rejected.append((found.name, "not a file", found.what))
            while summed.read(2**20):
                pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); restore it or leave it out of data.path") from None
    record = ShardRecord(name, summed.bytes, now.mtime_ns, summed.sum.hexdigest(), damage=damage, other=dict(other))
    listed = _beside(path, record)
    for key in sorted(set(listed) - set(groups)):
        rejected.append((key, "listed but missing", "in the parquet file beside the shard, not in the shard"))
    if record.listed is not None and not listed and len(groups) < record.listed:
        rejected += [("", "listed but missing", f"{len(groups)} of {record.listed} samples are there")] * (record.listed - len(groups))
    columns: dict[str, list[Any]] = {c: [] for c in COLUMNS}
    pictures = {group.image.name: key for key, group in groups.items() if group.image is not None}
    side = side_pictures(pictures, (name for name, key in pictures.items() if groups[key].captions))
    for name, kept in side.items():
        del groups[pictures[name]]
        rejected.append((pictures[name], "side picture", f"a {kept.kind}" + f" of {kept.of}" * bool(kept.of)))
    for key, group in sorted(groups.items(), key=lambda item: item[1].image.offset if item[1].image else -1):
        try:
            row = _row(key, group, listed.get(key, {}))
        except Rejected as error:
            rejected.append((key, error.reason, error.detail))
            continue
        for column, value in zip(COLUMNS, row, strict=True):
            columns[column].append(value)
        for what in group.remarks:
            named, count = record.remarks.get(what, (printable(key), 0))
            record.remarks[what] = named, count + 1
    record.samples = len(columns["key"])
    record.rejected = dict(Counter(reason for _, reason, _ in rejected))
    record.examples = [[clean(k)[:200], reason, printable(detail)[:300]] for k, reason, detail in rejected[:EXAMPLES]]
    return record, columns


FLOATS, _WORDS = ("aesthetic", "watermark"), ("key", "captions")
COLUMNS = ("key", "offset", "size", "hash", "height", "width", "original_height", "original_width", "aesthetic", "watermark", "captions")


class _After:
    """A stream with its first bytes put back."""

    def __init__(self, first: bytes, rest: _Summed) -> None:
        self._first, self._rest = first, rest

    def read(self, count: int) -> bytes:
        """As a file's."""
        if self._first:
            data, self._first = self._first[:count], self._first[count:]
            return data
        return self._rest.read(count)


def _take(group: _Group, suffix: str, member: Member) -> None:
    group.suffixes.append(suffix)
    try:
        if suffix in SUFFIXES:
            group.image = member
            if member.data is None:
                raise Rejected("file too large", f"{member.size} bytes; at most {MAX_BYTES}")
            head = header(member.data, 2**62)
            group.size = head.height, head.width
            group.remarks += [FIRST] if head.several else []
            group.hash = sample_hash(member.data)
            group.image = Member(member.name, member.offset, member.size, None)  # the bytes are not kept
        elif suffix in OTHER_IMAGES:
            raise Rejected("format not supported", f"{suffix}; convert it to one of {', '.join(FORMATS)}")
        elif suffix in TEXTS:
            if member.size > MAX_SIDECAR_BYTES or member.data is None:
                raise Rejected("caption too long", f"{suffix}: over {MAX_SIDECAR_BYTES} bytes")
            said = text_captions(member.data, suffix)
            group.captions = said if suffix == TEXTS[0] or not group.captions else group.captions  # as in folders, in any order of members
        elif member.data is None or member.size > MAX_SIDECAR_BYTES:
            group.remarks.append(f"a JSON file of over {MAX_SIDECAR_BYTES} bytes, which is not read")
        else:
            group.table = _object(member.data, group)
    except Rejected as error:
        group.problem = group.problem or error


def _object(data: bytes, group: _Group) -> dict[str, Any]:
    """What a JSON file tells of its picture; one that cannot be read is told, as a caption in a text file may make it needless."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        group.remarks.append("a JSON file that cannot be read, so nothing of it is taken")
        return {}
    if not isinstance(told, dict):
        group.remarks.append(f"a JSON file that holds no object but a {type(told).__name__}, so nothing of it is taken")
        return {}
    return told


def _row(key: str, group: _Group, listed: dict[str, Any]) -> tuple[Any, ...]:
    twice = [suffix for suffix, count in Counter(group.suffixes).items() if count > 1]
    if twice:
        raise Rejected("duplicate key", f"{len(group.suffixes)} members, {', '.join(twice)} more than once")
    if sum(suffix in SUFFIXES for suffix in group.suffixes) > 1:
        raise Rejected("duplicate key", f"several images: {', '.join(sorted(group.suffixes))}")
    if group.problem is not None:
        raise group.problem
    if group.image is None:
        raise Rejected("no image", f"only {', '.join(sorted(group.suffixes))}")
    table = listed | {k: v for k, v in group.table.items() if v is not None}
    captions = group.captions or caption_texts(table.get(column_of("caption", table) or ""))
    if not captions:
        raise Rejected("no caption", f"only {', '.join(sorted(group.suffixes))}")
    told = known(table)
    if "original_width" not in table:  # width and height are then those of the file that lies here
        told = Known(*group.size, told.aesthetic, told.watermark)
    return (
        clean(key) if not is_text(key) else key,
        group.image.offset,
        group.image.size,
        group.hash,
        *group.size,
        told.height,
        told.width,
        told.aesthetic,
        told.watermark,
        list(captions),
    )


def _beside(path: str, record: ShardRecord) -> dict[str, dict[str, Any]]:
    """Rows of img2dataset's parquet file beside a shard, by key, and how many samples were promised."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stem = re.sub(r"\.tar$", "", path)
    wanted = {alias for name in ("caption", "width", "height", "aesthetic", "watermark") for alias in ALIASES[name]} | {"key", "status"}
    told: dict[str, dict[str, Any]] = {}
    try:
        with stream(f"{stem}.parquet") as raw, pq.ParquetFile(pa.BufferReader(raw.read())) as file:
            names = [c for c in file.schema_arrow.names if c.lower() in wanted]
            if "key" in names:
                for row in tables.rows(file, names):
                    if row.get("status", "success") == "success" and row["key"] is not None:
                        told[str(row.pop("key"))] = {k: v for k, v in row.items() if k != "status" and v is not None}
                record.listed = len(told)
                return told
    except FileNotFoundError:
        pass
    except tables.reading_errors() as error:
        record.damage.append(f"the parquet file beside it cannot be read: {in_a_line(error)}")
    try:
        with stream(f"{stem}_stats.json") as raw:
            record.listed = int(json.loads(raw.read(2**20))["successes"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, OSError) as error:
        record.damage.append(f"the statistics beside it cannot be read: {type(error).__name__}: {error}")
    return told
