"""Identity of a data set by content: hashes of files that are read once, and what has changed between two states of a data set."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

MOST = 2_000_000  # samples of which marks are kept
_CHUNK = 2**20

_log = logging.getLogger(__name__)


def content_hash(data: bytes) -> str:
    """Of a picture's bytes (BLAKE2b, 128 bits)."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def cache_folder() -> Path:
    """Where what can be found again is kept: $LDM_CACHE, else ~/.cache/ldm."""
    return Path(os.environ.get("LDM_CACHE") or Path.home() / ".cache" / "ldm")


class FileState(Protocol):
    """What tells that a file has changed (protocol): an os.stat_result, say."""

    @property
    def st_size(self) -> int:
        """Length in bytes."""
        ...

    @property
    def st_mtime_ns(self) -> int:
        """Time of modification."""
        ...


class ContentHashes:
    """Hashes of the files of a folder, each read once while its length and modification time stay.

    They are kept in the cache, so that the folder may be read-only, and in memory where the cache is.

    Args:
        root: the folder; another path to it is the same one.
    """

    _in_memory: dict[str, dict[str, list[object]]] = {}  # noqa: RUF012 (one for all data sets of the process)

    def __init__(self, root: Path) -> None:
        real = os.path.realpath(root)
        self._file = cache_folder() / f"content-{hashlib.blake2b(os.fsencode(real), digest_size=12).hexdigest()}.json"
        if real not in self._in_memory:
            self._in_memory[real] = self._load()
        self._real, self._known, self._changed = real, self._in_memory[real], False

    def _load(self) -> dict[str, list[object]]:
        try:
            said = json.loads(self._file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return {k: v for k, v in said.items() if isinstance(v, list) and len(v) == 3} if isinstance(said, dict) else {}

    def known(self, name: str, status: FileState) -> str:
        """The hash of a file as it was read before; empty: it was not, or has changed since."""
        known = self._known.get(name)
        return known[2] if known is not None and known[:2] == [status.st_size, status.st_mtime_ns] and isinstance(known[2], str) else ""

    def of(self, file: Path | bytes, name: str, status: FileState) -> str:
        """The hash of a file.

        Args:
            file: its place, or what it holds.
            name: below the folder.

        Raises:
            OSError: if it cannot be read.
        """
        if known := self.known(name, status):
            return known
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(file, bytes):
            digest.update(file)
        else:
            with file.open("rb") as stream:
                while data := stream.read(_CHUNK):
                    digest.update(data)
        self._known[name], self._changed = [status.st_size, status.st_mtime_ns, digest.hexdigest()], True
        return digest.hexdigest()

    def save(self, names: Sequence[str]) -> None:
        """Keep what was read of these files; where that cannot be, they are read again by the next process."""
        if not self._changed:
            self._in_memory.pop(self._real, None)
            return
        kept = {name: self._known[name] for name in names if name in self._known}
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(kept), encoding="utf-8")
            temporary.replace(self._file)
            self._in_memory.pop(self._real, None)
        except OSError as error:
            _log.info("%s cannot be written (%s); the pictures are read anew at every start", self._file, error.strerror)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@runtime_checkable
class HasMarks(Protocol):
    """Data set that can be compared with a former state of itself."""

    def marks(self) -> NDArray[np.uint64] | None:
        """Of each sample a hash of its name and one of its picture and captions (N,2); None: too many, or made by rule."""
        ...


def mark(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class DataChange:
    """What differs between two states of a data set."""

    added: int
    removed: int
    altered: int  # another picture or other captions under the same name

    def __str__(self) -> str:
        return f"{self.added:,} added, {self.removed:,} removed, {self.altered:,} altered"


def compare(old: NDArray[np.uint64], new: NDArray[np.uint64]) -> DataChange:
    """What has changed from the old marks (N,2) to the new ones (M,2)."""
    before, after = (dict(zip(marks[:, 0].tolist(), marks[:, 1].tolist(), strict=True)) for marks in (old, new))
    both = before.keys() & after.keys()
    return DataChange(len(after.keys() - both), len(before.keys() - both), sum(before[name] != after[name] for name in both))
