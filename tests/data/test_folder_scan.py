"""A folder is looked at once: both parts and later starts take what is remembered, until a file changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tars import painted

from ldm.config.errors import UserError
from ldm.data import at_work, folder_scan
from ldm.data.concatenation import ConcatenationSource, RepeatedSource
from ldm.data.content import ContentHashes, cache_folder
from ldm.data.folder import FolderData, FolderSource
from ldm.data.images import Header
from ldm.data.kept import Kept, Repeated
from ldm.data.sources import both_parts


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for i in range(30):
        file = tmp_path / "set" / f"{i % 3 + 1}_words" / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(painted(i, (40 + i, 36), "PNG"))
        file.with_suffix(".txt").write_text(f"picture {i}, été", encoding="utf-8")
    (tmp_path / "set" / "bad.png").write_bytes(b"<html>")
    (tmp_path / "set" / "3_words" / "02-masklabel.png").write_bytes(painted(99, (42, 36), "PNG"))
    return tmp_path / "set"


def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The pictures that are looked at from now on."""
    found: list[object] = []
    real, read = folder_scan.header, folder_scan.read_file

    def header(file: Path | bytes, most: int) -> Header:
        found.extend([file] if isinstance(file, Path) else [])
        return real(file, most)

    def read_file(path: Path) -> bytes:
        found.append(path)
        return read(path)

    monkeypatch.setattr(folder_scan, "header", header)
    monkeypatch.setattr(folder_scan, "read_file", read_file)
    monkeypatch.setattr(ContentHashes, "_in_memory", {})
    return found


def state(data: FolderData) -> tuple[object, ...]:
    every = range(len(data))
    fields = data.fields()
    known = (fields.height.tolist(), fields.width.tolist(), str(fields.aesthetic.tolist()), data.sizes().tolist())
    hashes = [data._contents[i] for i in every]
    return data.names, data.all_captions(every), known, hashes, data.fingerprint(), data.describe(), data.rejected


@pytest.mark.parametrize("options", [{}, {"captions": "kohya"}, {"masks": "beside", "val_share": 0.5}, {"caption": "x", "min_side": 36}])
def test_both_parts_and_the_next_start_look_once(root, monkeypatch, options):
    seen = looks(monkeypatch)
    source = FolderSource(path=str(root), **options)
    first = [state(source.build(part)) for part in ("train", "val")]
    assert 30 <= len(seen) == len(set(seen)) <= 31 and not list(cache_folder().glob(".*"))
    assert [state(source.build(part)) for part in ("train", "val")] == first and len(seen) == len(set(seen))
    place = next(cache_folder().glob("folder-*.bin"))
    place.write_bytes(place.read_bytes()[:-9])  # damaged: looked at anew
    assert [state(source.build(part)) for part in ("train", "val")] == first and len(seen) > len(set(seen))
    monkeypatch.setenv("LDM_CACHE", "/dev/null/nowhere")
    assert [state(source.build(part)) for part in ("train", "val")] == first


@pytest.mark.parametrize("waits", [False, True])
def test_threads_help_where_a_block_waits_and_not_where_it_computes(monkeypatch, waits):
    clock, used = [0.0, 0.0], []
    monkeypatch.setattr(at_work, "time", SimpleNamespace(perf_counter=lambda: clock[0], thread_time=lambda: clock[1]))

    def look(numbers: Sequence[int]) -> Any:
        used.append(threading.get_ident())
        clock[0] += 1
        clock[1] += 0.1 if waits else 0.6
        return list(numbers)

    assert list(at_work.worked(look, [[n] for n in range(6)], 2)) == [[n] for n in range(6)]
    assert used[0] == threading.get_ident() and all((one == used[0]) != waits for one in used[1:])


def test_a_file_is_hashed_alike_at_once_and_piece_by_piece(root, monkeypatch):
    source = FolderSource(path=str(root))
    whole = source.build("train").fingerprint()
    for place in cache_folder().iterdir():
        place.unlink()
    monkeypatch.setattr(ContentHashes, "_in_memory", {})
    monkeypatch.setattr(folder_scan, "_scans", {})
    monkeypatch.setattr(folder_scan, "_ONCE", 100)
    assert source.build("train").fingerprint() == whole


def test_both_parts_see_a_folder_in_one_state(root, monkeypatch):
    source, found = FolderSource(path=str(root), val_share=0.5), []
    apart = [state(source.build(part)) for part in ("train", "val")]
    walk = folder_scan._walk

    def listed(folder: str, prefix: str, *rest: object) -> Iterator[tuple[str, os.stat_result | int]]:
        found.extend([folder] * (not prefix))
        yield from walk(folder, prefix, *rest)

    monkeypatch.setattr(folder_scan, "_walk", listed)
    assert [state(part) for part in both_parts(source)] == apart and found == [str(root)]
    other = FolderSource(path=str(root), caption="other words")
    twice = ConcatenationSource(parts=(RepeatedSource(source=source), RepeatedSource(source=other)))
    assert [len(part) for part in both_parts(twice)] and found == [str(root)] * 3  # each of the two is looked at
    with folder_scan.one_look():
        train = source.build("train")
        (root / "new.png").write_bytes(painted(5, kind="PNG"))
        (root / "new.txt").write_text("new")
        assert [state(train), state(source.build("val"))] == apart
    assert sum(len(part) for part in both_parts(source)) == 31


@pytest.mark.parametrize("change", ["caption", "picture", "removed", "added", "table", "touched"])
def test_a_change_is_seen(root, monkeypatch, change):
    source = FolderSource(path=str(root), val_share=0.0)
    fingerprint = source.build("train").fingerprint()
    seen = looks(monkeypatch)
    file = root / "2_words" / "04.png"
    if change == "caption":
        file.with_suffix(".txt").write_text("other words")
    elif change == "picture":
        file.write_bytes(painted(77, (50, 50), "PNG"))
    elif change == "removed":
        file.unlink()
    elif change == "added":
        (root / "new.png").write_bytes(painted(5, kind="PNG"))
        (root / "new.txt").write_text("new")
    elif change == "table":
        (root / "metadata.csv").write_text("file_name,text\n2_words/04.png,told\n")
    else:
        os.utime(file, (1, 1))
    after = source.build("train")
    assert seen and (after.fingerprint() != fingerprint) == (change != "touched")
    assert len(after) == {"removed": 29, "added": 31}.get(change, 30)


def test_what_is_refused_is_refused_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.png").write_bytes(painted(i, kind="PNG") if i < 12 else b"x")
        (folder / f"{i}.txt").write_text("a")
    source = FolderSource(path=str(folder))
    for _ in range(2):
        with pytest.raises(UserError, match="18 of 30 files are unusable"):
            source.build("train")
    assert len(FolderSource(path=str(folder), max_bad=1.0).build("train")) > 5
    with pytest.raises(UserError, match="18 of 30 files are unusable"):  # though the other setting has remembered the look
        source.build("train")


def test_a_damaged_row_is_told_when_it_is_read(root):
    data = FolderSource(path=str(root), val_share=0.0).build("train")
    place = next(cache_folder().glob("folder-*.bin"))
    whole = place.read_bytes()
    del data
    at = whole.index(b"picture 7")
    place.unlink()
    place.write_bytes(whole[:at] + b"P" + whole[at + 1 :])
    with pytest.raises(UserError, match=r"remembered of the folder is damaged .* remove it"):
        FolderSource(path=str(root), val_share=0.0).build("train").all_captions(range(30))


@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_rows_that_are_kept(n):
    rng = np.random.default_rng(n)
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        mask = rng.random(n) < share
        rows = np.flatnonzero(mask)
        for kept in (Kept(n, rows), Kept(n, np.flatnonzero(~mask), out=True)):
            assert len(kept) == len(rows) and kept.rows().tolist() == rows.tolist()
            assert [int(kept.rows(i)) for i in range(len(rows))] == rows.tolist()
            assert [kept.before(row) for row in range(n + 1)] == [int((rows < row).sum()) for row in range(n + 1)]
        times = rng.integers(1, 4, n)
        assert Repeated(Kept(n, rows), times).rows().tolist() == np.repeat(rows, times[rows]).tolist()
