"""Calls of the page that its own script never makes are refused, and Ctrl+C ends it soon."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_server import Served, ask, served

JOIN = "/gradio_api/queue/join"


@pytest.fixture(scope="module")
def server(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(kl_model, tmp_path_factory.mktemp("files")) as made:
        yield made


def test_no_call_is_answered_with_an_error_of_the_server(server: Served, capfd: pytest.CaptureFixture[str]) -> None:
    known = server.guard.functions
    assert known[0] > 0
    bodies: list[Any] = [[], 3, "x", None, {}, {"data": 3}, {"data": [], "fn_index": 0}, "\ud800"]
    bodies += [{"data": [], "fn_index": number, "session_hash": "a"} for number in (0, 999, -1, 10**400, "1", "x", None, 1.5, True, [], {})]
    whole = {"data": [None] * known[0], "fn_index": 0, "session_hash": "a"}
    bodies += [{**whole, name: value} for name, value in (("session_hash", 3), ("session_hash", "\ud800"), ("trigger_id", "x"))]
    for body in bodies:
        status, said, _ = ask(server.port, "POST", JOIN, json.dumps(body).encode(), {"Content-Type": "application/json"})
        assert 400 <= status < 500, (body, said)
    for path in ("/gradio_api/cancel", "/gradio_api/reset"):
        for body in ({}, [], {"event_id": None}, {"session_hash": 3, "fn_index": "x", "event_id": 3}, {"session_hash": "\ud800"}):
            status, said, _ = ask(server.port, "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
            assert 400 <= status < 500, (path, body, said)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_lengths_that_are_none(server: Served) -> None:
    import socket

    for length in ("²", "9" * 5000):
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as line:
            line.sendall(f"POST {JOIN} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode("latin-1"))
            assert line.recv(64).startswith((b"HTTP/1.1 400", b"HTTP/1.1 413"))


BUSY = """
import sys, threading, time
from ldm.demo import server
server.END_S = 1.0
threading.Thread(target=time.sleep, args=(250,)).start()
server._end_soon(sys.argv[1])
print("ready", flush=True)
"""


def test_the_end_waits_for_no_thread(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    child = subprocess.Popen([sys.executable, "-c", BUSY, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    began = time.monotonic()
    assert child.wait(200) == 130 and time.monotonic() - began < 150
    assert child.stderr is not None and child.stderr.read() == "ldm demo: interrupted\n" and not folder.exists()
