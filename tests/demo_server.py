"""The page of `ldm demo` on a port of this machine, in this process."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.demo.server import application, listen
from ldm.demo.studio import Studio
from ldm.families.registry import load


@dataclass
class Served:
    """A page that answers."""

    port: int
    files: Path
    studio: Studio
    guard: Any

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}/"


@contextmanager
def served(model: Path, files: Path, **options: Any) -> Iterator[Served]:
    """Open the page of a model until the block ends."""
    import uvicorn

    with listen("127.0.0.1", 0) as listener, Studio(load(model)) as studio:
        guard = application(studio, files, "tiny", **options)
        server = uvicorn.Server(uvicorn.Config(guard, log_level="critical", access_log=False, timeout_graceful_shutdown=1, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield Served(listener.getsockname()[1], files, studio, guard)
        finally:
            server.should_exit = True
            thread.join()


def ask(port: int, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> tuple[int, bytes, Any]:
    """One request: its status, body and the whole answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.putrequest(method, path, skip_host="Host" in (headers or {}))
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer
    connection.close()
    return found


def until(happened: Any, seconds: float = 120) -> None:
    """Wait for something that must happen."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.01)
