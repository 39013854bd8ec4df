"""Captions as people leave them: each odd one has a written result, from text files and from tables alike."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tars import painted

from ldm.data.captions import MAX_CHARACTERS, caption_texts, clean, text_captions
from ldm.data.folder import FolderSource
from ldm.data.images import Rejected

FILES: list[tuple[bytes, tuple[str, ...] | str]] = [
    ("utf-16 with mark".encode("utf-16"), ("utf-16 with mark",)),
    (b"\xfe\xff" + "big endian".encode("utf-16-be"), ("big endian",)),
    (b"\xff\xfea\0b", "caption not UTF-8"),  # half a character
    (b"\xff\xfe\x00\xd8", "caption not UTF-8"),  # half a pair
    (b"\xff\xfe\0\0a\0\0\0", ("a",)),  # UTF-32, whose blanks go
    (b"\xed\xa0\x80", "caption not UTF-8"),  # a surrogate
    (b"\xc0\xafetc", "caption not UTF-8"),  # overlong
    (b"one\ntwo\r\nthree\rfour\n\n", ("one", "two", "three", "four")),
    ("a\u2028b\u2029c".encode(), ("a b c",)),
    ("\u2067right to left\u2069".encode(), ("right to left",)),
    ("\ufeff\ufefftwice marked".encode(), ("twice marked",)),
    ("\u200e\u200f".encode(), "empty caption"),
    ("\u200b \ufeff\u00ad\u200d\n\u3000".encode(), "empty caption"),  # characters that show nothing
    (b"\0" * 5000, "empty caption"),
    (b"\x1b[31mred\x1b[0m", ("[31mred [0m",)),
    ("nbsp\u00a0and\u3000wide".encode(), ("nbsp and wide",)),
    (b"<script>alert(1)</script>", ("<script>alert(1)</script>",)),  # text; pages escape it
    (b'{"caption": "not read here"}', ('{"caption": "not read here"}',)),
    ("e\u0301".encode() * 3000, ("é" * MAX_CHARACTERS,)),
    (b"a" * (2**20), ("a" * MAX_CHARACTERS,)),
    (b"a" * (2**20 + 1), "caption too long"),
]
CELLS: list[tuple[object, tuple[str, ...]]] = [
    ("plain", ("plain",)),
    (None, ()),
    ("", ()),
    ("  \n", ()),
    (5, ()),
    (1.5, ()),
    (True, ()),
    ({"text": "a"}, ()),
    ([], ()),
    (["a", "b", "a"], ("a", "b")),
    (["a", 3, None, ["b"], "c "], ("a", "c")),
    ([[["deep"]]], ()),
    ("a\ud800b", ("ab",)),
    (b"bytes", ()),
    ("x" * 10**6, ("x" * MAX_CHARACTERS,)),
]


@pytest.mark.parametrize(("data", "wanted"), FILES, ids=range(len(FILES)))
def test_text_files(data: bytes, wanted: tuple[str, ...] | str, tmp_path: Path) -> None:
    for i in range(14):
        (tmp_path / f"{i}.jpg").write_bytes(painted(i))
        (tmp_path / f"{i}.txt").write_text("fine")
    (tmp_path / "5.txt").write_bytes(data)
    parts = [FolderSource(path=str(tmp_path)).build(split) for split in ("train", "val")]
    found = {part.name(i): tuple(part.all_captions([i])[0]) for part in parts for i in range(len(part))}
    if isinstance(wanted, str):
        assert parts[0].describe()["rejected"] == {wanted: 1} and "5.jpg" not in found
    else:
        assert found["5.jpg"] == wanted


@pytest.mark.parametrize(("cell", "wanted"), CELLS, ids=range(len(CELLS)))
def test_cells(cell: object, wanted: tuple[str, ...]) -> None:
    assert caption_texts(cell) == wanted


def test_tables_of_odd_cells_lose_only_these(tmp_path: Path) -> None:
    for i in range(14):
        (tmp_path / f"{i}.jpg").write_bytes(painted(i))
    odd = [None, 5, ["a", "b"], {"x": 1}, "", "e\u0301"]
    rows = [{"file_name": f"{i}.jpg", "text": odd[i] if i < len(odd) else "fine"} for i in range(14)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [FolderSource(path=str(tmp_path)).build(split) for split in ("train", "val")]
    found = {part.name(i): part.all_captions([i])[0] for part in parts for i in range(len(part))}
    assert set(found) == {"2.jpg", *(f"{i}.jpg" for i in range(5, 14))} and found["2.jpg"] == ["a", "b"] and found["5.jpg"] == ["é"]
    (tmp_path / "metadata.jsonl").unlink()
    lists = pa.array([["a", "b"] if i % 2 else [] for i in range(14)], pa.list_(pa.string()))
    pq.write_table(pa.table({"file_name": [f"{i}.jpg" for i in range(14)], "text": lists}), tmp_path / "metadata.parquet")
    data = FolderSource(path=str(tmp_path)).build("train")
    assert all(words == ["a", "b"] for words in data.all_captions(range(len(data))))


@given(st.binary(max_size=300))
def test_any_bytes_are_clean_lines_or_have_a_reason(data: bytes) -> None:
    try:
        lines = text_captions(data, "x.txt")
    except Rejected as error:
        assert error.reason in ("caption not UTF-8", "empty caption")
        return
    assert lines and all(line == clean(line) != "" and "\n" not in line for line in lines)
    "".join(lines).encode()
