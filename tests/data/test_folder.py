"""A folder as people have it becomes a data set; what is broken in it is left out, counted and named."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from ldm.config.errors import UserError
from ldm.data.captions import MAX_CHARACTERS, clean
from ldm.data.dataset import Split
from ldm.data.folder import FolderData, FolderSource
from ldm.data.photos import held_out


def paint(path: Path, number: int = 0, size: tuple[int, int] = (48, 40), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def photos(root: Path, count: int = 12, captions: bool = True) -> Path:
    for i in range(count):
        image = paint(root / f"shelf{i % 2}" / f"p{i:02d}.{('jpg', 'png', 'webp')[i % 3]}", i, (48 + i, 90 - i))
        if captions:
            image.with_suffix(".txt").write_text(f"picture {i}\n\nanother word for {i}\n")
    return root


def build(root: Path, split: Split = "train", **options: object) -> FolderData:
    return FolderSource(path=str(root), **options).build(split)


def all_words(*parts: FolderData) -> dict[str, list[str]]:
    return {n: w for part in parts for n, w in zip(part.names, part.all_captions(range(len(part))), strict=True)}


def reasons(data: FolderData) -> dict[str, str]:
    return {r.name: r.reason for r in data.rejected}


def test_nested_photographs_with_sidecars(tmp_path):
    photos(tmp_path)
    data, val = build(tmp_path, val_share=0.2), build(tmp_path, "val", val_share=0.2)
    assert len(data) + len(val) == 12 and len(val) >= 1
    assert not set(data.names) & set(val.names) and data.names == sorted(data.names)
    number = int(data.names[0][-6:-4])
    assert data.all_captions([0]) == [[f"picture {number}", f"another word for {number}"]]
    batch = data.load([0, 3, 3], [7, 8, 9], 32, 1, True)
    assert batch.image.shape == (3, 3, 32, 32) and batch.image.dtype == torch.float32
    assert -1 <= batch.image.min() < batch.image.max() <= 1
    assert batch.position.tolist() == [7, 8, 9] and batch.position.dtype == torch.int64
    assert batch.size[0].tolist()[:2] == [90 - number, 48 + number] and batch.size.shape == (3, 6)
    assert list(batch.caption) == data.captions([0, 3, 3], [7, 8, 9], 1)
    assert data.origin(0).startswith(str(tmp_path)) and Path(data.origin(0)).is_file()


def test_a_sample_depends_on_its_position_and_the_seed_alone(tmp_path):
    data = build(photos(tmp_path))
    together = data.load([0, 1, 2, 1], [5, 6, 7, 60], 16, 3, True)
    for row, (i, p) in enumerate(((0, 5), (1, 6), (2, 7), (1, 60))):
        alone = data.load([i], [p], 16, 3, True)
        assert torch.equal(alone.image[0], together.image[row]) and alone.caption[0] == together.caption[row]
        assert torch.equal(alone.size[0], together.size[row])
    assert not torch.equal(together.image[1], together.image[3])  # another position, another view
    several = data.load([1] * 40, range(40), 16, 3, True)
    assert len(set(several.caption)) == 2 and len({tuple(s) for s in several.size.tolist()}) > 5
    mirrored = data.load([1] * 40, range(40), 16, 3, False)
    changed = (several.image - mirrored.image).flatten(1).abs().amax(1) > 0
    assert 8 < int(changed.sum()) < 32
    assert not torch.equal(data.load([1], [0], 16, 4, False).size, mirrored.size[:1])  # another seed


def test_the_crop_may_stay_in_the_centre_and_always_does_when_held_out(tmp_path):
    photos(tmp_path)
    fixed = build(tmp_path, crop="centre").load([2] * 9, range(9), 16, 0, False)
    assert len({tuple(s) for s in fixed.size.tolist()}) == 1
    held_out = build(tmp_path, "val", val_share=0.4).load([0] * 9, range(9), 16, 0, False)
    height, width, top, left, *_ = held_out.size[0].tolist()
    assert len({tuple(s) for s in held_out.size.tolist()}) == 1
    assert abs(2 * max(top, left) + 16 - max(height, width) * 16 / min(height, width)) <= 2


def test_metadata_jsonl_and_csv_with_several_rows_lists_and_missing_files(tmp_path):
    photos(tmp_path, 6, captions=False)
    rows = [
        {"file_name": "p00.jpg", "text": "first"},
        {"file_name": "p00.jpg", "text": "second"},
        {"file_name": "./p02.webp", "text": ["a", "b", "a"]},
        {"file_name": "p04.png", "text": 4},
        {"file_name": "gone.png", "text": "nothing there"},
        {"file_name": "../p01.png", "text": "outside"},
        {"text": "nameless"},
    ]
    lines = [*map(json.dumps, rows), "{not json", "[1]", ""]
    (tmp_path / "shelf0" / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "shelf1" / "metadata.csv").write_text('\ufefffile_name,text\np01.png,"a, quoted"\np03.jpg,plain\np05.webp,\n')
    data = build(tmp_path, val_share=1e-9)
    assert all_words(data, build(tmp_path, "val", val_share=1e-9)) == {
        "shelf0/p00.jpg": ["first", "second"],
        "shelf0/p02.webp": ["a", "b"],
        "shelf1/p01.png": ["a, quoted"],
        "shelf1/p03.jpg": ["plain"],
    }
    assert reasons(data) == {
        "shelf0/metadata.jsonl:4": "caption not text",
        "shelf0/metadata.jsonl:6": "bad metadata row",
        "shelf0/metadata.jsonl:7": "bad metadata row",
        "shelf0/metadata.jsonl:8": "bad metadata row",
        "shelf0/metadata.jsonl:9": "bad metadata row",
        "shelf0/gone.png": "listed but missing",
        "shelf0/p04.png": "no caption",
        "shelf1/p05.webp": "no caption",
    }
    described = data.describe()
    assert described["rejected"]["bad metadata row"] == 4 and described["images_in_both_parts"] == 4
    assert described["captions_from"] == ["shelf0/metadata.jsonl", "shelf1/metadata.csv"]
    assert any("leads out of the folder" in line for line in described["rejected_files"])
    json.dumps(described)


def test_other_caption_columns_are_known_and_unknown_ones_are_shown(tmp_path):
    photos(tmp_path, 4, captions=False)
    table = tmp_path / "shelf0" / "metadata.csv"
    table.write_text("file_name,caption\np00.jpg,yes\np02.webp,no\n")
    assert len(build(tmp_path)) == 1
    table.write_text("image,words\np00.jpg,yes\n")
    with pytest.raises(UserError, match=r"metadata\.csv: needs the columns file_name and one of text, .* has image, words"):
        build(tmp_path)
    table.write_bytes(b"file_name,text\np00.jpg,\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 23"):
        build(tmp_path)


def test_where_captions_come_from_can_be_chosen(tmp_path):
    for name in ("a_red-circle_012", "blue ring (3)"):
        paint(tmp_path / f"{name}.png").with_suffix(".caption").write_text("beside")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": p.name, "text": "table"}) for p in tmp_path.glob("*.png")))

    def captions(**options: str) -> set[str]:
        parts = [build(tmp_path, split, **options) for split in ("train", "val")]
        return {c for part in parts for c in part.all_captions([0])[0]}

    assert captions() == captions(captions="metadata") == {"table"}
    assert captions(captions="txt") == {"beside"}
    assert captions(captions="filename") == {"a red circle", "blue ring"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"plain", "plain"),
        (b"\xef\xbb\xbfwith mark", "with mark"),
        ("sixteen é".encode("utf-16"), "sixteen é"),
        (b"windows\r\n", "windows"),
        (b"a\x00b\x07c\td", "a b c d"),
        ("evil \u202egnp.exe".encode(), "evil gnp.exe"),
        ("e\u0301".encode(), "é"),
        ("\U0001f469\u200d\U0001f4bb emoji".encode(), "\U0001f469\u200d\U0001f4bb emoji"),
        (b"word " * 1000, ("word " * 1000)[:MAX_CHARACTERS].strip()),
        (b"", "empty caption"),
        (b" \n\t\n\x00", "empty caption"),
        (b"\xff\xfa\x80 latin", "caption not UTF-8"),
        (b"caf\xe9", "caption not UTF-8"),
        (b"x" * (2**20 + 1), "caption too long"),
    ],
)
def test_captions_are_cleaned_by_rule_or_refused(tmp_path, content, expected):
    photos(tmp_path, 3)
    paint(tmp_path / "odd.png").with_suffix(".txt").write_bytes(content)
    data = build(tmp_path)
    found = all_words(data, build(tmp_path, "val"))
    assert found.get("odd.png", [reasons(data).get("odd.png")]) == [expected]


def test_lone_surrogates_do_not_survive():
    assert clean(json.loads('"a\\ud800b"')) == "ab"
    clean("".join(map(chr, range(0x3000)))).encode()


def test_bad_files_are_left_out_counted_and_named(tmp_path):
    photos(tmp_path, 20)
    good = build(tmp_path).total
    bad = {
        "empty.jpg": (b"", "empty file"),
        "page.jpg": (b"<html>not found</html>", "not an image"),
        "vector.svg": (b"<svg/>", "format not supported"),
        "paper.pdf": (b"%PDF", "format not supported"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0", "format not supported"),
        "disguised.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }
    for name, (data, _) in bad.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).with_suffix(".txt").write_text("words")
    paint(tmp_path / "tiny.png", size=(31, 400)).with_suffix(".txt").write_text("words")
    paint(tmp_path / "huge.png", size=(300, 300)).with_suffix(".txt").write_text("words")
    paint(tmp_path / "silent.png")
    paint(tmp_path / ".hidden.png")
    paint(tmp_path / "__MACOSX" / "p.png")
    (tmp_path / "notes.txt").write_text("no image belongs to this")
    data = build(tmp_path, max_pixels=200 * 200)
    assert data.total == good
    assert reasons(data) == {name: reason for name, (_, reason) in bad.items()} | {
        "tiny.png": "too small",
        "huge.png": "too many pixels",
        "silent.png": "no caption",
    }
    assert data.describe()["rejected"]["format not supported"] == 3
    assert build(tmp_path, min_side=8).total == good + 2


def test_a_file_that_is_damaged_behind_its_header_is_replaced_by_the_next(tmp_path, caplog):
    photos(tmp_path, 12)
    data = build(tmp_path)
    broken = Path(data.origin(3))
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size * 9 // 10])
    Path(data.origin(4)).unlink()
    with caplog.at_level(logging.WARNING):
        batch = data.load([2, 3, 3], [0, 1, 2], 16, 0, False)
    assert torch.equal(batch.image[1], data.load([5], [1], 16, 0, False).image[0])
    assert list(batch.caption[1:]) == data.captions([5, 5], [1, 2], 0)
    assert set(data.replaced) == {data.names[3], data.names[4]} == set(data.describe()["replaced_when_decoded"])
    assert sum(data.names[3] in r.getMessage() for r in caplog.records) == 1
    again = build(tmp_path)  # as another rank or a later run sees it
    where = again.names.index(data.names[3])
    assert torch.equal(again.load([where], [1], 16, 0, False).image[0], batch.image[1])


def test_too_many_bad_files_stop_the_run_with_their_reasons(tmp_path):
    photos(tmp_path, 14)
    for i in range(11):
        paint(tmp_path / f"b{i}.png").with_suffix(".txt").write_text("x")
        (tmp_path / f"b{i}.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"11 of 25 files are unusable \(11 not an image\).*b0\.png.*max_bad"):
        build(tmp_path)
    assert build(tmp_path, max_bad=0.5).total == 14


def test_too_many_undecodable_files_stop_the_run_with_their_reasons(tmp_path):
    data = build(photos(tmp_path, 14))
    for i in range(11):
        Path(data.origin(i)).unlink()
    with pytest.raises(UserError, match=r"11 of 13 images could not be decoded \(11 unreadable file"):
        data.load(range(13), range(13), 16, 0, False)
    shutil.rmtree(tmp_path)
    few = build(photos(tmp_path, 4))
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="none of its 3 images"):
        few.load([0], [0], 16, 0, False)


def test_folders_that_cannot_be_used_say_path_and_fix(tmp_path):
    with pytest.raises(UserError, match=r"data\.path: .*nowhere is not a folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"{tmp_path}: no images here; put PNG, JPEG, WEBP"):
        build(tmp_path)
    photos(tmp_path, 3, captions=False)
    with pytest.raises(UserError, match=rf"{tmp_path}: 3 images but no captions .*x\.txt beside each x\.jpg, or a metadata\.jsonl"):
        build(tmp_path)
    only = tmp_path / "only"
    paint(only / "one.png").with_suffix(".txt").write_text("one")
    assert len(build(only)) == 1  # and none is held out
    (only / "one.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"no usable image \(1 not an image\); the first is one\.png"):
        build(only)


def test_fields_are_checked_before_any_work():
    adapter = TypeAdapter(FolderSource)
    assert adapter.validate_python({"path": "x"}).captions == "auto"
    for wrong in ({}, {"path": "x", "captions": "guess"}, {"path": "x", "val_share": -0.1}, {"path": "x", "pth": 1}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)


def held_out_names(names: list[str], share: float) -> set[str]:
    return {name for name, out in zip(names, held_out(names, share), strict=True) if out}


def test_parts_are_decided_by_name_alone():
    names = [f"n{i}" for i in range(2000)]
    chosen = held_out_names(names, 0.1)
    assert 150 < len(chosen) < 250
    assert held_out_names(names[500:], 0.1) == chosen & set(names[500:])
    assert chosen < held_out_names(names, 0.2)
    assert len(held_out_names(["a", "b"], 1e-9)) == 1 == len(held_out_names(["a", "b"], 1 - 1e-9))


def test_the_fingerprint_follows_what_samples_depend_on(tmp_path):
    photos(tmp_path, 6)
    first = build(tmp_path).fingerprint()
    assert build(tmp_path).fingerprint() == first != build(tmp_path, "val").fingerprint()
    assert build(tmp_path, crop="centre").fingerprint() != first
    image = Path(build(tmp_path).origin(0))
    seen = {first}

    def differs() -> None:
        found = build(tmp_path).fingerprint()
        assert found not in seen
        seen.add(found)

    image.with_suffix(".txt").write_text("new words")
    differs()
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert build(tmp_path).fingerprint() in seen  # the same picture
    image.write_bytes(image.read_bytes() + b"\0")
    differs()
    image.rename(image.with_name("renamed" + image.suffix))
    differs()


def test_links_are_followed_once(tmp_path):
    photos(tmp_path / "real", 4)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "set")
    data = build(tmp_path / "set", outside=True)
    assert data.total == 4 and data.names[0].startswith("linked/")


def test_names_that_are_not_text_are_left_out(tmp_path):
    photos(tmp_path, 3)
    raw = os.fsencode(tmp_path) + b"/bad\xff.png"
    try:
        shutil.copy(os.fsencode(paint(tmp_path / "source.jpg")), raw)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert reasons(build(tmp_path))["bad\\xff.png"] == "name not UTF-8"


def test_metadata_parquet_brings_captions_sizes_and_scores(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    photos(tmp_path, 4, captions=False)
    rows = {
        "file_name": ["p00.jpg", "p02.webp"],
        "TEXT": ["zero", "two"],
        "original_width": [800, None],
        "HEIGHT": [600.0, None],
        "AESTHETIC_SCORE": [6.5, None],
        "pwatermark": [0.25, "x"[:0] or None],
        "blob": [b"\0", b"\1"],
    }
    table = tmp_path / "shelf0" / "metadata.parquet"
    pq.write_table(pa.table(rows), table)
    (tmp_path / "metadata.csv").write_text("file_name,text,aesthetic\nshelf1/p01.png,one,7\nshelf1/p03.jpg,three,often\n")
    parts = [build(tmp_path, split) for split in ("train", "val")]
    assert {n: w for d in parts for n, w in all_words(d).items()} == {
        "shelf0/p00.jpg": ["zero"],
        "shelf0/p02.webp": ["two"],
        "shelf1/p01.png": ["one"],
        "shelf1/p03.jpg": ["three"],
    }
    told = {}
    for data in parts:
        f = data.fields()
        told |= {n: (f.width[i], f.height[i], f.aesthetic[i], f.watermark[i]) for i, n in enumerate(data.names)}
    assert told["shelf0/p00.jpg"] == (800, 600, 6.5, 0.25)
    assert told["shelf0/p02.webp"][:2] == (50, 88) and np.isnan(told["shelf0/p02.webp"][2:]).all()
    assert told["shelf1/p01.png"][2] == 7 and np.isnan(told["shelf1/p03.jpg"][2])
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"metadata\.parquet: not a whole parquet file"):
        build(tmp_path)


def test_a_sample_that_takes_too_long_is_replaced_and_named(tmp_path, monkeypatch, caplog):
    data = build(photos(tmp_path, 12), max_seconds=0.2)
    read, released = data.read, threading.Event()
    monkeypatch.setattr(data, "read", lambda i: released.wait(250) and read(i) if i in (3, 4) else read(i))
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        batch = data.load([2, 3, 6], [0, 1, 2], 16, 0, False)
    assert time.monotonic() - start < 120  # and not the reader's 250 s
    released.set()
    assert torch.equal(batch.image[1], data.load([5], [1], 16, 0, False).image[0])
    assert {n: r.split(":")[0] for n, r in data.replaced.items()} == dict.fromkeys(data.names[3:5], "too slow")
    assert "within 0.2 s" in caplog.text and data.names[3] in caplog.text
