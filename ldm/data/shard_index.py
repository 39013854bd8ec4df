"""The index of tar shards: where each sample's bytes lie, their hashes, captions, sizes and scores, in one parquet file; built once."""

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

from ldm.config.errors import UserError
from ldm.data.shard_reader import ShardRecord, read_shard
from ldm.data.storage import find, is_url, stat

if TYPE_CHECKING:
    import pyarrow as pa

NAME = "ldm-index.parquet"
FORMAT = 1
READERS = 4  # shards that are read at once
SAVE_S = 120.0  # what was read is kept at least so often

_log = logging.getLogger(__name__)


@dataclass
class Index:
    """The samples of some shards, in the shards' order and in each by offset."""

    root: str  # folder or URL that the shards' names are relative to
    shards: list[ShardRecord] = field(default_factory=list)
    table: pa.Table | None = None  # the columns of `schema`; `shard` counts in `shards`

    def __len__(self) -> int:
        return 0 if self.table is None else self.table.num_rows

    def path(self, shard: int) -> str:
        """Of one shard."""
        return join(self.root, self.shards[shard].name)


def schema() -> pa.Schema:
    """The columns of an index."""
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
    cache = Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")
    return cache / f"index-{hashlib.blake2b(root.encode(), digest_size=12).hexdigest()}.parquet"


def open_index(
    path: str,
    *,
    renew: bool = False,
    verify: bool = False,
    file: Path | None = None,
    on_shard: Callable[[ShardRecord, int, int], None] | None = None,
) -> Index:
    """The index of the shards that `path` means; shards that are not in it yet are read and added.

    Args:
        path: as `ldm.data.storage.find` takes it.
        renew: read shards that have changed anew; if not, they are refused.
        verify: read all shards, and refuse one whose hash is not the index's.
        file: where the index is kept; None: as `place_of` says.
        on_shard: called with each shard that was read, its number and how many there are to read.

    Raises:
        UserError: for a shard that is missing, unreadable or changed, an index that is damaged, or a path without shards.
    """
    names = find(path, ".tar")
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
            if about.get(b"ldm.format") != str(FORMAT).encode():
                raise ValueError("of another format")
            shards = about[b"ldm.shards"]
            if hashlib.sha256(shards).hexdigest() != about[b"ldm.sum"].decode():
                raise ValueError("its records are damaged")
            table = file.read().replace_schema_metadata(None).cast(schema())
        records = [ShardRecord(**entry) for entry in json.loads(shards)]
        counts = {row["values"]: row["counts"] for row in pc.value_counts(table["shard"]).to_pylist()}
        if any(counts.get(n, 0) != record.samples for n, record in enumerate(records)) or table.num_rows != sum(r.samples for r in records):
            raise ValueError("samples are missing")
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: the index of {root} is damaged ({str(error)[:200]}); remove it, and it is built anew") from None
    tables, at = {}, 0
    for record in records:
        tables[record.name] = table.slice(at, record.samples)
        at += record.samples
    return {record.name: record for record in records}, tables
