"""Indexes of shards as they were kept before format 3: one parquet file, whose samples are written anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ldm.config.schema import build
from ldm.data.index_file import DamagedIndex, Part, ShardRecord
from ldm.data.shard_reader import COLUMNS, shard_part
from ldm.data.tables import in_a_line, reading_errors

FORMAT = 2
_ROWS = 2**14  # that are in memory at a time


def is_one(place: Path) -> bool:
    """Whether a file is parquet."""
    try:
        with place.open("rb") as stream:
            return stream.read(4) == b"PAR1"
    except OSError:
        return False


def parts(place: Path) -> Iterator[Part]:
    """The samples of each shard; none where an even older version counted otherwise, so that the shards are read anew.

    Raises:
        DamagedIndex: if it is not whole, or samples lie outside their shards: it may be a stranger's, as they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(place, page_checksum_verification=True) as file:
            about = file.schema_arrow.metadata or {}
            if (form := about.get(b"ldm.format", b"")) != str(FORMAT).encode():
                if form.isdigit():
                    return
                raise DamagedIndex("of another format")
            shards = about[b"ldm.shards"]
            if hashlib.sha256(shards).hexdigest() != about[b"ldm.sum"].decode():
                raise DamagedIndex("its records are damaged")
            records = [build(entry, ShardRecord, "shard") for entry in json.loads(shards)]
            rest = pa.table({name: [] for name in ("shard", *COLUMNS)}, schema=file.schema_arrow.remove_metadata())
            batches = file.iter_batches(_ROWS, columns=["shard", *COLUMNS])
            for number, record in enumerate(records):
                while rest.num_rows < record.samples and (more := next(batches, None)) is not None:
                    rest = pa.concat_tables([rest, pa.Table.from_batches([more]).cast(rest.schema)])
                own, rest = rest.slice(0, record.samples), rest.slice(record.samples)
                yield _part(number, record, own)
            if rest.num_rows or next(batches, None) is not None:
                raise DamagedIndex("samples are missing")
    except DamagedIndex:
        raise
    except (KeyError, TypeError) as error:
        raise DamagedIndex(in_a_line(error)) from None
    except reading_errors() as error:
        raise DamagedIndex(in_a_line(error)) from None


def _part(number: int, record: ShardRecord, own: object) -> Part:
    columns = {name: own[name].to_pylist() for name in COLUMNS}  # type: ignore[index]
    if len(columns["key"]) != record.samples or set(own["shard"].to_pylist()) - {number}:  # type: ignore[index]
        raise DamagedIndex("samples are missing")
    start, size = (np.array(columns[name], np.int64) for name in ("offset", "size"))
    if (start < 0).any() or (size < 0).any() or (size > record.bytes).any() or (start > record.bytes - size).any():
        raise DamagedIndex("samples lie outside their shards")
    if not all(columns["captions"]):
        raise DamagedIndex("samples have no captions")
    return shard_part(record, columns)
