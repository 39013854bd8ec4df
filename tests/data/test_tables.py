"""Parquet tables as people have them: what is wrong with one is said of its file and column, and no row of text fills the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import painted

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data import tables
from ldm.data.folder import FolderSource

GOOD = {"URL": ["http://a/1", "http://a/2"], "TEXT": ["a", "b"], "WIDTH": [600, 700], "HEIGHT": [600, 700], "AESTHETIC_SCORE": [6.0, 4.0]}
LONG = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array(["x" * 400_000]))  # 1.2 GB of 400 kB


def broken_text() -> pa.Array:
    offsets = pa.py_buffer(np.array([0, 2, 3], np.int32).tobytes())
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xff\xfeb")])


def plain(**columns: object) -> Callable[[Path], None]:
    return lambda file: pq.write_table(pa.table(GOOD | columns), file)


def cut(file: Path) -> None:
    plain()(file)
    file.write_bytes(file.read_bytes()[:-30])


def zeroed(file: Path) -> None:
    pq.write_table(pa.table({name: values * 2000 for name, values in GOOD.items()}), file)
    data = bytearray(file.read_bytes())
    data[200:260] = bytes(60)
    file.write_bytes(bytes(data))


def mixed(file: Path) -> None:
    plain()(file)
    plain(WIDTH=[{"px": 1}, {"px": 2}])(file.with_name("other.parquet"))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "lists for numbers": (plain(WIDTH=[[1, 2], [3]]), "column WIDTH holds BIGINT[], not numbers"),
    "times for numbers": (plain(HEIGHT=pa.array([1, 2], pa.timestamp("s"))), "column HEIGHT holds TIMESTAMP"),
    "structures for links": (plain(URL=[{"a": 1}, {"a": 2}]), "column URL holds STRUCT(a BIGINT), not texts"),
    "text that is not UTF-8": (plain(TEXT=broken_text()), "column TEXT is damaged"),
    "cut off": (cut, "not a whole parquet file"),
    "a page of zeros": (zeroed, "column TEXT is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "not a whole parquet file"),
    "a csv": (lambda file: file.write_text("URL,TEXT\na,b\n"), "not a whole parquet file"),
    "no columns": (lambda file: pq.write_table(pa.table({}), file), "Need at least one non-root column"),
    "nothing known": (plain(WIDTH=pa.nulls(2)), "none of 2 rows passes: 2 by side >= 512 px (unknown)"),
    "another type in the second file": (mixed, "WIDTH"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_named_with_its_column(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = BAD[name]
    make(tmp_path / "links.parquet")
    words = ["--out", str(tmp_path / "out"), "--min-side", "512", "--unique", "url"]
    assert main(["data", "curate", str(tmp_path), *words]) == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told and told.count("\n") == 1
    assert "links.parquet" in told or name in ("nothing known", "another type in the second file")


def test_rows_whose_cells_cannot_be_read_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain()(tmp_path / "a.parquet")
    plain(URL=["http://b/1", None], WIDTH=["600", "y"], AESTHETIC_SCORE=["6", None])(tmp_path / "b.parquet")
    assert main(["data", "curate", str(tmp_path), "--out", str(tmp_path / "out"), "--min-side", "512", "--min-aesthetic", "5"]) == 0
    assert "1  side >= 512 px, 1 alone, 1 of them unknown" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "out" / "train.parquet")["URL"].to_pylist() == ["http://a/1", "http://b/1"]


def test_an_earlier_result_stays_where_no_row_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain()(tmp_path / "a.parquet")
    words = ["data", "curate", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out"), "--min-side"]
    assert main([*words, "512"]) == 0
    before = (tmp_path / "out" / "train.parquet").read_bytes()
    assert main([*words, "5000"]) == 2 and "2 by side >= 5000 px" in capsys.readouterr().err
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before


def test_a_dictionary_bomb_does_not_fill_the_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(LONG)
    rows = {"URL": [str(i) for i in range(count)], "TEXT": LONG, "WIDTH": [600] * count, "HEIGHT": [600] * count}
    pq.write_table(pa.table(rows), tmp_path / "bomb.parquet")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**20
    words = ["--out", str(tmp_path / "out"), "--min-side", "512", "--memory-mb", "128"]
    assert main(["data", "curate", str(tmp_path), *words]) == 2
    assert "raise --memory-mb" in capsys.readouterr().err
    with pq.ParquetFile(tmp_path / "bomb.parquet") as opened:
        assert {len(row["TEXT"]) for row in tables.rows(opened, ["TEXT"])} == {tables.LONGEST}


def test_captions_of_a_bomb_are_cut(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i}.jpg").write_bytes(painted(i))
    names = [f"{i % 12}.jpg" for i in range(120)]
    pq.write_table(pa.table({"file_name": names, "text": LONG[:120]}), tmp_path / "metadata.parquet")
    data = FolderSource(path=str(tmp_path)).build("train")
    assert all(len(caption) <= 2000 for captions in data.all_captions(range(len(data))) for caption in captions)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"metadata\.parquet: not a whole parquet file"):
        FolderSource(path=str(tmp_path)).build("train")
