"""Folders made for kohya's scripts are read as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from tars import painted

from ldm.config.errors import UserError
from ldm.data.check import check, source_at
from ldm.data.dataset import Split
from ldm.data.folder import FolderData, FolderSource


def build(root: Path, split: Split = "train", **options: object) -> FolderData:
    return FolderSource(path=str(root), **options).build(split)  # type: ignore[arg-type]


def paint(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(painted(number, (48, 40)))


def test_their_names_tell_repeats_and_words(tmp_path: Path) -> None:
    for i in range(6):
        paint(tmp_path / "3_sks dog" / f"a{i}.png", i)
        paint(tmp_path / "img" / "1_a_cat" / f"b{i}.png", 10 + i)
    (tmp_path / "3_sks dog" / "a1.caption").write_text("sks dog asleep\n")
    paint(tmp_path / "3_sks dog" / "old" / "c.png", 30)
    paint(tmp_path / "0_none" / "d.png", 31)
    paint(tmp_path / "elsewhere" / "e.png", 32)
    data, val = (build(tmp_path, split, captions="kohya", val_share=0.2) for split in ("train", "val"))
    dogs, cats = ([n for n in dict.fromkeys(data.names) if n.startswith(folder)] for folder in ("3_sks dog", "img"))
    assert len(data) == 3 * len(dogs) + len(cats) and len(set(data.names)) + len(val) == 13 and len(set(val.names)) == len(val) > 0
    assert all(data.names.count(name) == 3 for name in dogs) and "3_sks dog/old/c.png" in {*data.names, *val.names}
    words = {name: part.all_captions([i])[0] for part in (data, val) for i, name in enumerate(part.names)}
    assert words.pop("3_sks dog/a1.png") == ["sks dog asleep"]
    assert {name.split("/")[0]: said for name, said in words.items()} == {"3_sks dog": ["sks dog"], "img": ["a_cat"]}
    assert {r.name: r.reason for r in data.rejected} == {"0_none/d.png": "repeated 0 times", "elsewhere/e.png": "no N_words folder"}
    told = data.describe()
    assert told["with_repeats"] == len(data) > told["images"] == len(set(data.names))
    more = build(tmp_path.rename(tmp_path.parent / "moved"), captions="kohya", val_share=0.2)
    assert more.fingerprint() == data.fingerprint()
    (more.root / "3_sks dog").rename(more.root / "2_sks dog")
    assert build(more.root, captions="kohya", val_share=0.2).fingerprint() != data.fingerprint()


def test_they_are_told_of(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / "3_sks dog" / f"a{i}.png", i)
        (tmp_path / "3_sks dog" / f"a{i}.txt").write_text("a dog")
    found, _ = check(source_at(str(tmp_path)))
    assert any("captions=kohya" in note for note in found.notes)
    found, parts = check(source_at(str(tmp_path), "kohya"))
    assert not any("captions=kohya" in note for note in found.notes) and found.images == sum(map(len, parts))
    for file in (tmp_path / "3_sks dog").glob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match=r"no captions.*or kohya for folders such as '10_sks dog'"):
        build(tmp_path)
