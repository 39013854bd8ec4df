"""A data set is what it holds: hashes are read once, places and times of files do not count, and what changed is told."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import painted, shard

from ldm.data.concatenation import ConcatenationSource, RepeatedSource
from ldm.data.content import ContentHashes, DataChange, compare
from ldm.data.folder import FolderSource
from ldm.data.hugging_face import DatasetsSource
from ldm.data.shards import ShardsSource


def folder(root: Path, count: int = 8) -> Path:
    root.mkdir(exist_ok=True)
    for i in range(count):
        (root / f"{i}.jpg").write_bytes(painted(i))
        (root / f"{i}.txt").write_text(f"picture {i}")
    return root


def test_copies_and_touched_files_are_the_same_data(tmp_path):
    first = FolderSource(path=str(folder(tmp_path / "a"))).build("train")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    for file in (tmp_path / "b").iterdir():
        os.utime(file, (1, 1))
    again = FolderSource(path=str(tmp_path / "b")).build("train")
    assert again.fingerprint() == first.fingerprint() and np.array_equal(again.marks(), first.marks())
    pq.write_table(pa.table({"image": [painted(i) for i in range(4)], "text": ["x"] * 4}), tmp_path / "a.parquet")
    shutil.copy(tmp_path / "a.parquet", tmp_path / "c.parquet")
    os.utime(tmp_path / "c.parquet", (1, 1))
    assert len({DatasetsSource(path=str(tmp_path / f"{n}.parquet")).build("train").fingerprint() for n in "ac"}) == 1


def test_each_file_is_read_once_and_the_folder_stays_as_it_is(tmp_path, monkeypatch):
    root = folder(tmp_path / "a")
    before = sorted(p.name for p in root.rglob("*"))
    first = FolderSource(path=str(root)).build("train").fingerprint()
    assert sorted(p.name for p in root.rglob("*")) == before
    monkeypatch.setattr(ContentHashes, "_in_memory", {})  # another process
    opened: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self), real(self, *a, **k))[1])
    hashes = ContentHashes(root)
    for file in root.glob("*.jpg"):
        hashes.of(file, file.name, file.stat())
    assert [file for file in opened if file.suffix == ".jpg"] == []
    monkeypatch.setenv("LDM_CACHE", "/dev/null/nowhere")  # cannot be written: read again, the same result
    monkeypatch.setattr(ContentHashes, "_in_memory", {})
    assert FolderSource(path=str(root)).build("train").fingerprint() == first


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b'{"0.jpg": 5}', b'{"0.jpg": [1, 2, 3]}', b"[" * 10**5])
def test_a_damaged_side_file_costs_a_read_and_nothing_else(tmp_path, monkeypatch, content):
    root = folder(tmp_path / "a")
    first = FolderSource(path=str(root)).build("train").fingerprint()
    ContentHashes(root)._file.write_bytes(content)
    monkeypatch.setattr(ContentHashes, "_in_memory", {})
    assert FolderSource(path=str(root)).build("train").fingerprint() == first


def test_what_changed_is_counted(tmp_path):
    root = folder(tmp_path / "a", 12)
    source = FolderSource(path=str(root), val_share=1e-9)
    old = source.build("train").marks()
    names = source.build("train").names
    (root / names[0]).unlink()
    (root / names[1]).with_suffix(".txt").write_text("other words")
    (root / names[2]).write_bytes(painted(77))
    for i in (20, 21, 22, 23):
        (root / f"{i}.jpg").write_bytes(painted(i))
        (root / f"{i}.txt").write_text("new")
    change = compare(old, source.build("train").marks())
    assert change == DataChange(added=4, removed=1, altered=2) and str(change) == "4 added, 1 removed, 2 altered"


def test_marks_of_shards_and_of_several_sources(tmp_path):
    shard(tmp_path / "s", 0, 4)
    folder(tmp_path / "a")
    shards, pictures = ShardsSource(path=str(tmp_path / "s")), FolderSource(path=str(tmp_path / "a"))
    parts = (RepeatedSource(source=shards), RepeatedSource(source=pictures), RepeatedSource(source=pictures))
    marks = ConcatenationSource(parts=parts).build("train").marks()
    assert marks is not None and len({tuple(row) for row in marks.tolist()}) == len(marks) == 3 + 7 + 7
    shard(tmp_path / "s", 1, 3)
    change = compare(shards.build("train").marks(), ShardsSource(path=str(tmp_path / "s" / "00000.tar")).build("train").marks())
    assert change.added == 0 and change.removed >= 2 and change.altered == 0
