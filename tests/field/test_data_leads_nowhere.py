"""Strangers' data sets show what is in them and nothing else of this machine; what they write costs bounded time."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import sys
import tarfile
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import packed, painted, sample, shard

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.curation import fetch
from ldm.data.folder import FolderSource
from ldm.data.hugging_face import DatasetsSource
from ldm.data.images import Rejected
from ldm.data.index_file import IndexFile, write
from ldm.data.shard_index import NAME, open_index
from ldm.data.shard_reader import COLUMNS, shard_part
from ldm.data.shards import ShardsSource
from ldm.data.tar import Damage, Member, members
from tests.ends_soon import ends_soon


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture that is no part of the data set."""
    file = tmp_path / "private" / "secret.png"
    file.parent.mkdir()
    file.write_bytes(painted(99, kind="PNG"))
    (file.parent / "secret.txt").write_text("a password")
    return file


def own(root: Path, count: int = 12) -> Path:
    for i in range(count):
        (root / "own").mkdir(parents=True, exist_ok=True)
        (root / "own" / f"{i}.jpg").write_bytes(painted(i))
        (root / "own" / f"{i}.txt").write_text(f"own {i}")
    return root


# Paths


def test_links_of_a_folder_that_lead_out_are_left_out(tmp_path, secret):
    root = own(tmp_path / "set")
    (root / "direct.png").symlink_to(secret)
    (root / "direct.txt").write_text("told")
    (root / "all").symlink_to(secret.parent)
    (root / "own" / "0.txt").unlink()
    (root / "own" / "0.txt").symlink_to(secret.with_suffix(".txt"))
    (root / "inside.jpg").symlink_to(root / "own" / "1.jpg")
    (root / "inside.txt").symlink_to("own/1.txt")
    os.mkfifo(root / "own" / "pipe.png")
    os.mkfifo(root / "own" / "2.caption")
    data = FolderSource(path=str(root), max_bad=1.0).build("train")
    assert data.total == 12  # 0.jpg lost its caption, inside.jpg is there
    assert {r.name for r in data.rejected if r.reason == "link leads out"} == {"direct.png", "all", "own/0.txt"}
    assert FolderSource(path=str(root), outside=True).build("train").total == 15
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert FolderSource(path=str(linked), max_bad=1.0).build("train").total == 12  # the folder itself may be a link


def rows_that_name(root: Path, paths: list[str]) -> str:
    root.mkdir(exist_ok=True)
    cells = [{"bytes": painted(i) if not path else None, "path": path or None} for i, path in enumerate(paths)]
    file = root / "x.parquet"
    pq.write_table(pa.table({"image": cells, "text": [f"row {i}" for i in range(len(paths))]}), file)
    return str(file)


def test_rows_read_no_file_outside_the_data_set(tmp_path, secret):
    root = own(tmp_path / "set")
    (root / "link.png").symlink_to(secret)
    outside = [str(secret), "../private/secret.png", "link.png", "own/../../private/secret.png", "/dev/zero", "own"]
    path = rows_that_name(root, ["", "", "own/1.jpg", str(root / "own" / "2.jpg"), *outside])
    data = DatasetsSource(path=path, max_bad=1.0).build("train")
    assert data.total == 4
    reasons = [r.reason for r in data.rejected]
    assert reasons.count("leads out of the data") == 5 and reasons.count("unreadable file") == 1
    assert DatasetsSource(path=path, max_bad=1.0, outside=True).build("train").total == 8


def test_a_saved_data_set_names_no_file_outside(tmp_path, secret):
    import datasets

    root = tmp_path / "saved"
    datasets.Dataset.from_dict({"image": [painted(i) for i in range(4)], "text": ["a"] * 4}).save_to_disk(str(root))
    assert DatasetsSource(path=str(root)).build("train").total == 4
    state = json.loads((root / "state.json").read_text())
    state["_data_files"] = [{"filename": "../private/data.arrow"}]
    (root / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"names '\.\./private/data\.arrow', which leads out"):
        DatasetsSource(path=str(root)).build("train")


def test_shards_are_those_of_the_folder_and_samples_those_of_the_shard(tmp_path):
    shard(tmp_path / "elsewhere", 0, 5)
    root = shard(tmp_path / "set", 1, 5).parent
    (root / "other.tar").symlink_to(tmp_path / "elsewhere" / "00000.tar")
    with pytest.raises(UserError, match=r"other\.tar is a link that leads out of .*data\.outside=true"):
        ShardsSource(path=str(root)).build("train")
    assert ShardsSource(path=str(root), outside=True).build("train").total == 10
    (root / "other.tar").unlink()
    part = IndexFile(root / NAME).part(0)
    told = [(name, part.columns[name].astype(object).tolist()) for name in COLUMNS if name in part.columns]
    rows = dict(told) | {"key": [f"k{i}" for i in range(5)], "captions": [["a"]] * 5}
    for column, values in {"size": [2**61] * 5, "offset": [2**40] * 5, "captions": [[]] * 5}.items():
        (root / NAME).unlink()
        write(root / NAME, [lambda wrong=rows | {column: values}: shard_part(part.record, wrong)])
        with pytest.raises(UserError, match="is damaged"):
            open_index(str(root)).entry(3)


def test_members_that_name_paths_are_labels(tmp_path, secret):
    names = [f"../private/{i}" for i in range(2)] + ["/etc/x", "a/../../b"]
    (tmp_path / "a.tar").write_bytes(packed(m for i, name in enumerate(names) for m in sample(name, i)))
    data = ShardsSource(path=str(tmp_path / "a.tar")).build("train")
    assert {data.name(i) for i in range(3)} <= {f"a.tar/{name}" for name in names} and len(list(tmp_path.rglob("*.jpg"))) == 0


# Archives


def extended(kind: bytes, data: bytes) -> bytes:
    head = tarfile.TarInfo("p")
    head.size, head.type = len(data), kind
    return head.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("record", [b"size=" + b"9" * 5000, b"size=" + "²".encode(), b"size=-5", b"size=9" + b"0" * 25])
def test_sizes_of_any_digits_are_damage(record):
    length = len(record) + 6
    record = f"{length} ".encode() + record + b"\n"
    record = f"{len(record) if len(str(len(record))) == len(str(length)) else length} ".encode() + record.split(b" ", 1)[1]
    found = list(members(io.BytesIO(extended(b"x", record) + packed([("0.png", b"x")])), 2**20))
    assert any(isinstance(f, Damage) and "extended header" in str(f) and len(str(f)) < 300 for f in found)


def test_many_records_are_read_in_linear_time():
    data = b"5 a=\n" * 200_000
    with ends_soon():  # quadratic: minutes
        found = list(members(io.BytesIO(extended(b"x", data) * 4 + packed([("0.png", b"x")])), 2**20))
    assert [f.name for f in found if isinstance(f, Member)] == ["0.png"]


# Links


def guard() -> Any:
    file = Path(fetch.__file__).parents[1] / "link_guard" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("link_guard_of_the_test", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("place", "public"),
    [
        *((place, False) for place in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1")),
        *(
            (place, False)
            for place in ("::1", "fe80::1%eth0", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1")
        ),
        *((place, True) for place in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")),
    ],
)
def test_public_addresses(place, public):
    assert guard().is_public(place) is public


class Answers(BaseHTTPRequestHandler):
    """Links that lead elsewhere, that never end and that trickle."""

    def do_GET(self) -> None:
        """Answer."""
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(bytes(65536))
            while self.path == "/trickle":
                self.wfile.write(b"x")
                time.sleep(0.1)
            self.wfile.write(b"fine")
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made.server_port
    made.shutdown()


def test_each_redirect_is_looked_at_and_time_and_size_are_bounded(port, monkeypatch):
    module = guard()
    monkeypatch.setattr(module, "is_public", lambda place: place == "127.0.0.1")  # as if this alone were public
    monkeypatch.setattr(socket, "getaddrinfo", _resolving(socket.getaddrinfo))
    rules = {"private": False, "seconds": 1.0, "bytes": 100_000}

    def get(place: str) -> bytes:
        return bytes(module._fetch(rules, place, None, 5.0, None).read())

    base = f"http://127.0.0.1:{port}"
    assert get(f"{base}/x") == b"fine" == get(f"{base}/to/{base}/x")
    for wrong in (f"{base}/to/http://127.0.0.2:{port}/x", f"{base}/to/http://inside.test:{port}/x", f"http://inside.test:{port}/x"):
        with pytest.raises(urllib.error.URLError, match=r"is 127\.0\.0\.2, not a public address"):
            get(wrong)
    for wrong in (f"{base}/to/file:///etc/hostname", "file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x"):
        with pytest.raises((urllib.error.URLError, urllib.error.HTTPError)):
            get(wrong)
    with pytest.raises(urllib.error.URLError, match="more than 100000 bytes"):
        get(f"{base}/endless")
    started = time.monotonic()
    with pytest.raises(urllib.error.URLError, match="not done within"):
        get(f"{base}/trickle")
    assert time.monotonic() - started < 120


def _resolving(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda host, *rest, **more: real("127.0.0.2" if host == "inside.test" else host, *rest, **more)


def test_fetch_refuses_what_leads_into_the_machine(tmp_path, port, secret, capsys):
    program = tmp_path / "img2dataset"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parents[1] / "data" / "downloader.py"} "$@"\n')
    program.chmod(0o755)
    links = [secret.as_uri(), f"http://localhost:{port}/x", f"http://2130706433:{port}/x", f"http://127.1:{port}/x", "ftp://localhost/x"]
    pq.write_table(pa.table({"url": links, "caption": ["x"] * len(links)}), tmp_path / "links.parquet")
    words = ["data", "fetch", str(tmp_path / "links.parquet"), "--out", str(tmp_path / "out"), "--img2dataset", str(program)]
    assert main([*words, "--seconds", "30", "--max-mb", "1"]) == 2 and "no picture came of 5 links" in capsys.readouterr().err
    errors = [row["error_message"] for row in pq.read_table(tmp_path / "out" / "00000.parquet").to_pylist()]
    assert sum("not a public address" in error for error in errors) == 3 and sum("unknown url type" in error for error in errors) == 2
    assert main([*words, "--distributor", "pyspark"]) == 2 and "--allow-private" in capsys.readouterr().err
    program.write_text("#!/bin/sh\nexit 0\n")
    assert main(words) == 2 and "takes no guard" in capsys.readouterr().err


def test_half_characters_and_control_codes_reach_no_terminal(tmp_path, capsys):
    root = own(tmp_path / "set", 3)
    (root / "metadata.jsonl").write_text(
        '{"file_name": "\\ud800\\u001b[2J.png", "text": "a\\udc00b"}\n{"file_name": "own/0.jpg", "text": "a\\udc00b"}'
    )
    (root / "own" / "x\x1b[31m.svg").write_text("<svg/>")
    (root / "link.jpg").symlink_to(Path(__file__))
    assert main(["data", "check", str(root), "--decode", "0"]) == 0 and "link leads out" in capsys.readouterr().out
    assert main(["data", "check", str(root), "--decode", "0", "--outside"]) == 0 and "link leads out" not in capsys.readouterr().out
    assert main(["data", "check", str(root), "--decode", "0", "--json"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "half a character" in said


def test_what_is_no_ordinary_file_is_no_picture(tmp_path):
    from ldm.data.images import read_file

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Rejected, match="not an ordinary file"):
        read_file(tmp_path / "pipe")
