"""Bounded reading of files from elsewhere, and child processes that take no code from the current folder."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the package
CHILD = "import runpy, sys; sys.path[:] = sys.argv.pop(1).split(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), None, '__main__', True)"


def at_home(path: str | Path) -> Path:
    """A path with the home folder in place of ~, as a shell has it: where nobody has that name, or a home, it stays as it stands."""
    return Path(os.path.expanduser(path))


def read_bounded(file: Path, most: int) -> bytes:
    """The bytes of a regular file, which is no larger than `most`: a pipe or a device would be read without end.

    Raises:
        OSError: as the file system says, or for a file of another kind or size.
    """
    require_regular(file)
    with file.open("rb") as opened:
        found = opened.read(most + 1)
    if len(found) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes, which no such file is", str(file))
    return found


def require_regular(file: Path) -> None:
    """Refuse a folder, a pipe, a device.

    Raises:
        OSError: as the file system says, or for a file of another kind.
    """
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))


ALIKE = 0.6  # difflib's measure of two names, from which on one may be meant by the other
LOST = re.compile(r"(?:^|: )(?P<path>[^:;]+?)(?:: no such f|: No such f|: there is no such f| does not exist)")


def meant(said: str) -> str:
    """What a message of a missing file or folder may add: the run of that name, or the file or folder whose name is nearest; else empty."""
    found = LOST.search(said)
    near = nearest(at_home(found["path"])) if found and "did you mean" not in said else None
    return f"; did you mean {near}?" if near else ""


def nearest(path: Path) -> Path | None:
    """What is most likely meant by a path that leads nowhere: a run of its name, or what is beside it under the nearest name."""
    if not path.is_absolute() and (run := "runs" / path).exists():
        return run
    if path.parent != path and not path.parent.exists():
        above = nearest(path.parent)
        return above / path.name if above and (above / path.name).exists() else None
    try:
        beside = sorted({*os.listdir(path.parent)} - {path.name})  # what is there under its very name is not what is meant
    except OSError:
        return None
    near = [name for name in difflib.get_close_matches(path.name, beside, 8, ALIKE) if _alike(Path(name), path)]
    return path.parent / near[0] if near else None


def _alike(one: Path, other: Path) -> bool:
    """Whether two names that are alike as a whole are so without their ending, where that is the same."""
    return one.suffix != other.suffix or difflib.SequenceMatcher(None, one.stem, other.stem).ratio() >= ALIKE


def isolated(module: str, *words: str) -> list[str]:
    """Command that runs a module of this package in Python's isolated mode, on this process' path without the current folder.

    `python -m` would put that first: a torch.py beside a downloaded model would be imported.
    """
    own, here = str(ROOT), os.path.realpath(os.curdir)
    path = [entry for entry in sys.path if os.path.isabs(entry) and (os.path.realpath(entry) != here or entry == own)]
    path = path if own in path else [own, *path]
    return [sys.executable, "-I", "-c", CHILD, os.pathsep.join(path), os.pathsep, module, *words]
