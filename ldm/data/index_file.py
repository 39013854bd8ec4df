"""The file of an index of samples: columns of fixed width and texts, mapped into memory, so that all processes of a machine share one copy.

    magic, columns one after another, texts, footer (JSON), its length and SHA-256 sum, magic

A column has the narrowest type that holds its values; one whose values are all equal, or equal another column's, takes no room.
The text of a sample is a JSON list of words (its key, its captions) behind a CRC-32 sum of its whole row, which is compared when it is
read. The columns that decide what is a sample at all are compared with sums of their own when the file is opened.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ldm.config.schema import adapter

FORMAT = 3
MAGIC = b"ldm-index\n" + bytes([0, 0, 0, 0, 0, FORMAT])
TEXT = "text"  # the column of where a row's text begins, behind the first of its record
DECIDING = ("split", "height", "width")
SAME = {"original_height": "height", "original_width": "width"}  # columns that often equal another
_ALIGNED = 64
_TAIL = 8 + 32 + len(MAGIC)


@dataclass
class ShardRecord:
    """Shard record: checksum, counts, rejections and damage of one shard."""

    name: str  # relative to the index's root
    bytes: int
    mtime_ns: int
    sha256: str
    samples: int = 0
    captions: int = 0
    listed: int | None = None  # samples that the files beside it promise; None: there are none
    rejected: dict[str, int] = field(default_factory=dict)
    examples: list[list[str]] = field(default_factory=list)  # key, reason, detail
    damage: list[str] = field(default_factory=list)  # places where the archive is not as it was written
    other: dict[str, int] = field(default_factory=dict)  # members that mean nothing here, by suffix
    remarks: dict[str, tuple[str, int]] = field(default_factory=dict)  # what of usable samples is not taken: the first key, how many


class DamagedIndex(ValueError):
    """An index file that is not as it was written."""


@dataclass(frozen=True)
class Part:
    """Samples from one place, as they are written: a record of it, a column of numbers for each name, and the rows' texts."""

    record: ShardRecord
    columns: Mapping[str, NDArray[Any]]
    texts: bytes


def part_of(record: ShardRecord, columns: Mapping[str, NDArray[Any]], words: Sequence[Sequence[str]]) -> Part:
    """Rows, ready to be written.

    Args:
        columns: (N,) numbers, whole ones or float32, of each name.
        words: of each row.
    """
    rows = np.zeros(len(words), _packed(columns))
    for name, values in columns.items():
        rows[name] = values
        if rows[name].dtype.kind == "f":
            rows[name][np.isnan(rows[name])] = np.nan  # one pattern of bits
    texts, starts = bytearray(), []
    for n, row in enumerate(words):
        text = json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode()
        starts.append(len(texts))
        texts += zlib.crc32(text, zlib.crc32(rows[n].tobytes())).to_bytes(4, "little") + text
    return Part(record, {name: rows[name] for name in columns} | {TEXT: np.array(starts, np.uint64)}, bytes(texts))


def _packed(columns: Mapping[str, NDArray[Any]]) -> np.dtype[Any]:
    """A row of numbers as it is summed."""
    return np.dtype([(name, "<f4" if columns[name].dtype.kind == "f" else "<u8") for name in sorted(columns) if name != TEXT])


class IndexFile:
    """Index file, mapped into memory.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be read.
        DamagedIndex: if it is not whole, or its deciding columns are not as they were written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < len(MAGIC) + _TAIL:
                raise DamagedIndex("it is cut off")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._open()
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            said = str(error) if isinstance(error, DamagedIndex) else "its footer cannot be understood"
            raise DamagedIndex(said) from None

    def __reduce__(self) -> tuple[type[IndexFile], tuple[Path]]:
        return IndexFile, (self.path,)  # another process maps it anew

    def _open(self) -> None:
        size = len(self._map)
        if self._map[: len(MAGIC)] != MAGIC or self._map[-len(MAGIC) :] != MAGIC:
            raise DamagedIndex("its ends are not an index's")
        length = int.from_bytes(self._map[size - _TAIL : size - _TAIL + 8], "little")
        if length > size - _TAIL - len(MAGIC):
            raise DamagedIndex("it is cut off")
        footer = self._map[size - _TAIL - length : size - _TAIL]
        if hashlib.sha256(footer).digest() != self._map[size - _TAIL + 8 : size - len(MAGIC)]:
            raise DamagedIndex("its footer's sum does not fit")
        told = json.loads(footer)
        self.records: list[ShardRecord] = adapter(cast("type", list[ShardRecord])).validate_python(told["shards"])
        self.starts = np.concatenate([[0], np.cumsum([record.samples for record in self.records])]).astype(np.int64)
        self.texts = np.concatenate([[0], np.cumsum(told["texts"])]).astype(np.int64)  # first byte of each shard's texts
        self.told: dict[str, Any] = dict(told["told"])
        self.about: dict[str, dict[str, Any]] = {str(name): dict(each) for name, each in told["columns"].items()}
        self._texts_at = int(told["texts_at"])
        within = size - _TAIL - length
        lengths = (*told["texts"], *(record.samples for record in self.records))
        if len(self.texts) != len(self.starts) or min(lengths, default=0) < 0 or not 0 <= self._texts_at <= within - int(self.texts[-1]):
            raise DamagedIndex("samples are missing")
        self._columns = {name: self._mapped(each, within) for name, each in self.about.items() if "same" not in each}
        self._columns |= {name: self._columns[str(each["same"])] for name, each in self.about.items() if "same" in each}
        self._row = _packed(self._columns)
        for name, each in self.about.items():
            if "crc" in each and zlib.crc32(self._columns[name].data) != each["crc"]:
                raise DamagedIndex(f"the sum of its column {name} does not fit")

    def _mapped(self, told: Mapping[str, Any], within: int) -> NDArray[Any]:
        kind, count = np.dtype(str(told["dtype"])), int(self.starts[-1])
        if kind.kind not in "uf" or kind.itemsize > 8:
            raise DamagedIndex("a column is of another type")
        if "value" in told:
            one = np.frombuffer(bytes.fromhex(told["value"]), kind)
            return np.broadcast_to(one[0] if count else one[:0], (count,))
        at = int(told["at"])
        if at < 0 or at + count * kind.itemsize > within:
            raise DamagedIndex("samples are missing")
        return np.frombuffer(self._map, kind, count, at)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def row_bytes(self) -> int:
        """Of the columns, a sample."""
        return sum(np.dtype(told["dtype"]).itemsize for told in self.about.values() if "at" in told)

    def column(self, name: str) -> NDArray[Any]:
        """A column of all rows (N,), mapped."""
        return self._columns[name]

    def part(self, number: int) -> Part:
        """The samples of a shard."""
        rows = slice(int(self.starts[number]), int(self.starts[number + 1]))
        first = self._texts_at + int(self.texts[number])
        texts = self._map[first : first + int(self.texts[number + 1] - self.texts[number])]
        return Part(self.records[number], {name: column[rows] for name, column in self._columns.items()}, texts)

    def row(self, row: int, record: int) -> tuple[Any, list[str]]:
        """The numbers of a row, by name, and its words, compared with its sum.

        Args:
            record: which one it is of.

        Raises:
            DamagedIndex: if it is not as it was written.
        """
        starts = self._columns[TEXT]
        begin, room = int(starts[row]), int(self.texts[record + 1] - self.texts[record])
        end = room if row + 1 == int(self.starts[record + 1]) else int(starts[row + 1])
        first = self._texts_at + int(self.texts[record])
        text = self._map[first + begin + 4 : first + end] if begin + 4 <= end <= room else b""
        values = np.array([tuple(self._columns[name][row] for name in self._row.names or ())], self._row)
        told = int.from_bytes(self._map[first + begin : first + begin + 4], "little")
        if not text or zlib.crc32(text, zlib.crc32(values.tobytes())) != told:
            raise DamagedIndex(f"the sum of sample {row} does not fit")
        try:
            words = json.loads(text)
        except (ValueError, RecursionError):
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DamagedIndex(f"sample {row} has no words")
        return values[0], words


def write(place: Path, parts: Sequence[Callable[[], Part]], told: Mapping[str, Any] | None = None) -> None:
    """Write an index of shards in their order, atomically; what is there is replaced.

    Args:
        parts: each gives samples, twice; one at a time is in memory. All have the same columns.
        told: plain values that are kept with them.

    Raises:
        OSError: as the file system says; what was there is untouched.
        DamagedIndex: as a part does.
    """
    temporary = place.with_name(f".{place.name}.{uuid4().hex}")  # not the process's number: other machines have it too
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            _fill(stream.fileno(), parts, told or {})
            os.fsync(stream.fileno())
        temporary.replace(place)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class _Measured:
    """What a column needs: its highest number, and whether one value or another column stands for all."""

    def __init__(self, name: str) -> None:
        self.name, self.high, self.one = name, 0, b""
        self.float, self.several, self.differs = False, False, name not in SAME

    def add(self, part: Part) -> None:
        """Look at a part's values."""
        values = part.columns[self.name]
        self.float = values.dtype.kind == "f"
        wide = np.asarray(values, "<f4" if self.float else "<u8")
        if not len(wide):
            return
        if not self.float:
            self.high = max(self.high, int(wide.max()))
        self.one = self.one or wide[:1].tobytes()
        bits = wide.view(f"<u{wide.itemsize}")
        self.several = self.several or bool((bits != np.frombuffer(self.one, bits.dtype)[0]).any())
        self.differs = self.differs or not np.array_equal(values, part.columns[SAME[self.name]])

    def about(self) -> dict[str, Any]:
        """The column's place in the footer, without where it lies."""
        wide, kind = ("<f4", "<f4") if self.float else ("<u8", np.min_scalar_type(self.high).newbyteorder("<").str)
        if not self.several:
            one = np.frombuffer(self.one or b"\0" * 8, wide)[:1]
            return {"dtype": kind, "value": one.astype(kind).tobytes().hex()}
        return {"dtype": kind} | ({} if self.differs else {"same": SAME[self.name]})


def _fill(file: int, parts: Sequence[Callable[[], Part]], told_of: Mapping[str, Any]) -> None:
    records: list[ShardRecord] = []
    lengths: list[int] = []
    measured: list[_Measured] = []
    for give in parts:
        part = give()
        measured = measured or [_Measured(name) for name in part.columns]
        records.append(part.record)
        lengths.append(len(part.texts))
        for each in measured:
            each.add(part)
    about = {each.name: each.about() for each in measured}
    end, count = len(MAGIC), sum(record.samples for record in records)
    stored = {name: told for name, told in about.items() if not told.keys() & {"value", "same"}}
    for told in stored.values():
        told["at"] = -(-end // _ALIGNED) * _ALIGNED
        end = told["at"] + count * np.dtype(told["dtype"]).itemsize
    texts_at = end
    os.pwrite(file, MAGIC, 0)
    cursor = {name: told["at"] for name, told in stored.items()}
    sums = dict.fromkeys(set(stored) & set(DECIDING), 0)
    for give in parts:
        part = give()
        for name, told in stored.items():
            data = np.ascontiguousarray(part.columns[name], told["dtype"]).tobytes()
            if name in sums:
                sums[name] = zlib.crc32(data, sums[name])
            cursor[name] += _put(file, data, cursor[name])
        end += _put(file, part.texts, end)
    for name, found in sums.items():
        about[name]["crc"] = found
    shards = [asdict(record) for record in records]
    footer = json.dumps({"shards": shards, "texts": lengths, "texts_at": texts_at, "columns": about, "told": told_of}).encode()
    _put(file, footer + len(footer).to_bytes(8, "little") + hashlib.sha256(footer).digest() + MAGIC, end)


def _put(file: int, data: bytes, at: int) -> int:
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file, rest, at)
        rest, at = rest[done:], at + done
    return len(data)
