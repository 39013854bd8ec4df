"""File store of the page: uploads, results with their recipes, each user's history, all of it bounded, and the gallery that stays."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import time
import zipfile
from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.sampling.recipe import Recipe, claim, read_recipe, save_picture

KEPT = 120  # pictures in a user's history
USERS = 500  # whose history is kept
PERIOD_S = 20
GALLERY = 2**34  # bytes of the gallery, of all users together
PICTURES = "pictures"


@dataclass(frozen=True)
class Kept:
    """A picture of someone's history."""

    path: Path
    recipe: Recipe
    stays: Path | None = None  # its file in the gallery


class Shelf:
    """A folder of at most about `most` bytes; the oldest files go first. The gallery is another folder, from which nothing goes by itself.

    Args:
        folder: where uploads and results lie; removed by whoever made it.
        most: bytes.
        gallery: where pictures stay, each user's in a folder of their own; None: nowhere.
    """

    def __init__(self, folder: Path, most: int = 2**31, gallery: Path | None = None) -> None:
        self.folder, self.most, self.gallery = folder, most, gallery
        self._lock = threading.Lock()
        self._history: OrderedDict[str, deque[Kept]] = OrderedDict()
        self._size = sum(path.stat().st_size for path in gallery.rglob("*.png")) if gallery is not None else 0
        self._stop = threading.Event()
        threading.Thread(target=self._watch, name="shelf", daemon=True).start()

    def keep(self, user: str, recipe: Recipe, pixels: Any) -> Path:
        """Write a picture (H,W,3) uint8 with its recipe under a name that nobody guesses, and remember it for its user."""
        path = self._place(f"seed{recipe.seed}.png")
        save_picture(path, pixels, recipe)
        with self._lock:
            own = self._of(user)  # before the gallery has this one, too
            own.appendleft(Kept(path, recipe, None if self.gallery is None else self._stay(user, path)))
        return path

    def put(self, name: str, data: bytes) -> Path:
        """Write any file under a name that nobody guesses."""
        path = self._place(name)
        path.write_bytes(data)
        return path

    def history(self, user: str) -> list[Kept]:
        """What a user drew, the newest first, as far as it is still there."""
        with self._lock:
            own = self._of(user)
            for place, one in enumerate(own):
                if one.stays is not None and not one.path.is_file() and one.stays.is_file():  # swept; the gallery has it
                    own[place] = replace(one, path=self._place(one.path.name))
                    _same(one.stays, own[place].path)
            found = list(own)
        return [one for one in found if one.path.is_file()]

    def forget(self, user: str, one: Path | None = None) -> None:
        """Remove what a user drew, or one picture of it, from the gallery too."""
        with self._lock:
            found = self._of(user)
            gone = [kept for kept in found if one is None or kept.path == one]
            for kept in gone:
                found.remove(kept)
        if one is None and self.gallery is not None:  # what is older than a history is long, too
            for path in self._own(user).glob("*.png"):
                self._drop(path)
        for kept in gone:
            kept.path.unlink(missing_ok=True)
            if kept.stays is not None:
                self._drop(kept.stays)

    def packed(self, user: str) -> Path:
        """A ZIP file of all that a user has drawn.

        Raises:
            UserError: if there is nothing.
        """
        found = sorted(self._own(user).glob("*.png")) if self.gallery is not None else []
        named = {path.name: path for path in found}
        for number, kept in enumerate(reversed(self.history(user))):
            if kept.stays is None:
                named[f"{number:05}_{kept.path.name}"] = kept.path
        if not named:
            raise UserError("history: nothing is in it yet")
        path = self._place("pictures.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for name, one in named.items():
                archive.write(one, name)
        return path

    def sweep(self) -> None:
        """Remove the oldest files until the rest fits."""
        found = []
        for path in self.folder.rglob("*"):
            try:
                if path.is_file() and not path.is_symlink():
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, stat.st_size, path))
            except OSError:  # gone meanwhile
                continue
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda one: one[0]):
            if total <= self.most:
                return
            path.unlink(missing_ok=True)
            total -= size

    def close(self) -> None:
        """Stop sweeping."""
        self._stop.set()

    def _place(self, name: str) -> Path:
        folder = self.folder / PICTURES / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        return folder / name

    def _of(self, user: str) -> deque[Kept]:
        """A user's history, which begins with what the gallery has of them; the lock is held."""
        if user not in self._history:
            self._history[user] = deque(self._stayed(user), maxlen=KEPT)
        self._history.move_to_end(user)
        while len(self._history) > USERS:
            self._history.popitem(last=False)
        return self._history[user]

    def _own(self, user: str) -> Path:
        """A user's folder in the gallery, whose name does not tell the cookie."""
        return (self.gallery or Path()) / hashlib.sha256(user.encode()).hexdigest()[:16]

    def _stayed(self, user: str) -> list[Kept]:
        found = []
        for path in sorted(self._own(user).glob("*.png"), reverse=True)[:KEPT] if self.gallery is not None else []:
            try:
                recipe = read_recipe(path)
                if isinstance(recipe, Recipe):
                    copy = self._place(f"seed{recipe.seed}.png")
                    _same(path, copy)
                    found.append(Kept(copy, recipe, path))
            except (UserError, OSError):  # a file that somebody else put there
                continue
        return found

    def _stay(self, user: str, path: Path) -> Path | None:
        """Put a picture into its user's gallery; None: it is full."""
        own, size = self._own(user), path.stat().st_size
        if self._size + size > GALLERY:
            return None
        own.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        number = sum(1 for _ in own.glob(f"{stamp}-*"))  # so that names go in the order of drawing
        while True:
            target = own / f"{stamp}-{number:02}-{path.name}"
            try:
                _same(path, target)
                break
            except FileExistsError:
                number += 1
        self._size += size
        return target

    def _drop(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            path.unlink()
            self._size -= size
        except OSError:  # somebody else removed it
            return

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.sweep()


def _same(path: Path, target: Path) -> None:
    """The same file under another name: a hard link, or a copy where there are none.

    Raises:
        FileExistsError: if the name is taken.
    """
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:  # another file system
        copy = target.with_name(f".{target.name}.{os.getpid()}.partial")
        shutil.copyfile(path, copy)
        try:
            claim(copy, target)
        finally:
            copy.unlink(missing_ok=True)
