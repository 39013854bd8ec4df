"""Read-ahead of samples that lie side by side: one request for many of them, held until each is taken."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ldm.data import threads

GAP = 2**17  # bytes between two samples that are read along rather than asked around
MOST = 2**25  # bytes of one request
READERS = 8  # requests at the same time


@dataclass(frozen=True)
class Place:
    """Where the bytes of a sample lie."""

    row: int
    shard: int
    offset: int
    size: int


@dataclass
class Span:
    """One request: the bytes of some samples of a shard, and what lies between them."""

    shard: int
    start: int
    end: int
    rows: list[int] = field(default_factory=list)
    data: Future[bytes] = field(default_factory=Future)


def spans_of(places: Sequence[Place]) -> list[Span]:
    """Requests for samples: as few as gaps and lengths allow."""
    found: list[Span] = []
    for place in sorted(places, key=lambda each: (each.shard, each.offset)):
        end, last = place.offset + place.size, found[-1] if found else None
        if last is not None and last.shard == place.shard and place.offset - last.end <= GAP and end - last.start <= MOST:
            last.end = max(last.end, end)
            last.rows.append(place.row)
        else:
            found.append(Span(place.shard, place.offset, end, [place.row]))
    return found


class ReadAhead:
    """Spans that are being read or wait to be taken; safe to call from several threads.

    Args:
        fetch: shard, offset and count to bytes.
    """

    def __init__(self, fetch: Callable[[int, int, int], bytes]) -> None:
        self._fetch, self._lock = fetch, threading.Lock()
        self._of: dict[int, list[Span]] = {}  # by row, in the order of requests
        self._todo: queue.SimpleQueue[Span | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_fetch": self._fetch}  # threads belong to one process

    def __setstate__(self, state: dict[str, Callable[[int, int, int], bytes]]) -> None:
        self.__init__(state["_fetch"])  # type: ignore[misc]

    @property
    def held(self) -> int:
        """Bytes of spans that are not taken yet."""
        with self._lock:
            return sum(span.end - span.start for span in {id(s): s for spans in self._of.values() for s in spans}.values())

    def expect(self, places: Sequence[Place]) -> None:
        """These samples are read soon, each once."""
        spans = spans_of(places)
        with self._lock:
            if self._todo is None:
                self._todo = queue.SimpleQueue()
                for number in range(READERS):
                    threads.start(_work, f"read-ahead-{number}", self._todo, self._fetch)
                weakref.finalize(self, _end, self._todo)
            for span in spans:
                for row in span.rows:
                    self._of.setdefault(row, []).append(span)
                self._todo.put(span)

    def take(self, place: Place) -> bytes | None:
        """The bytes of a sample, once they are here; None: it is not expected.

        Raises:
            OSError: as its request.
        """
        if (span := self.drop(place.row)) is None:
            return None
        data = span.data.result()
        return data[place.offset - span.start : place.offset - span.start + place.size]

    def drop(self, row: int) -> Span | None:
        """A sample is not expected any more; the request that was made for it."""
        with self._lock:
            spans = self._of.get(row)
            if not spans:
                return None
            span = spans.pop(0)
            if not spans:
                del self._of[row]
            return span


def _work(todo: queue.SimpleQueue[Span | None], fetch: Callable[[int, int, int], bytes]) -> None:
    while (span := todo.get()) is not None:
        try:
            span.data.set_result(fetch(span.shard, span.start, span.end - span.start))
        except BaseException as error:
            span.data.set_exception(error)
        span = None  # what was read is its takers' alone


def _end(todo: queue.SimpleQueue[Span | None]) -> None:
    for _ in range(READERS):
        todo.put(None)
