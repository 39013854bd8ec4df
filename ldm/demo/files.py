"""File store of the page: uploads, results with their recipes, and each user's history, all of it bounded."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.sampling.recipe import Recipe, save_picture

KEPT = 120  # pictures in a user's history
USERS = 500  # whose history is kept
PERIOD_S = 20


@dataclass(frozen=True)
class Kept:
    """A picture of someone's history."""

    path: Path
    recipe: Recipe


class Shelf:
    """A folder of at most about `most` bytes; the oldest files go first.

    Args:
        folder: where uploads and results lie; removed by whoever made it.
        most: bytes.
    """

    def __init__(self, folder: Path, most: int = 2**31) -> None:
        self.folder, self.most = folder, most
        self._lock = threading.Lock()
        self._history: OrderedDict[str, deque[Kept]] = OrderedDict()
        self._stop = threading.Event()
        threading.Thread(target=self._watch, name="shelf", daemon=True).start()

    def keep(self, user: str, recipe: Recipe, pixels: Any) -> Path:
        """Write a picture (H,W,3) uint8 with its recipe under a name that nobody guesses, and remember it for its user."""
        folder = self.folder / "pictures" / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        path = folder / f"seed{recipe.seed}.png"
        save_picture(path, pixels, recipe)
        with self._lock:
            self._history.setdefault(user, deque(maxlen=KEPT)).appendleft(Kept(path, recipe))
            self._history.move_to_end(user)
            while len(self._history) > USERS:
                self._history.popitem(last=False)
        return path

    def put(self, name: str, data: bytes) -> Path:
        """Write any file under a name that nobody guesses."""
        folder = self.folder / "pictures" / secrets.token_urlsafe(16)
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        return folder / name

    def history(self, user: str) -> list[Kept]:
        """What a user drew, the newest first, as far as it is still there."""
        with self._lock:
            found = list(self._history.get(user, ()))
        return [one for one in found if one.path.is_file()]

    def forget(self, user: str) -> None:
        """Remove what a user drew."""
        with self._lock:
            found = self._history.pop(user, deque())
        for one in found:
            one.path.unlink(missing_ok=True)

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

    def _watch(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self.sweep()
