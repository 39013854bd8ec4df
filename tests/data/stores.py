"""A web server of a folder for tests: it serves ranges, counts what it is asked, and fails as it is told."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = tuple[str, float]  # what, and a number: a status, seconds, a share
Faults = Callable[[int, str, str], Fault | None]  # of a request's number, method and path


class Server(ThreadingHTTPServer):
    """The server, with what it was asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: Faults = lambda number, method, path: None
        self.headers: dict[str, str] = {}  # sent with every failure
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.sent = self.busy = self.most = 0  # bytes; requests at a time, now and at most
        self.delay_s = 0.0  # before every answer
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, whole: bool) -> None:
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            number = len(server.asked)
            server.asked.append((self.command, path, self.headers.get("Range", "")))
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            time.sleep(server.delay_s)
            self._serve(server.faults(number, self.command, path), path, whole)
        finally:
            with server.lock:
                server.busy -= 1

    def _serve(self, fault: Fault | None, path: str, whole: bool) -> None:
        what, much = fault or ("", 0.0)
        file = self.server.folder / path.lstrip("/")
        if what == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if what == "silent":
            time.sleep(much)
            self.close_connection = True
            return
        if what == "status" or not file.is_file():
            self.send_response(int(much) if what == "status" else 404)
            for name, value in self.server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        start, end = 0, len(data)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found and what != "no ranges":
            start, end = int(found[1]), min(int(found[2]) + 1, len(data))
        body = data[start:end]
        self.send_response(206 if found and what != "no ranges" else 200)
        if what != "no ranges":
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if found and what != "no ranges":
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if not whole:
            return
        if what == "cut":
            body = body[: int(len(body) * much)]
            self.close_connection = True
        if what == "turned":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.wfile.write(body)
        with self.server.lock:
            self.server.sent += len(body)


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """A server of a folder."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
