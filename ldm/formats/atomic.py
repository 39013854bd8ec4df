"""Atomic, checksummed directory writes: temporary folder, fsync, SHA-256 manifest, one rename."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.formats.records import Damaged as Damaged
from ldm.formats.records import read_object

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit(target: Path, write: Callable[[Path], None]) -> None:
    """Atomic directory write: fill a folder by `write(temporary)` and rename it to `target`, replacing what was there.

    Every file is synced before the manifest of SHA-256 sums is written last, so a folder with a fitting manifest is whole
    whatever happened. A failure (a full disk, say) removes the temporary folder and leaves `target` as it was.

    Raises:
        OSError: as the file system says, with `target` untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        sums = {p.relative_to(temporary).as_posix(): sha256(p) for p in files}
        for path in files:
            _sync(path)
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps(sums, indent=1))
        _sync(manifest)
        for folder in {p.parent for p in files} | {temporary}:
            _sync(folder)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def verify(folder: Path) -> dict[str, str]:
    """Verify a committed folder against its manifest and return its checksums.

    Raises:
        Damaged: naming the file that is missing, extra or changed.
    """
    sums = listed(folder)
    for name, expected in sums.items():
        if sha256(folder / name) != expected:
            raise Damaged(f"{folder / name}: its bytes differ from the manifest")
    return sums


def listed(folder: Path) -> dict[str, str]:
    """The checksums that a committed folder's manifest gives of its files, which are all there; their bytes are not read.

    Raises:
        Damaged: naming the file that is missing or extra.
    """
    try:
        sums = {name: str(value) for name, value in read_object(folder / MANIFEST).items()}
    except (OSError, Damaged) as error:
        raise Damaged(f"{folder}: no readable {MANIFEST} ({error})") from None
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if different := present ^ set(sums):
        raise Damaged(f"{folder}: missing or unexpected files: {', '.join(sorted(different))}")
    return sums


def folder_hash(folder: Path) -> str:
    """Content hash of a committed folder: that of its manifest's checksums."""
    return state_hash(verify(folder))


def state_hash(sums: Mapping[str, str]) -> str:
    """Content hash of a manifest's checksums."""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Atomic write of a JSON file."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Atomic write of a safetensors file, with metadata in its header.

    Raises:
        OSError: as the file system says, where safetensors only has its own kind of error.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path, metadata={"format": "pt", **(metadata or {})})
        if metadata:
            _sort_texts(path)
    except SafetensorError as error:
        if code := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise


def _sort_texts(path: Path) -> None:
    """Sort the metadata in a safetensors header, so that equal content is equal bytes: the library's order is by chance."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        values = json.loads(file.read(size))
        values["__metadata__"] = dict(sorted(values["__metadata__"].items()))
        header = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
        if len(header) <= size:
            file.seek(8)
            file.write(header.ljust(size))
