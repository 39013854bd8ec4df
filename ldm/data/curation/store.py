"""Tables in a store, as the database reads them: by requests of ldm's own, which are tried again where that helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from ldm.data import remote

BLOCK = 2**20  # bytes of a request at least
SCHEME = "ldm://"  # before a URL, whose own protocol the database would take for itself


@contextmanager
def _named(url: str) -> Iterator[None]:
    """The store's refusal with what it refused: the database tells the words alone."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{url}: {error.strerror or error}") from None


def store() -> Any:
    """A file system of fsspec's kind over all stores that `ldm.data.remote` opens; its paths are SCHEME and a URL."""
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

    class File(AbstractBufferedFile):
        """One table."""

        def _fetch_range(self, start: int, end: int) -> bytes:
            with _named(self.path):
                return remote.read(self.path, start, end - start)

    class Store(AbstractFileSystem):
        """The stores."""

        protocol = "ldm"
        cachable = False

        @classmethod
        def _strip_protocol(cls, path: Any) -> Any:
            return str(path).removeprefix(SCHEME)

        def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
            own = self._strip_protocol(path)
            with _named(own):
                return {"name": own, "size": remote.size(own), "type": "file"}

        def modified(self, path: str) -> datetime:
            return datetime.fromtimestamp(0, UTC)  # stores do not all tell it, and within one reading a table is one

        def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> Any:
            return [SCHEME + self._strip_protocol(path)]  # names were looked for before

        def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:  # type: ignore[override]
            return File(self, path, mode, block_size=BLOCK, cache_type="readahead", size=self.info(path)["size"])

    return Store()
