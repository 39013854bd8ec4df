"""Storage of shards: local paths and fsspec URLs (`ldm.data.remote`) with brace expansion, streams and range reads."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ldm.config.errors import UserError
from ldm.data import remote
from ldm.data.file_names import hidden, leads_out

MOST = 10**6  # names that one pattern may give
RETRIES, WAIT_S = 3, 0.5  # of a local read that fails, the wait doubling
_OPEN = 64  # local files that are kept open
_RANGE = re.compile(r"\{([^{}]*)\}")
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Whether a path names a place that fsspec opens."""
    return bool(_URL.match(path))


def expand(pattern: str) -> list[str]:
    """Brace expansion: `{00000..00099}` counts with the digits of its first number, `{a,b}` lists; what exists is no pattern.

    Raises:
        UserError: for a range that runs backwards or gives too many names.
    """
    pattern = os.path.expanduser(pattern)
    there, pattern = ("", pattern) if is_url(pattern) else _there(pattern)
    pieces: list[list[str]] = [[there]]
    for i, piece in enumerate(_RANGE.split(pattern)):
        pieces.append([piece] if i % 2 == 0 else _choices(piece, pattern))
    count = 1
    for choices in pieces:
        count *= len(choices)
    if count > MOST:
        raise UserError(f"data.path: {pattern} stands for {count} names; at most {MOST}")
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _there(path: str) -> tuple[str, str]:
    """The part of a path that exists as it stands, with its slash, and the rest, in which brackets, braces and stars are a pattern."""
    if os.path.exists(path):
        return path, ""
    slashes = [found.end() for found in re.finditer(r"/+", path)]
    end = next((end for end in reversed(slashes) if os.path.isdir(path[:end])), 0)
    return path[:end], path[end:]


def _choices(inside: str, pattern: str) -> list[str]:
    if (found := re.fullmatch(r"(\d+)\.\.(\d+)", inside)) is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = int(found[1]), int(found[2])
    if last < first or last - first >= MOST:
        raise UserError(f"data.path: {{{inside}}} in {pattern} must count upwards, to at most {MOST} names")
    return [str(n).zfill(len(found[1])) for n in range(first, last + 1)]


@dataclass(frozen=True)
class Stat:
    """File status: length and modification time."""

    bytes: int
    mtime_ns: int  # 0: the store does not tell


def find(path: str, suffix: str, outside: bool = False) -> list[str]:
    """The files that a path means, sorted: itself, what its braces or stars stand for, or all `suffix` files below a folder.

    Args:
        outside: follow links in a folder that lead out of it.

    Raises:
        UserError: if there are none, or one is such a link.
    """
    return list(find_stats(path, suffix, outside))


def find_stats(path: str, suffix: str, outside: bool = False) -> dict[str, Stat]:
    """As `find`, with the status of each, which is asked for many at the same time.

    Raises:
        UserError: as `find`, or if one cannot be looked at.
    """
    names = expand(path)
    urls = [name for name in names if is_url(name)]
    found = {name: Stat(size, 0) for name, size in _find_urls(urls, suffix).items()} if urls else {}
    local = [inside for name in names if not is_url(name) for inside in _find_local(name, suffix, outside)]
    found |= zip(local, remote.each(_stat_of, local), strict=True)
    if not found:
        raise UserError(f"data.path: no {suffix} files at {path}; give a folder of shards, or a pattern such as {{00000..00099}}{suffix}")
    return dict(sorted(found.items()))


def _stat_of(name: str) -> Stat:
    try:
        return stat(name)
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error}); restore it or leave it out of data.path") from None


def _find_local(name: str, suffix: str, outside: bool) -> list[str]:
    place = Path(name)
    if place.is_dir():
        found = [p for p in place.rglob(f"*{suffix}") if not hidden(p.relative_to(place).as_posix())]
        if not outside and (links := [p for p in found if leads_out(p, place)]):
            raise UserError(f"data.path: {links[0]} is a link that leads out of {name}; set data.outside=true to follow it")
        return [str(p) for p in found]
    if glob.has_magic(name) and not place.exists():
        return matching(name)
    if not place.exists():
        raise UserError(f"data.path: {name} does not exist; correct the path or the range in braces")
    return [name]


def matching(pattern: str) -> list[str]:
    """The local files that a pattern means; brackets and stars of what exists are no part of it."""
    there, rest = _there(pattern)
    return [f"{there}{found}" for found in glob.glob(rest, root_dir=there or None, recursive=True)]


def _find_urls(urls: Sequence[str], suffix: str) -> dict[str, int]:
    """The files that URLs mean, with their bytes; -1: the store does not tell."""
    files = [url for url in urls if url.endswith(suffix) and not glob.has_magic(url)]
    found = remote.sizes(files)
    for url in urls:
        if url in found:
            continue
        try:
            inside = remote.listed(url, suffix)
        except FileNotFoundError:
            raise UserError(f"data.path: {url} does not exist; correct the URL or the range in braces") from None
        except OSError as error:
            raise UserError(f"data.path: {url} cannot be listed: {error.strerror or error}") from None
        root = url.rstrip("/") + "/"
        below = {name: name.removeprefix(root) if root in name else name.rpartition("/")[2] for name in inside}
        found |= {name: size for name, size in inside.items() if not hidden(below[name])}
    unknown = [name for name, size in found.items() if size < 0]
    return found | remote.sizes(unknown)


def stat(name: str) -> Stat:
    """Length and time of a file.

    Raises:
        OSError: if it is not there.
    """
    if not is_url(name):
        status = os.stat(name)
        return Stat(status.st_size, status.st_mtime_ns)
    return Stat(remote.size(name), 0)


def stream(name: str) -> BinaryIO:
    """A file from its beginning."""
    if not is_url(name):
        return open(name, "rb")
    return remote.stream(name)


class Ranges:
    """Range reader of many files; safe to call from several threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {}  # descriptors belong to one process

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, of a local file fewer past its end; a failure that may pass is tried again, a store's for minutes.

        Raises:
            OSError: as the last try said.
        """
        if is_url(name):
            return remote.read(name, offset, size)
        for attempt in range(RETRIES):
            try:
                return self._local(name, offset, size)
            except OSError as error:
                if attempt == RETRIES - 1 or isinstance(error, (FileNotFoundError, PermissionError)):
                    raise
                time.sleep(WAIT_S * 2**attempt)
        raise AssertionError

    def _local(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:
            descriptor = self._open.pop(name, None)
            if descriptor is None:
                descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            self._open[name] = descriptor  # the newest last
            mine = os.dup(descriptor)  # stays open for this read, whoever closes the other
            if len(self._open) > _OPEN:
                os.close(self._open.popitem(last=False)[1])
        try:
            return os.pread(mine, size, offset)
        finally:
            os.close(mine)
