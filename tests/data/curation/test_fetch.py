"""ldm data fetch, with a stand-in for img2dataset and a server of this machine whose links are good, dead, moved, wrong and slow."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from tars import painted

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.curation.fetch import DownloadOptions, columns_of, words_of
from ldm.data.shards import ShardsSource


class Links(BaseHTTPRequestHandler):
    """/N is picture N; other places are wrong in their own way."""

    def do_GET(self) -> None:
        """Answer."""
        place = self.path.strip("/")
        if place == "moved":
            self.send_response(302)
            self.send_header("Location", "/3")
            self.end_headers()
        elif place == "slow":
            time.sleep(3)
        elif place.isdigit() or place == "page":
            data = painted(int(place)) if place.isdigit() else b"<html>gone</html>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Links)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


@pytest.fixture
def program(tmp_path: Path) -> str:
    script = tmp_path / "img2dataset"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parents[1] / "downloader.py"} "$@"\n')
    script.chmod(0o755)
    return str(script)


def table(file: Path, server: str, places: list[str], **columns: list[object]) -> Path:
    rows = {"URL": [f"{server}/{place}" for place in places], "TEXT": [f"picture {place}" for place in places], **columns}
    parquet.write_table(arrow.table(rows), file)
    return file


def test_what_comes_is_counted_and_what_does_not_is_told(server: str, program: str, tmp_path: Path, capsys) -> None:
    file = table(tmp_path / "links.parquet", server, [*map(str, range(8)), "moved", "dead", "page", "slow"])
    words = [
        "data",
        "fetch",
        str(file),
        "--out",
        str(tmp_path / "shards"),
        "--img2dataset",
        program,
        "--allow-private",
        "--shard",
        "5",
        "--timeout",
        "1",
    ]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["links"] == 12 and told["pictures"] == 9 and told["shards"] == 3 and told["wrong"] == []
    assert sum(told["reasons"].values()) == 3 and any("404" in reason for reason in told["reasons"])
    failed = parquet.read_table(told["failed"]).to_pylist()
    assert {row["url"].rsplit("/", 1)[-1] for row in failed} == {"dead", "page", "slow"} and all(row["error"] for row in failed)
    data = ShardsSource(path=str(tmp_path / "shards"), val_share=0.1).build("train")
    assert len(data) in range(7, 9) and data.captions([0], [0], 0)[0].startswith("picture ")
    # Another start fetches nothing again; a shard that was cut is found.
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")}
    assert main(words) == 0 and "9 pictures of 12 links" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("*.tar")} == before
    shard = tmp_path / "shards" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    assert main(words) == 1 and "damaged: 00000.tar" in capsys.readouterr().out


def test_hashes_of_the_table_are_checked(server: str, program: str, tmp_path: Path, capsys) -> None:
    sums = [hashlib.sha256(painted(i)).hexdigest() for i in (0, 1, 7)]
    file = table(tmp_path / "links.parquet", server, ["0", "1", "2"], sha256=sums)
    assert main(["data", "fetch", str(file), "--out", str(tmp_path / "shards"), "--img2dataset", program, "--allow-private", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == 2 and told["reasons"] == {"hash mismatch": 1}


def test_the_words_for_the_program(tmp_path: Path) -> None:
    file = table(tmp_path / "links.parquet", "x", ["0"], AESTHETIC_SCORE=[6.0], pwatermark=[0.1], md5=["a"])
    columns = columns_of(file)
    words = words_of(file, tmp_path / "out", columns, DownloadOptions(distributor="pyspark"))
    said = dict(zip(words[::2], words[1::2], strict=True))
    assert said["--url_col"] == "URL" and said["--caption_col"] == "TEXT" and said["--incremental_mode"] == "incremental"
    assert json.loads(said["--save_additional_columns"]) == ["AESTHETIC_SCORE", "pwatermark"] and said["--distributor"] == "pyspark"
    assert json.loads(said["--verify_hash"]) == ["md5", "md5"] and said["--compute_hash"] == "md5"


def test_mistakes_are_one_line(server: str, program: str, tmp_path: Path, capsys) -> None:
    def fails(*words: str) -> str:
        assert main(["data", "fetch", *words, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    file = str(table(tmp_path / "links.parquet", server, ["dead"]))
    assert "pip install img2dataset" in fails(file, "--img2dataset", "/no/such/program")
    assert "no such table" in fails(str(tmp_path / "none.parquet"), "--img2dataset", program)
    assert "distributor" in fails(file, "--img2dataset", program, "--distributor", "dask")
    assert "no picture came of 1 links" in fails(file, "--img2dataset", program)
    (tmp_path / "text.parquet").write_text("x")
    assert "no parquet table" in fails(str(tmp_path / "text.parquet"), "--img2dataset", program)
    parquet.write_table(arrow.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of links"):
        columns_of(tmp_path / "a.parquet")
