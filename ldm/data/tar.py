"""Streaming tar reader with error recovery: damage is reported, and reading goes on behind it."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_MAX_HEADER = 2**20  # bytes of an extended header
_CHUNK = 2**20
_DIGITS = 20  # of a number in an extended header
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


@dataclass(frozen=True)
class Member:
    """Archive member, a file; its name only labels it and is never a path to anything."""

    name: str
    offset: int  # of its first byte
    size: int
    data: bytes | None  # None: larger than asked for


@dataclass(frozen=True)
class SkippedMember:
    """Skipped archive member that is no file: a link, a device, a sparse file."""

    name: str
    what: str


@dataclass(frozen=True)
class Damage:
    """Damage: a place where the archive is corrupt."""

    offset: int
    what: str

    def __str__(self) -> str:
        return f"at byte {self.offset}: {self.what}"


class _Reader:
    """A stream that knows where it is, gives whole reads, and sums what goes by."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.offset = stream, 0

    def read(self, count: int) -> bytes:
        """`count` bytes, fewer at the end only."""
        parts: list[bytes] = []
        while count > 0:
            part = self._stream.read(min(count, _CHUNK))
            if not part:
                break
            parts.append(part)
            count -= len(part)
            self.offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, count: int) -> int:
        """Read on without keeping anything; how many bytes there were."""
        done = 0
        while done < count and (part := self.read(min(count - done, _CHUNK))):
            done += len(part)
        return done


def members(stream: BinaryIO, max_bytes: int) -> Iterator[Member | SkippedMember | Damage]:
    """Everything in an uncompressed archive (ustar, pax, GNU), from one pass over the stream.

    Every header bears a checksum; behind a damaged one the next sound header is looked for. A member that is cut short is
    not given. An archive that does not end with two blocks of zeros is said to be cut off, and what follows such an end is
    read too, so that a zeroed stretch in the middle hides nothing.
    """
    reader = _Reader(stream)
    zeros, searching, ended = 0, False, False
    longer: dict[str, str] = {}  # what extended headers say about the next member
    while True:
        at = reader.offset
        block = reader.read(BLOCK)
        if not block:
            break
        if len(block) < BLOCK:
            yield Damage(at, f"{len(block)} bytes of a block of {BLOCK}: the archive is cut off")
            zeros = 2  # said already
            break
        if not block.strip(b"\0"):
            zeros += 1
            ended = ended or zeros == 2
            continue
        header = _header(block, searching)
        if header is None:
            if not searching:
                yield Damage(at, "a header is damaged; looking for the next one")
            searching, longer = True, {}
            continue
        if zeros:
            yield Damage(at, "members follow the end of the archive" if ended else "a block of zeros between members")
        zeros, searching, ended = 0, False, False
        size = _number(longer["size"]) if "size" in longer else header.size
        if size < 0:
            yield Damage(at, f"{header.name}: an extended header is damaged, it gives the size {longer['size'][:40]!r}")
            searching, longer = True, {}
            continue
        padding = -size % BLOCK
        if header.type in (b"x", b"g", b"L", b"K"):
            extra = reader.read(size) if size <= _MAX_HEADER else b""
            told = None if len(extra) < size else _extended(header.type, extra)
            if told is None or reader.skip(padding) < padding:
                yield Damage(at, f"an extended header of {size} bytes is damaged")
                searching, longer = True, {}
                continue
            if header.type != b"g":  # a global header tells nothing that matters here
                longer |= told
            continue
        name = longer.get("path", header.name)
        sparse = header.type == tarfile.GNUTYPE_SPARSE or any(word.startswith("GNU.sparse") for word in longer)
        longer = {}
        if sparse or header.type not in _FILES:
            if header.type != tarfile.DIRTYPE:
                yield SkippedMember(name, "sparse file" if sparse else _KINDS.get(header.type, "of an unknown kind"))
            reader.skip(size + padding if sparse else 0)
            continue
        start = reader.offset
        data = reader.read(size) if size <= max_bytes else None
        got = len(data) if data is not None else reader.skip(size)
        if got < size:
            yield Damage(at, f"{name}: {got} of {size} bytes: the archive is cut off")
            zeros = 2
            break
        yield Member(name, start, size, data)
        if (gap := reader.skip(padding)) < padding:
            yield Damage(start + size + gap, "the archive is cut off")
            zeros = 2
            break
    if reader.offset == 0:
        yield Damage(0, "an empty file")
    elif zeros < 2:
        yield Damage(reader.offset, "no end mark: the archive is cut off")


_KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "pipe",
}


def _header(block: bytes, searching: bool) -> tarfile.TarInfo | None:
    """The header in a block; while searching, only one that also has the magic word, as picture bytes might sum up too."""
    if searching and block[257:262] != b"ustar":
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return header if header.size >= 0 else None


def _extended(kind: bytes, data: bytes) -> dict[str, str] | None:
    """What an extended header says; None if it is damaged."""
    if kind in (b"L", b"K"):
        text = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return {"path": text} if kind == b"L" else {}
    told: dict[str, str] = {}
    at, end = 0, len(data.rstrip(b"\0"))
    while at < end:
        space = data.find(b" ", at, at + _DIGITS)
        length = _number(data[at:space].decode("ascii", "replace")) if space > 0 else -1
        if not space - at + 1 < length <= len(data) - at:
            return None
        name, sign, value = data[space + 1 : at + length].partition(b"=")
        if not sign or not value.endswith(b"\n"):
            return None
        told[name.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        at += length
    return told


def _number(text: str) -> int:
    """A count of bytes as an extended header writes it; -1: it is none."""
    return int(text) if text.isdecimal() and len(text) <= _DIGITS else -1
