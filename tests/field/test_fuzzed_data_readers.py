"""Every reader of strangers' bytes in a data set ends in bounded time and memory, with a value or one line."""

from __future__ import annotations

import io
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import packed, painted, sample, shard

from ldm.config.errors import UserError
from ldm.data.caption_tables import read_tables
from ldm.data.captions import clean, text_captions
from ldm.data.images import Rejected, probe, view
from ldm.data.shard_index import NAME, open_index
from ldm.data.tables import damage
from ldm.data.tar import Member, members
from tests.ends_soon import ends_soon

COUNTS = [40, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
MOST_MB = 400


def mutated(whole: bytes, cuts: list[tuple[int, int, bytes]], end: int) -> bytes:
    """Bytes with stretches replaced, and cut off at a place."""
    for at, length, other in cuts:
        at %= len(whole) + 1
        whole = whole[:at] + other + whole[at + length :]
    return whole[: end % (len(whole) + 1)] if end % 4 == 0 else whole


def fuzz(count: int, seeds: list[bytes], read: Callable[[bytes], object]) -> None:
    """Read so many mutations of good files, and as many of anything."""
    cut = st.tuples(st.integers(0, 2**20), st.integers(0, 9), st.binary(max_size=9))
    strategy = st.builds(mutated, st.sampled_from(seeds), st.lists(cut, min_size=1, max_size=4), st.integers(0, 2**20))

    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy | st.binary(max_size=400))
    def one(data: bytes) -> None:
        try:
            with ends_soon():
                read(data)
        except (Rejected, UserError) as error:
            assert "\n" not in str(error).strip()
            str(error).encode()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MOST_MB


ROWS = [{"file_name": "0.png", "text": "a, b"}, {"file_name": "./é.png", "text": ["x", "y"], "caption_weight": [1, 2]}, {"image": 3}]
KOHYA = {"0": {"caption": "a", "tags": "b, c"}, "sub/1.png": {"tags": "\ud800"}}
TABLES = {
    "metadata.csv": [
        b'file_name,text,width\r\n0.png,"a ""b""",5\n1.png,x\n',
        b"file_name;caption\n0.png;a\n",
        b'file_name\ttext\n"0.png\t',
    ],
    "metadata.jsonl": ["\n".join(map(json.dumps, ROWS)).encode(), "\n".join(map(json.dumps, ROWS)).encode("utf-16")],
    "metadata.json": [json.dumps(ROWS).encode(), b"[" * 3000, b'{"a": {"caption": 1e999}}'],
    "meta_cap.json": [json.dumps(KOHYA).encode(), b"9" * 6000],
}


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_text(tmp_path: Path, name: str, count: int) -> None:
    def read(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        found = read_tables(tmp_path, [name], ["0.png", "é.png", "sub/1.png"])
        json.dumps([found.captions, found.rejected, found.absent]).encode()
        assert all(text == clean(text) for texts in (*found.captions.values(), *found.spare.values()) for text in texts)
        assert set(found.captions) | set(found.spare) <= {"0.png", "é.png", "sub/1.png"}

    fuzz(count, TABLES[name], read)


@pytest.mark.parametrize("count", COUNTS)
def test_tables_of_parquet(tmp_path: Path, count: int) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"file_name": ["0.png", "1.png"], "text": ["a", "b"], "width": [1.0, 2.0]}), out)

    def read(data: bytes) -> None:
        (tmp_path / "metadata.parquet").write_bytes(data)
        read_tables(tmp_path, ["metadata.parquet"], ["0.png"])

    fuzz(count, [out.getvalue()], read)


@pytest.mark.parametrize("old", [b"caption_of", b"a bold cat"])
def test_parquet_with_names_or_texts_that_are_no_utf_8(tmp_path: Path, old: bytes) -> None:
    out = io.BytesIO()
    pq.write_table(
        pa.table({"file_name": ["0.png"], "caption_of": ["a"], "text": ["a bold cat"]}), out, compression="none", store_schema=False
    )
    data = out.getvalue()
    assert old in data
    file = tmp_path / "metadata.parquet"
    file.write_bytes(data.replace(old, b"\x80" * len(old)))
    with pytest.raises(UserError, match=r"metadata\.parquet: not a whole parquet file \(.*utf-8"):
        read_tables(tmp_path, [file.name], ["0.png"])
    assert (said := damage([str(file)])) and said.startswith(str(file)) and "utf" in said.lower()


@pytest.mark.parametrize("count", COUNTS)
def test_caption_files(count: int) -> None:
    def read(data: bytes) -> None:
        for text in text_captions(data, "x.txt"):
            text.encode()
            assert text == clean(text) != ""

    fuzz(count, [b"a dog\nanother", "рыжая кошка".encode("utf-16-le"), "नीला".encode("utf-32"), b"\xff\xfe\0\0"], read)


@pytest.mark.parametrize("count", COUNTS)
def test_archives(count: int) -> None:
    long = packed([("a" * 200 + ".png", b"x" * 700), ("b.txt", b"y")])

    def read(data: bytes) -> None:
        for found in members(io.BytesIO(data), 2**20):
            if isinstance(found, Member):
                assert 0 <= found.offset <= found.offset + found.size <= len(data)

    fuzz(count, [long, packed(sample("k", 1))], read)


@pytest.mark.parametrize("count", COUNTS)
def test_pictures(count: int) -> None:
    files = [painted(1, (40, 36), kind) for kind in ("JPEG", "PNG", "WEBP")]
    for mode, kind in (("F", "TIFF"), ("I;16", "PNG"), ("P", "GIF"), ("RGBA", "TIFF")):
        out = io.BytesIO()
        Image.new(mode if mode != "P" else "RGB", (24, 20)).convert(mode if mode == "P" else None).save(out, kind)
        files.append(out.getvalue())

    def read(data: bytes) -> None:
        probe(data, 10**6)
        assert view(data, 16, max_pixels=10**6).pixels.shape == (16, 16, 3)

    fuzz(count, files, read)


@pytest.mark.parametrize("count", COUNTS)
def test_indexes_that_lie_beside_shards(tmp_path: Path, count: int) -> None:
    shard(tmp_path, 0, 3)
    open_index(str(tmp_path))
    file = tmp_path / NAME

    def read(data: bytes) -> None:
        file.unlink()
        file.write_bytes(data)
        found = open_index(str(tmp_path))
        assert len(found) == sum(record.samples for record in found.shards)
        for row in range(len(found)):
            assert found.entry(row).captions

    fuzz(count, [file.read_bytes()], read)
