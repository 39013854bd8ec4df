"""Copies of checkpoints and finished stages in a store, made beside training, which neither waits for them nor fails with them."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.data import remote, threads
from ldm.data.storage import is_url
from ldm.formats.atomic import MANIFEST

STAGES, STATE, DONE, META, LOG = "stages", "state", "done.json", "meta.json", "log.jsonl"
HELD = ".upload-"  # begins the name of a checkpoint's second name, by which it stays while it is copied
CONFIG = "config.yaml"
READ_ONLY = ("http", "https", "data", "github", "git", "zip", "tar", "libarchive", "reference")  # protocols
_LOCAL = ("file", "local")
_STATE = re.compile(r"images-\d{12}")


@dataclass(frozen=True)
class Copy:
    """What is to be copied: a state, or all of a finished stage."""

    folder: Path  # where its files are
    place: str  # in the store, below the run's
    last: str  # the file that says that it is whole
    key: str  # of the stage that made it
    keep: int = 0  # states of the stage that stay; 0: it is no state


class Copies:
    """Copies of a run in a store.

    A copy belongs to a key, the hash of all that its stage depends on. Only those of the key that is asked for are brought. Checkpoints of
    other keys are removed when the first of a new one is copied; a finished stage stays until its successor is finished.

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
        self._works = False  # whether something was trained, which a store that fails may not end

    def finished(self, name: str, key: str, make_room: Callable[[Path], object]) -> None:
        """Before a stage: bring its finished work where this machine lacks it, and copy it where the store does.

        Args:
            make_room: moves what lies in the stage's folder away.

        Raises:
            UserError: if the store cannot be read, before any work; later that is told.
        """
        local, url = self.root / STAGES / name, f"{self.url}/{STAGES}/{name}"
        here = _key_in(local / DONE) == key
        with self._reading(name):
            there = files_below(url)
            theirs = _key_at(url, DONE, there) == key
            if here and not theirs:
                self.stage(local)
            if theirs and not here:
                names = [each for each in there if not each.startswith(f"{STATE}/")]
                room = partial(make_room, local) if local.exists() and any(local.iterdir()) else None
                _fetch(url, names, local, local.with_name(f".{name}.partial"), room)
                self._say(f"{name}: finished, from {url}")

    def newest(self, name: str, key: str, keep: int) -> None:
        """Before an unfinished stage: bring its newest checkpoint, or copy this machine's where that is newer.

        Args:
            keep: states of the stage that stay.

        Raises:
            UserError: as `finished`.
        """
        local, url = self.root / STAGES / name / STATE, f"{self.url}/{STAGES}/{name}/{STATE}"
        own = [path for path in local.glob("images-*") if _STATE.fullmatch(path.name) and (path / MANIFEST).is_file()]
        mine = max((path.name for path in own if _key_in(path / META) == key), default="")
        with self._reading(name):
            there = files_below(url)
            keys = {state: _key_at(url, f"{state}/{META}", there) for state in _states(there)}
            newest = max((state for state, other in keys.items() if other == key), default="")
            if foreign := sorted(state for state, other in keys.items() if other != key):
                what = f"{foreign[-1]} and {len(foreign) - 1} more are" if len(foreign) > 1 else f"{foreign[0]} is"
                self._say(f"{name}: {what} of other settings in {url}: not taken, and removed there once a checkpoint of these is copied")
            if newest > mine:
                inside = [each.removeprefix(f"{newest}/") for each in there if each.startswith(f"{newest}/")]
                _fetch(f"{url}/{newest}", inside, local / newest, local / f".{newest}")
                self._say(f"{name}: the checkpoint {newest}, from {self.url}/{STAGES}/{name}")
        if mine > newest:
            self.state(local / mine, keep)
        self._works = True

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = error.strerror or error
            if not self._works:
                raise UserError(f"mirror: {self.url} cannot be used ({what}); correct it, or leave it out") from None
            self._say(f"{name}: {self.url} cannot be read ({what}); it begins with what is here")

    def state(self, folder: Path, keep: int) -> None:
        """Copy a checkpoint that is whole on disk. One that is still waiting gives way to it; its files stay until it is copied."""
        stage, key = folder.parent.parent, _key_in(folder / META)
        found = Copy(_held(folder), f"{STAGES}/{stage.name}/{STATE}/{folder.name}", MANIFEST, key, keep)
        with self._changed:
            for old in [each for each in self._todo if each.keep]:
                self._todo.remove(old)
                _let_go(old)
        self._add(found)

    def stage(self, folder: Path) -> None:
        """Copy what a finished stage leaves to later ones."""
        self._add(Copy(folder, f"{STAGES}/{folder.name}", DONE, _key_in(folder / DONE)))

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
        place = f"{self.url}/{found.place}"
        remote.remove(f"{place}/{found.last}")  # first: what is being replaced counts no more
        self._put(found, [path for path in files if path != found.folder / found.last])
        self._put(found, [found.folder / found.last])  # nothing counts without it
        if (log := self.root / LOG).is_file():
            remote.put(log, f"{self.url}/{LOG}")
        size = sum(path.stat().st_size for path in files)
        self._lines.put(f"{found.place}: copied to {self.url} ({size / 1e6:,.0f} MB in {time.monotonic() - began:.0f} s)")
        if found.keep:
            self._remove_older(place.rpartition("/")[0], found)
        else:
            names = {path.relative_to(found.folder).as_posix() for path in files}
            remote.remove(f"{place}/{STATE}")
            remote.each(lambda name: remote.remove(f"{place}/{name}"), sorted(set(files_below(place)) - names))

    def _remove_older(self, states: str, found: Copy) -> None:
        """Remove all states but the newest of this key that are whole: older ones, those of other keys, and what cut uploads left."""
        files = files_below(states)
        whole = sorted(state for state in _states(files) if _key_at(states, f"{state}/{META}", files) == found.key)
        stay = {*whole[-found.keep :], found.place.rpartition("/")[2]}
        for old in sorted({name.split("/")[0] for name in files} - stay):
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


def _key_in(file: Path) -> str:
    """Whose a state or a finished stage on disk is; empty: it does not say."""
    with suppress(OSError, ValueError):
        return _key_of(file.read_bytes())
    return ""


def _key_at(url: str, name: str, there: Mapping[str, int]) -> str:
    """The same of one in a store, among its files."""
    return _key_of(remote.read(f"{url}/{name}", 0, there[name])) if name in there else ""


def _key_of(data: bytes) -> str:
    with suppress(ValueError):
        said = json.loads(data)
        return str(said.get("key", "")) if isinstance(said, dict) else ""
    return ""


def wrong(url: str) -> str:
    """What is known to be wrong with a store without asking it; empty: nothing."""
    protocol = url.partition("://")[0].lower()
    if not is_url(url):
        return f"mirror: got {url}; give a URL such as s3://bucket/NAME, or leave it out, as checkpoints lie in the run folder anyway"
    if glob.has_magic(url):
        return f"mirror: got {url}; a store takes *, ? and [ for a pattern; give a URL without them"
    if protocol in READ_ONLY:
        return f"mirror: got {url}; {protocol} cannot be written; give a store that can, such as s3://bucket/NAME"
    if find_spec("fsspec") is not None:
        import fsspec

        if protocol not in fsspec.available_protocols():
            return f"mirror: got {url}; {protocol} is no known protocol; give one such as s3 or gs"
    return ""


def overlap(url: str, out: Path) -> str:
    """That a store on this machine and the run's folder lie in each other; empty: they do not."""
    protocol, _, path = url.partition("://")
    if protocol.lower() not in _LOCAL:
        return ""
    store, own = at_home(path).resolve(), at_home(out).resolve()
    if not (store.is_relative_to(own) or own.is_relative_to(store)):
        return ""
    return f"mirror: {url} and the run folder {out} lie in each other; give a place beside it, best on another disk"


def begin(out: Path, url: str) -> None:
    """Try a store, and bring the run's log where this machine lacks it.

    Raises:
        UserError: if the store cannot be read or written, before any work.
    """
    url = url.rstrip("/")
    try:
        remote.put(out / CONFIG, f"{url}/{CONFIG}")
        if not (out / LOG).exists():
            with suppress(FileNotFoundError):
                remote.get(f"{url}/{LOG}", out / LOG)
    except OSError as error:
        raise UserError(f"mirror: {url} cannot be used ({error.strerror or error}); correct it, or leave it out") from None
    except UserError as error:
        raise UserError(f"mirror: {error}") from None


def _fetch(url: str, names: Sequence[str], target: Path, temporary: Path, make_room: Callable[[], object] | None = None) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        remote.each(partial(_get, url, temporary), list(names))
        if make_room is not None:
            make_room()
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
