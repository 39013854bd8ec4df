"""Copies of checkpoints and finished stages in a store, made beside training, which neither waits for them nor fails with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from ldm.config.errors import UserError
from ldm.data import remote, threads
from ldm.formats.atomic import MANIFEST

STAGES, STATE, DONE, IDENTITY, LOG = "stages", "state", "done.json", "identity.json", "log.jsonl"
HELD = ".upload-"  # begins the name of a checkpoint's second name, by which it stays while it is copied
CONFIG = "config.yaml"
_STATE = re.compile(r"images-\d{12}")


@dataclass(frozen=True)
class Copy:
    """What is to be copied: a state, or all of a finished stage."""

    folder: Path  # where its files are
    place: str  # in the store, below the run's
    last: str  # the file that says that it is whole
    keep: int = 0  # states of the stage that stay; 0: it is no state


class Copies:
    """Copies of a run in a store.

    Args:
        root: the run's folder.
        url: the same in the store.
        say: takes a line for the reader, in the thread that calls `tell` or `close`.
    """

    def __init__(self, root: Path, url: str, say: Callable[[str], None]) -> None:
        self.root, self.url, self._say = root, url.rstrip("/"), say
        self._todo: list[Copy] = []
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._changed = threading.Condition()
        self._busy = self._over = False
        self._thread: threading.Thread | None = None

    def state(self, folder: Path, keep: int) -> None:
        """Copy a checkpoint that is whole on disk. One that is still waiting gives way to it; its files stay until it is copied."""
        stage = folder.parent.parent
        found = Copy(_held(folder), f"{STAGES}/{stage.name}/{STATE}/{folder.name}", MANIFEST, keep)
        with self._changed:
            for old in [each for each in self._todo if each.keep]:
                self._todo.remove(old)
                _let_go(old)
        self._add(found)

    def stage(self, folder: Path) -> None:
        """Copy what a finished stage leaves to later ones."""
        self._add(Copy(folder, f"{STAGES}/{folder.name}", DONE))

    def _add(self, found: Copy) -> None:
        with self._changed:
            self._todo.append(found)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threads.start(self._work, "copies")

    def tell(self) -> None:
        """Say what became of copies."""
        while not self._lines.empty():
            self._say(self._lines.get())

    def close(self) -> None:
        """Wait for what is being copied; a store that does not answer ends that by itself (`ldm.data.remote`)."""
        with self._changed:
            self._changed.wait_for(lambda: not self._todo and not self._busy)
            self._over = True
            self._changed.notify_all()
        self.tell()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._todo) or self._over)
                if self._over:
                    return
                found, self._busy = self._todo.pop(0), True
            try:
                self._copy(found)
            except Exception as error:
                if found.keep and not found.folder.exists():  # the stage is finished, and its states are gone
                    continue
                what = error.strerror or error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
                self._lines.put(f"{self.url}/{found.place}: not copied there ({what}); training goes on, and the next is tried")
            finally:
                _let_go(found)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _copy(self, found: Copy) -> None:
        began = time.monotonic()
        files = [path for path in sorted(found.folder.rglob("*")) if path.is_file() and not _passed_over(path.relative_to(found.folder))]
        rest = [path for path in files if path != found.folder / found.last]
        self._put(found, rest)
        self._put(found, [found.folder / found.last])  # nothing counts without it
        stage = self.root / STAGES / found.place.split("/")[1]
        beside = [path for path in (stage / IDENTITY, self.root / LOG) if path.is_file()]
        remote.each(lambda path: remote.put(path, f"{self.url}/{path.relative_to(self.root).as_posix()}"), beside)
        size = sum(path.stat().st_size for path in files)
        self._lines.put(f"{found.place}: copied to {self.url} ({size / 1e6:,.0f} MB in {time.monotonic() - began:.0f} s)")
        self._remove_older(f"{self.url}/{STAGES}/{stage.name}/{STATE}", found.keep)

    def _remove_older(self, states: str, keep: int) -> None:
        """Remove all states but the newest that are whole, and what uploads that were cut off have left; 0: all of them."""
        if not keep:
            remote.remove(states)
            return
        files = files_below(states)
        whole = sorted(_states(files))
        for old in sorted({name.split("/")[0] for name in files} - set(whole[-keep:])):
            if old < whole[-1]:
                remote.remove(f"{states}/{old}/{MANIFEST}")  # first: what is being removed counts no more
                remote.remove(f"{states}/{old}")

    def _put(self, found: Copy, files: Iterable[Path]) -> None:
        places = [(path, f"{self.url}/{found.place}/{path.relative_to(found.folder).as_posix()}") for path in files]
        remote.each(lambda pair: remote.put(*pair), places)


def _passed_over(path: Path) -> bool:
    """Of a finished stage: what it needed on its way."""
    return path.parts[0] in (STATE, "assembled") or any(part.startswith(".") for part in path.parts)


def _held(folder: Path) -> Path:
    """The checkpoint under a second name, which stays when it is removed; itself where the file system has no such names."""
    held = folder.with_name(HELD + folder.name)
    shutil.rmtree(held, ignore_errors=True)
    try:
        for path in folder.rglob("*"):
            if path.is_file():
                target = held / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
    except OSError:
        shutil.rmtree(held, ignore_errors=True)
        return folder
    return held


def _let_go(found: Copy) -> None:
    if found.folder.name.startswith(HELD):
        shutil.rmtree(found.folder, ignore_errors=True)


def files_below(url: str) -> dict[str, int]:
    """The files below a folder of a store, by their names from there, with their bytes; empty: there is no such folder.

    Raises:
        OSError: if the store refuses.
    """
    try:
        found = remote.listed(url, "")
    except FileNotFoundError:
        return {}
    mark = "/" + url.partition("://")[2].strip("/").rpartition("/")[2] + "/"
    root = url.partition("://")[2].strip("/") + "/"
    return {name.partition(root)[2] if root in name else name.partition(mark)[2]: size for name, size in found.items()}


def _states(files: Iterable[str]) -> list[str]:
    """Names of the states that are whole, among files below a stage's `state`."""
    parts = [file.split("/") for file in files]
    return [part[0] for part in parts if len(part) == 2 and part[1] == MANIFEST and _STATE.fullmatch(part[0])]


def begin(out: Path, url: str, stages: Sequence[str]) -> list[str]:
    """Try a store, and bring what it has of a run and this machine lacks: finished stages, and the newest checkpoint of others.

    Returns:
        lines for the reader.

    Raises:
        UserError: if the store cannot be read or written, before any work.
    """
    url, said = url.rstrip("/"), []
    try:
        remote.put(out / CONFIG, f"{url}/{CONFIG}")
        if not (out / LOG).exists():
            with suppress(FileNotFoundError):
                remote.get(f"{url}/{LOG}", out / LOG)
        for name in stages:
            said += _bring(out / STAGES / name, f"{url}/{STAGES}/{name}")
    except OSError as error:
        raise UserError(f"mirror: {url} cannot be used ({error.strerror or error}); correct it, or leave it out") from None
    return said


def _bring(local: Path, url: str) -> list[str]:
    there = files_below(url)
    if (local / DONE).exists() or not there:
        return []
    if DONE in there and not (local / STATE).exists():
        names = [name for name in there if not name.startswith(f"{STATE}/")]
        _fetch(url, names, local, local.with_name(f".{local.name}.partial"))
        return [f"{local.name}: finished, from {url}"]
    newest = max(_states(name.removeprefix(f"{STATE}/") for name in there if name.startswith(f"{STATE}/")), default="")
    mine = max((path.name for path in local.glob(f"{STATE}/*") if _STATE.fullmatch(path.name)), default="")
    if not newest or newest <= mine or (mine and not _same(local / IDENTITY, f"{url}/{IDENTITY}", there)):
        return []
    inside = f"{STATE}/{newest}/"
    target = local / STATE / newest
    _fetch(
        f"{url}/{inside.rstrip('/')}",
        [name.removeprefix(inside) for name in there if name.startswith(inside)],
        target,
        target.with_name(f".{newest}"),
    )
    if IDENTITY in there and not (local / IDENTITY).exists():
        remote.get(f"{url}/{IDENTITY}", local / IDENTITY)
    return [f"{local.name}: the checkpoint {newest}, from {url}"]


def _same(local: Path, url: str, there: dict[str, int]) -> bool:
    """Whether the work there is for the same as the work here."""
    if IDENTITY not in there:
        return False
    with suppress(OSError, ValueError):
        return bool(json.loads(local.read_text())["key"] == json.loads(remote.read(url, 0, there[IDENTITY]))["key"])
    return False


def _fetch(url: str, names: Sequence[str], target: Path, temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        remote.each(partial(_get, url, temporary), list(names))
        if target.exists():  # a folder that was begun and holds nothing
            shutil.rmtree(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _get(url: str, folder: Path, name: str) -> None:
    target = folder / name
    if not target.resolve().is_relative_to(folder.resolve()):
        raise OSError(f"{url}/{name} leads out of the folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    remote.get(f"{url}/{name}", target)
