"""Run folder: locked by one start at a time; nothing that was trained is deleted."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.config.errors import UserError
from ldm.config.version import __version__
from ldm.formats.records import Damaged, read_object


def is_stage_name(name: str) -> bool:
    """Whether a stage may be called so: its name becomes a folder's."""
    return bool(name) and len(name) <= 100 and name.isprintable() and not set(name) & set("/\\. ") and not name.startswith("-")


def check_version(folder: Path) -> None:
    """Refuse a run folder that another version began.

    Raises:
        UserError: naming both versions.
    """
    for file in sorted(folder.glob("stages/*/done.json")):
        try:
            began = read_object(file).get("version")
        except (OSError, Damaged):  # whoever needs it refuses it
            continue
        if isinstance(began, str) and began.split(".")[:2] != __version__.split(".")[:2]:
            raise UserError(f"{folder}: a run of ldm {began}, and this is ldm {__version__}, which does not read it; give another out=DIR")


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Within it no other start may use the run folder; the lock dies with its process.

    Raises:
        UserError: naming the process that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(f"{folder}: in use by process {owner}; wait for it, or give this run another out=DIR") from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


LEFT = re.compile(r"\.(?P<name>.+)\.(partial|old|cut)|\.(images|shard|upload)-.*|\.\d+\.png")  # what is being written, and what it replaces


def sweep(folder: Path) -> None:
    """Remove what a start that was killed has left: what it was writing, and the state of stages that are finished.

    A folder that was just being replaced is put back. Only the holder of the lock may call it.
    """
    stages = [path for path in folder.glob("stages/*") if path.is_dir() and is_stage_name(path.name)]
    inner = [stage / name for stage in stages for name in ("", "state", "samples", "model")]
    for place in (folder, folder / "stages", folder / "pretrained", *folder.glob("pretrained/*"), *inner):
        for path in place.glob(".*"):
            found = LEFT.fullmatch(path.name)
            if found is None:
                continue
            if found[2] == "old" and not (target := place / found["name"]).exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for stage in stages:
        if (stage / "done.json").is_file():
            for name in ("state", "assembled"):
                shutil.rmtree(stage / name, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Move a stage's folder out of the way of its successor; nothing that was trained is deleted."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.replaced-{number}")).exists():
        number += 1
    return folder.rename(target)
