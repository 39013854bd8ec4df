"""Integrity of model folders: files against the manifest that they were committed with, each state of a file hashed once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from ldm.config.errors import UserError
from ldm.config.files import read_bounded
from ldm.formats import atomic
from ldm.formats.atomic import MANIFEST, sha256

COUNTED = (".json", ".txt", ".safetensors", ".model")  # the files that say what a model does
ABOVE = 3  # folders that a file may lie below the one that was committed: clip/image_tower/config.json
LARGE = 2**20  # bytes, from which on a sum is remembered; smaller files are hashed at once
SETTLED_S = 2.0  # a file that has changed since is not remembered: the file system's clock may be as coarse
REMEMBERED = 4096  # sums at most
AGAIN = f"copy the whole model folder again, or delete {MANIFEST} there if the change is meant"
_guard = threading.Lock()


def cache_folder() -> Path:
    """Where opened files and checksums are kept: LDM_CACHE, or ldm in the user's cache folder."""
    own, base = os.environ.get("LDM_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(base) if base else Path.home() / ".cache") / "ldm"


def check(path: Path) -> None:
    """Compare what the nearest manifest at or above a file or folder lists of it with what is there.

    Model cards and pictures do not count. Without a manifest there is nothing to compare.

    Raises:
        UserError: naming the file that is missing or whose bytes differ.
    """
    for root in (path, *path.parents[:ABOVE]):
        if root.is_dir() and (root / MANIFEST).is_file():
            break
    else:
        return
    own = path.relative_to(root).parts
    listed = {name: said for name, said in _sums(root).items() if name.endswith(COUNTED) and PurePosixPath(name).parts[: len(own)] == own}
    if missing := sorted(name for name in listed if not (root / name).is_file()):
        raise UserError(f"{root / missing[0]} is missing, which {MANIFEST} lists; {AGAIN}")
    for name, found in zip(listed, checksums(root / name for name in listed), strict=True):
        if found != listed[name]:
            raise UserError(f"{root / name}: its bytes differ from what {root / MANIFEST} says; {AGAIN}")


def is_whole(folder: Path) -> bool:
    """Whether a folder is there and as it was committed."""
    try:
        check(folder)
    except UserError:
        return False
    return folder.is_dir()


def _sums(root: Path) -> dict[str, str]:
    """The sums in a manifest; none where the file is another program's."""
    file = root / MANIFEST
    try:
        values = json.loads(read_bounded(file, 2**26))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not readable JSON; {AGAIN}") from None
    if not isinstance(values, dict) or not any(_is_sum(value) for value in values.values()):
        return {}
    for name, value in values.items():
        if not _is_sum(value) or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise UserError(f"{file}: {name!r}: {str(value)[:80]!r} is no SHA-256 sum of a file in this folder; {AGAIN}")
    return values


def _is_sum(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def folder_hash(folder: Path) -> str:
    """Content hash of a committed folder, as `atomic.folder_hash`; files are read again only where one has changed since the last time.

    Raises:
        Damaged: as `verify`.
    """
    sums = atomic.listed(folder)
    states = {name: (folder / name).stat() for name in (*sums, MANIFEST)}
    told = [[name, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns] for name, one in sorted(states.items())]
    now = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    file = cache_folder() / "folders" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        if file.read_text() == now:
            return atomic.state_hash(sums)
    found = atomic.folder_hash(folder)
    if time.time() - max(max(one.st_mtime, one.st_ctime) for one in states.values()) >= SETTLED_S:
        _write_beside(file, now)
    return found


def checksums(files: Iterable[Path]) -> list[str]:
    """SHA-256 sums, in hexadecimal, from memory where a file is as it was when it was hashed."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as several:
        return list(several.map(_checksum, files))


def _checksum(file: Path) -> str:
    state = file.stat()
    if state.st_size < LARGE:
        return sha256(file)
    key = f"{state.st_dev} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
    with _turn(key):  # another thread may be at the same file
        known = _known(cache_folder() / "checksums.json")
        if key not in known:
            found = sha256(file)
            if time.time() - max(state.st_mtime, state.st_ctime) < SETTLED_S:
                return found
            with _guard:
                known[key] = found
                _remember(cache_folder() / "checksums.json", known)
        return known[key]


@cache
def _turn(key: str) -> threading.Lock:
    return threading.Lock()


@cache
def _known(file: Path) -> dict[str, str]:
    try:
        values = json.loads(file.read_bytes())
        return {name: value for name, value in values.items() if _is_sum(value)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _remember(file: Path, known: dict[str, str]) -> None:
    """Store the latest sums; a file that cannot be written costs time alone."""
    _write_beside(file, json.dumps(dict(list(known.items())[-REMEMBERED:]), indent=0))


def _write_beside(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
