"""The index of tar shards: one pass finds each sample, one parquet file keeps where its bytes lie, with hashes and captions."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.storage import find, is_url, stat

if TYPE_CHECKING:
    import pyarrow as pa
import re
from collections import Counter, defaultdict
from typing import BinaryIO

from ldm.data import tables
from ldm.data.captions import MAX_SIDECAR_BYTES, caption_texts, clean, text_captions
from ldm.data.content import cache_folder
from ldm.data.fields import ALIASES, Known, column_of, known
from ldm.data.file_names import hidden, is_text, printable, side_pictures, split
from ldm.data.folder import OTHER_IMAGES, SUFFIXES, how_to_unpack
from ldm.data.images import FORMATS, MAX_BYTES, Rejected, probe
from ldm.data.storage import Stat, stream
from ldm.data.tables import in_a_line
from ldm.data.tar import Damage, Member, members

EXAMPLES = 20  # rejections that a record names
TEXTS = (".txt", ".caption")


@dataclass
class ShardRecord:
    """Shard record: checksum, counts, rejections and damage of one shard."""

    name: str  # relative to the index's root
    bytes: int
    mtime_ns: int
    sha256: str
    samples: int = 0
    listed: int | None = None  # samples that the files beside it promise; None: there are none
    rejected: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)  # key, reason, detail
    damage: list[str] = field(default_factory=list)  # places where the archive is not as it was written
    other: dict[str, int] = field(default_factory=dict)  # members that mean nothing here, by suffix


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
    columns: dict[str, list[Any]] = {c: [] for c in _COLUMNS}
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
        for column, value in zip(_COLUMNS, row, strict=True):
            columns[column].append(value)
    record.samples = len(columns["key"])
    record.rejected = dict(Counter(reason for _, reason, _ in rejected))
    record.examples = [[clean(k)[:200], reason, printable(detail)[:300]] for k, reason, detail in rejected[:EXAMPLES]]
    return record, columns


_COLUMNS = ("key", "offset", "size", "hash", "height", "width", "original_height", "original_width", "aesthetic", "watermark", "captions")


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
            group.size = probe(member.data, 2**62)
            group.hash = sample_hash(member.data)
            group.image = Member(member.name, member.offset, member.size, None)  # the bytes are not kept
        elif suffix in OTHER_IMAGES:
            raise Rejected("format not supported", f"{suffix}; convert it to one of {', '.join(FORMATS)}")
        elif suffix in TEXTS:
            if member.size > MAX_SIDECAR_BYTES or member.data is None:
                raise Rejected("caption too long", f"{suffix}: over {MAX_SIDECAR_BYTES} bytes")
            group.captions = text_captions(member.data, suffix)
        elif member.data is not None and member.size <= MAX_SIDECAR_BYTES:
            told = json.loads(member.data)
            group.table = told if isinstance(told, dict) else {}
    except Rejected as error:
        group.problem = group.problem or error
    except (ValueError, RecursionError):  # of the JSON, which a caption in a text file makes needless
        group.table = {}


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
    except (pa.ArrowException, OSError) as error:
        record.damage.append(f"the parquet file beside it cannot be read: {in_a_line(error)}")
    try:
        with stream(f"{stem}_stats.json") as raw:
            record.listed = int(json.loads(raw.read(2**20))["successes"])
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, OSError) as error:
        record.damage.append(f"the statistics beside it cannot be read: {type(error).__name__}: {error}")
    return told


NAME = "ldm-index.parquet"
FORMAT = 2
READERS = 4  # shards that are read at once
SAVE_S = 120.0  # what was read is kept at least so often

_log = logging.getLogger(__name__)


@dataclass
class Index:
    """Shard index: the samples of some shards, in the shards' order and in each by offset."""

    root: str  # folder or URL that the shards' names are relative to
    shards: list[ShardRecord] = field(default_factory=list)
    table: pa.Table | None = None  # the columns of `schema`; `shard` counts in `shards`

    def __len__(self) -> int:
        return 0 if self.table is None else self.table.num_rows

    def path(self, shard: int) -> str:
        """Of one shard."""
        return join(self.root, self.shards[shard].name)


def schema() -> pa.Schema:
    """Arrow schema of an index."""
    import pyarrow as pa

    return pa.schema(
        [
            ("shard", pa.int32()),
            ("key", pa.large_string()),
            ("offset", pa.int64()),
            ("size", pa.int64()),
            ("hash", pa.uint64()),
            ("height", pa.int32()),
            ("width", pa.int32()),  # px as stored, by the header
            ("original_height", pa.int32()),
            ("original_width", pa.int32()),  # 0: unknown
            ("aesthetic", pa.float32()),
            ("watermark", pa.float32()),  # NaN: unknown
            ("captions", pa.large_list(pa.large_string())),
        ]
    )


def join(root: str, name: str) -> str:
    """A shard's path or URL."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


def common_root(names: Sequence[str]) -> str:
    """The folder or URL that all names lie below."""
    folders = [name.rpartition("/")[0] if is_url(name) else os.path.dirname(os.path.abspath(name)) for name in names]
    if not is_url(names[0]):
        return os.path.commonpath(folders)
    parts = [folder.split("/") for folder in folders]
    same = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))
    return "/".join(parts[0][:same])


def place_of(root: str) -> Path:
    """Where the index of a root lies: beside the shards, or in the cache ($LDM_CACHE, ~/.cache/ldm) where that cannot be written."""
    beside = Path(root) / NAME
    if not is_url(root) and (beside.exists() or os.access(root, os.W_OK)):
        return beside
    return cache_folder() / f"index-{hashlib.blake2b(root.encode(), digest_size=12).hexdigest()}.parquet"


def open_index(
    path: str,
    *,
    renew: bool = False,
    verify: bool = False,
    file: Path | None = None,
    outside: bool = False,
    on_shard: Callable[[ShardRecord, int, int], None] | None = None,
) -> Index:
    """Open or build the index of the shards that `path` means; shards that are not in it yet are read and added.

    Args:
        path: as `ldm.data.storage.find` takes it.
        renew: read shards that have changed anew; if not, they are refused.
        verify: read all shards, and refuse one whose hash is not the index's.
        file: where the index is kept; None: as `place_of` says.
        outside: follow links in a folder that lead out of it.
        on_shard: called with each shard that was read, its number and how many there are to read.

    Raises:
        UserError: for a shard that is missing, unreadable or changed, an index that is damaged, or a path without shards.
    """
    names = find(path, ".tar", outside)
    root = common_root(names)
    place = file or place_of(root)
    known, tables = _load(place, root)
    todo, chosen = [], []
    for name in names:
        short = name[len(root) :].lstrip("/") if is_url(name) else os.path.relpath(os.path.abspath(name), root)
        chosen.append(short)
        try:
            now = stat(name)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror or error}); restore it or leave it out of data.path") from None
        old = known.get(short)
        if old is None or verify or (renew and (old.bytes, old.mtime_ns) != (now.bytes, now.mtime_ns)):
            todo.append((short, now))
        elif old.bytes != now.bytes:
            raise UserError(
                f"{name}: {now.bytes} bytes, but {old.bytes} when it was indexed with {old.samples} samples; fetch it again if it is "
                f"damaged, or run `ldm data index {path}` if it was meant to change"
            )
    if todo:
        _read(root, place, todo, known, tables, verify and not renew, on_shard)
    return _choose(root, chosen, known, tables)


def _read(
    root: str, place: Path, todo: list[Any], known: dict[str, ShardRecord], tables: dict[str, pa.Table], verify: bool, on_shard: Any
) -> None:
    _log.info("%s: reading %d shards once; the index is kept in %s", root, len(todo), place)
    saved, unsaved = time.monotonic(), 0
    pool = ThreadPoolExecutor(READERS)
    try:
        running = [pool.submit(read_shard, join(root, short), short, now) for short, now in todo]
        for number, future in enumerate(as_completed(running), 1):
            record, columns = future.result()
            old = known.get(record.name)
            if verify and old is not None and old.sha256 != record.sha256:
                raise UserError(
                    f"{join(root, record.name)}: its bytes are not those that were indexed ({record.samples} samples now, "
                    f"{old.samples} then); fetch it again, or run `ldm data index` without --verify if it was meant to change"
                )
            known[record.name], unsaved = record, unsaved + 1
            tables[record.name] = _table(columns)
            if on_shard is not None:
                on_shard(record, number, len(todo))
            if time.monotonic() - saved > SAVE_S:
                _save(place, known, tables)
                saved, unsaved = time.monotonic(), 0
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if unsaved:
            _save(place, known, tables)


def _table(columns: dict[str, list[Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.table({"shard": [0] * len(columns["key"]), **columns}, schema=schema())


def _choose(root: str, names: list[str], known: dict[str, ShardRecord], tables: dict[str, pa.Table]) -> Index:
    import pyarrow as pa

    parts = []
    for number, name in enumerate(names):
        table = tables[name]
        parts.append(table.set_column(0, "shard", pa.array([number] * table.num_rows, pa.int32())))
    return Index(root, [known[name] for name in names], pa.concat_tables(parts).combine_chunks())


def _save(place: Path, known: dict[str, ShardRecord], tables: dict[str, pa.Table]) -> None:
    import pyarrow.parquet as pq

    names = sorted(known)
    table = _choose("", names, known, tables).table
    assert table is not None
    shards = json.dumps([asdict(known[name]) for name in names])
    about = {"ldm.format": str(FORMAT), "ldm.shards": shards, "ldm.sum": hashlib.sha256(shards.encode()).hexdigest()}
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(about), temporary, compression="zstd", write_page_checksum=True)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(place)
    except OSError as error:
        said = error.strerror or error
        raise UserError(f"{place}: the index cannot be written ({said}); make room, or set LDM_CACHE to another folder") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _load(place: Path, root: str) -> tuple[dict[str, ShardRecord], dict[str, pa.Table]]:
    if not place.exists():
        return {}, {}
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(place, page_checksum_verification=True) as file:
            about = file.schema_arrow.metadata or {}
            if (form := about.get(b"ldm.format", b"")) != str(FORMAT).encode():
                if form.isdigit():  # another version's, which counted otherwise
                    _log.info("%s: of format %s, not %d; the shards are read anew", place, form.decode(), FORMAT)
                    return {}, {}
                raise ValueError("of another format")
            shards = about[b"ldm.shards"]
            if hashlib.sha256(shards).hexdigest() != about[b"ldm.sum"].decode():
                raise ValueError("its records are damaged")
            table = file.read().replace_schema_metadata(None).cast(schema())
        records = [build(entry, ShardRecord, "shard") for entry in json.loads(shards)]
        counts = {row["values"]: row["counts"] for row in pc.value_counts(table["shard"]).to_pylist()}
        if any(counts.get(n, 0) != record.samples for n, record in enumerate(records)) or table.num_rows != sum(r.samples for r in records):
            raise ValueError("samples are missing")
        # It may be a stranger's, as the shards are.
        ends = np.array([record.bytes for record in records], np.int64)[table["shard"].to_numpy()]
        start, size = table["offset"].to_numpy(), table["size"].to_numpy()
        if (start < 0).any() or (size < 0).any() or (size > ends).any() or (start > ends - size).any():
            raise ValueError("samples lie outside their shards")
        if not pc.all(pc.greater(pc.list_value_length(table["captions"]), 0)).as_py() and table.num_rows:
            raise ValueError("samples have no captions")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: the index of {root} is damaged ({in_a_line(error)}); remove it, and it is built anew") from None
    tables, at = {}, 0
    for record in records:
        tables[record.name] = table.slice(at, record.samples)
        at += record.samples
    return {record.name: record for record in records}, tables
