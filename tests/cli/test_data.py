"""`ldm data`: whole commands over data as people have it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import packed, painted, sample, shard

from ldm.__main__ import main
from ldm.data.shard_index import NAME


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main(["data", *map(str, words)]) == code
    out, err = capsys.readouterr()
    if code:
        assert err.count("\n") == 1 and "Traceback" not in err and not out
    return err if code else out


def folder(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(10):
        Image.new("RGB", (600 + 40 * i, 520), (i, 2 * i, 200)).save(root / f"p{i}.png")
        (root / f"p{i}.txt").write_text("the same words" if i < 5 else f"picture {i} <script>alert(1)</script>")
    (root / "page.jpg").write_bytes(b"<html>")
    (root / "page.txt").write_text("a page")
    (root / "mute.png").write_bytes((root / "p0.png").read_bytes())
    cut = (root / "p9.png").read_bytes()
    (root / "cut.png").write_bytes(cut[: len(cut) - 40])
    (root / "cut.txt").write_text("cut off")
    return root


def test_check_says_what_is_there_what_is_left_out_and_why(tmp_path, capsys):
    root = folder(tmp_path / "in")
    text = said(capsys, "check", root)
    assert "11 images with 11 captions (folder)" in text and "left out: 2" in text
    assert "1  not an image" in text and "page.jpg: not an image" in text and "1  no caption" in text
    assert "11 decoded to see whether they can be: 1 damaged image" in text and "buckets of 512 px" in text
    assert "5 captions are not unique" in text
    found = json.loads(said(capsys, "check", root, "--json", "--resolution", "640"))
    assert found["rejected"] == {"no caption": 1, "not an image": 1} and found["undecodable"] == {"damaged image": 1}
    for name, count in (("sides", 11), ("aspects", 11), ("caption_characters", 11)):
        assert sum(found[name].values()) == count
    assert sum(b["images"] for b in found["buckets"]) == 11 and any("enlarged" in note for note in found["notes"])
    assert found["sides"] == {"512+": 11}


def test_the_page_stands_alone_and_escapes_what_the_data_says(tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    said(capsys, "check", folder(tmp_path / "in<b>"), "--html", page)
    html = page.read_text()
    assert html.count("<figure") >= 8 and "alert(1)" in html and "<script>alert" not in html and "in<b>" not in html
    assert not re.search(r"(src|href)=\"?(https?:|//|[a-z]+\.)", html)
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            tags.append(tag)

    Reader().feed(html)
    assert tags.count("html") == 1 and tags.count("table") >= 4


def test_check_knows_every_kind_of_data(tmp_path, capsys):
    import datasets

    shard(tmp_path / "shards", 0, 5)
    rows = {"image": [{"bytes": painted(i), "path": None} for i in range(5)], "text": [f"p {i}" for i in range(5)], "aesthetic": [5.0] * 5}
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "rows" / "0.parquet")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    saved = datasets.Dataset.from_dict({k: rows[k] for k in ("image", "text")}, features=features)
    saved.save_to_disk(tmp_path / "saved")
    places = {"shards": ("shards", "shards/{00000..00000}.tar"), "datasets": ("rows", "rows/0.parquet", "saved")}
    for kind, path in ((kind, path) for kind, paths in places.items() for path in paths):
        found = json.loads(said(capsys, "check", tmp_path / path, "--json", "--resolution", "32"))
        assert (found["kind"], found["images"]) == (kind, 5)
    assert json.loads(said(capsys, "check", tmp_path / "rows", "--json"))["scores"]["aesthetic"]["known"] == 5


def test_what_cannot_be_used_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    assert "no images here" in said(capsys, "check", tmp_path / "bare", code=2)
    assert "does not exist" in said(capsys, "check", tmp_path / "none", code=2)
    mute = tmp_path / "mute"
    mute.mkdir()
    Image.new("RGB", (64, 64)).save(mute / "a.png")
    assert "1 image but no captions" in said(capsys, "check", mute, code=2)
    assert "there are auto, txt" in said(capsys, "check", mute, "--captions", "guess", code=2)
    (mute / "a.txt").write_text("a")
    assert "is one file" in said(capsys, "check", mute / "a.png", code=2)
    assert "chek: no such word; did you mean check?" in said(capsys, "chek", code=2)
    assert "Missing" in said(capsys, "fetch", code=2)
    assert "usage: ldm data" in said(capsys)


def test_index_tells_what_it_read_and_reads_only_what_is_new(tmp_path, capsys):
    shard(tmp_path, 0, 4)
    (tmp_path / "00001.tar").write_bytes(packed([*sample("a", 1), ("b.txt", b"alone")])[:-700])
    text = said(capsys, "index", tmp_path)
    assert "5 samples in 2 shards" in text and "00001.tar: 1 sample, 1 left out" in text
    assert "cut off" in text and "left out: no image" in text
    again = said(capsys, "index", tmp_path)
    assert "[1/" not in again and again.count("00001.tar: damaged") == 1  # told again, though it is not read again
    (tmp_path / "00001.tar").write_bytes(packed(sample("a", 1)))
    assert "[1/1] 00001.tar: 1 sample" in said(capsys, "index", tmp_path)
    assert json.loads(said(capsys, "index", tmp_path, "--json"))["samples"] == 5
    assert "[2/2]" in said(capsys, "index", tmp_path, "--verify")
    whole = bytearray((tmp_path / "00000.tar").read_bytes())
    whole[-1] ^= 1
    (tmp_path / "00000.tar").write_bytes(whole)
    assert main(["data", "index", str(tmp_path), "--verify"]) == 2
    assert "its bytes are not those that were indexed" in capsys.readouterr().err


@pytest.mark.slow
def test_index_reads_in_several_processes(tmp_path, capsys):
    for i in range(4):
        shard(tmp_path, i, 3)
    text = said(capsys, "index", tmp_path, "--workers", 2)
    assert "[4/4]" in text and "12 samples in 4 shards" in text
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).unlink()
    said(capsys, "index", tmp_path)
    assert (tmp_path / NAME).read_bytes() == whole
    (tmp_path / "00000.tar").write_bytes((tmp_path / "00000.tar").read_bytes().replace(b"picture", b"pictore"))
    assert main(["data", "index", str(tmp_path), "--verify", "--workers", "2"]) == 2


def test_curate_as_a_command(tmp_path, capsys):
    rows = {
        "URL": list("abcdef"),
        "WIDTH": [600] * 5 + [100],
        "HEIGHT": [600] * 6,
        "AESTHETIC_SCORE": [6.0, 4.0, 6, 6, 6, 6],
        "pwatermark": [0.1, 0.1, 0.9, 0.1, 0.1, 0.1],
        "TEXT": ["a cat", "a dog", "a cow", "a hen", "a logo", "an ox"],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    command = ("curate", tmp_path / "t.parquet", "--out", tmp_path / "out")
    text = said(capsys, *command, "--subset", "improved-aesthetics", "--reject", "logo|sign")
    rules = (r"side >= 512 px", r"aesthetic > 5", r"watermark < 0\.5", r"caption does not match logo\|sign")
    assert re.search(".*".join(f"1  {rule}" for rule in rules) + r".*2  kept \(33\.3%\)", text, re.S)
    assert pq.read_table(tmp_path / "out" / "train.parquet")["URL"].to_pylist() == ["a", "d"]
    audit = json.loads(said(capsys, *command, "--unique", "caption", "--json"))
    assert audit["kept"] == 6 and audit["asked"] == {"unique": ["caption"]}
    assert "got 'image'" in said(capsys, *command, "--unique", "image", code=2)
    assert "has no column language" in said(capsys, *command, "--language", "en", code=2)
