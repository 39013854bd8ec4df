"""Data sets as other trainers, spreadsheets and macOS leave them: what is a picture, which caption is whose, and what is told."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import packed, painted, sample

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.captions import text_captions
from ldm.data.check import check, lines, source_at
from ldm.data.file_names import Names, side_pictures
from ldm.data.folder import FolderData, FolderSource
from ldm.data.hugging_face import DatasetsSource
from ldm.data.images import Rejected, view
from ldm.data.shards import ShardsSource
from ldm.text.encoder import TextEncoder


def pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = "JPEG" if name.lower().endswith(("jpg", "jpeg")) else "PNG"
        (root / name).write_bytes(painted(number, kind=kind))
    return root


def words(root: Path, **options: object) -> tuple[dict[str, list[str]], FolderData]:
    parts = [FolderSource(path=str(root), **options).build(split) for split in ("train", "val")]
    return {part.name(i): part.all_captions([i])[0] for part in parts for i in range(len(part))}, parts[0]


# Side pictures


def test_side_pictures_of_other_trainers_are_left_out_and_counted(tmp_path):
    plain = [f"{i}.jpg" for i in range(4)]
    side = ["0-masklabel.png", "1-MASKLABEL.PNG", "2-condlabel.png", "9-masklabel3.png", "1_mask.png", "2.mask.png", "3-depth.png"]
    side += ["masks/0.png", "_controls/3.jpg"]
    pictures(tmp_path, *plain, *side, "lone_mask.png", "masks/lone.png")
    found, data = words(tmp_path, caption="a photo of sks dog")
    assert set(found) == {*plain, "lone_mask.png", "masks/lone.png"}  # whose pictures are not here are pictures
    assert data.describe()["rejected"] == {"side picture": len(side)}
    assert "1_mask.png: side picture: a mask of 1.jpg" in data.describe()["rejected_files"]


def test_a_picture_with_a_caption_of_its_own_is_none_beside_another():
    names = ["dog.png", "dog_mask.png", "cat.png", "cat-masklabel.png"]
    assert set(side_pictures(names, names)) == {"cat-masklabel.png"}  # only this name means nothing else


def test_side_pictures_in_folders_beside_and_in_dreambooth_names():
    names = ["a/images/x.png", "a/masks/x.jpg", "a/masks/y.jpg", "b/0.src.jpg", "b/0.mask.png", "10_dog/p.png", "mask/10_dog/p.png"]
    found = side_pictures(names)
    assert {name: kept.of for name, kept in found.items()} == {
        "a/masks/x.jpg": "a/images/x.png",
        "b/0.mask.png": "b/0.src.jpg",
        "mask/10_dog/p.png": "10_dog/p.png",
    }


def test_side_pictures_of_shards_and_columns_of_tables(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = [m for i in range(4) for m in (*sample(f"k{i}", i), (f"k{i}-masklabel.png", painted(i, kind="PNG")))]
    (tmp_path / "a.tar").write_bytes(packed(members))
    data = ShardsSource(path=str(tmp_path)).build("train")
    assert data.total == 4 and data.describe()["rejected"] == {"side picture": 4}
    column = pa.array([{"bytes": painted(i), "path": None} for i in range(4)])
    about = {"huggingface": json.dumps({"info": {"features": {n: {"_type": "Image"} for n in ("conditioning_image", "image")}}})}
    table = pa.table({"conditioning_image": column, "image": column, "text": ["a"] * 4})
    pq.write_table(table.replace_schema_metadata(about), tmp_path / "x.parquet")
    assert DatasetsSource(path=str(tmp_path / "x.parquet")).build("train").image_column == "image"


# Tables


def test_text_behind_an_unquoted_comma_is_never_lost(tmp_path):
    pictures(tmp_path, *(f"{i}.png" for i in range(5)))
    rows = ["file_name,text", "0.png,a red circle", "1.png,a green circle, flat", '2.png,"a blue circle, flat"', '3.png,"open', "4.png,x"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    found, data = words(tmp_path, max_bad=1.0)
    assert found == {"0.png": ["a red circle"], "2.png": ["a blue circle, flat"]}
    bad = {r.name: r.detail for r in data.rejected if r.reason == "bad metadata row"}
    assert bad["metadata.csv:3"].startswith("3 cells for 2 columns") and bad["metadata.csv:5"].startswith("lines 5 to 6: ")


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators_are_those_of_the_header(tmp_path, separator):
    pictures(tmp_path, "0.png", "1.png", "2.png")
    other = "," if separator != "," else ";"
    rows = [separator.join(("filename", "Caption")), *(separator.join((f"{i}.png", f"red{other} flat")) for i in range(3))]
    (tmp_path / "metadata.csv").write_text("\r\n".join(rows))
    assert words(tmp_path)[0] == {f"{i}.png": [f"red{other} flat"] for i in range(3)}


def test_rows_find_pictures_in_another_form_case_or_without_suffix(tmp_path):
    names = ["IMG_0.JPG", unicodedata.normalize("NFD", "café.jpg"), "p.q.png", "sub/z.png"]
    pictures(tmp_path, *names)
    written = ["img_0.jpg", "café.jpg", "p.q", str(tmp_path / "sub" / "z.png")]
    rows = [json.dumps({"file_name": n, "text": f"words {i}"}) for i, n in enumerate(written)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert words(tmp_path)[0] == {name: [f"words {i}"] for i, name in enumerate(names)}
    assert Names({"a.png": "1", "A.png": "2"}).find("A.PNG") is None  # which of the two nobody says


def test_kohyas_tables_are_read_as_its_scripts_do(tmp_path):
    pictures(tmp_path, "0.png", "1.png", "sub/2.png")
    table = {"0": {"caption": "a dog", "tags": "dog, grass"}, "1.png": {"tags": "cat"}, "2": {"caption": "a bird"}}
    (tmp_path / "meta_cap.json").write_text(json.dumps({"0": {"caption": "older"}}))
    (tmp_path / "meta_lat.json").write_text(json.dumps(table))
    assert words(tmp_path)[0] == {"0.png": ["a dog, dog, grass"], "1.png": ["cat"], "sub/2.png": ["a bird"]}


def told(root: Path) -> str:
    with pytest.raises(UserError) as error:
        check(source_at(str(root)))
    return str(error.value)


def test_a_table_that_gives_nothing_is_named(tmp_path):
    pictures(tmp_path, "train/0.png", "train/1.png")
    table = tmp_path / "train" / "metadata.jsonl"
    table.write_text('{"file_name": "train/0.png", "text": "x"}')
    assert "train/metadata.jsonl was read: 1 row, and no file of theirs is here; the first is train/train/0.png" in told(tmp_path)
    table.write_text('{"file_name": "/elsewhere/0.png", "text": "x"}\n{"file_name": "\\ud800.png", "text": "x"}')
    assert "train/metadata.jsonl:1: bad metadata row: '/elsewhere/0.png' leads out of the folder" in told(tmp_path)
    table.rename(table.with_name("metadata.json1"))
    assert "train/metadata.json1 lies there, and a table is read under the name metadata.jsonl" in told(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", '{"file_name": "0.png", "text": 5}', "metadata.jsonl:1: caption not text: int"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": null}', "metadata.jsonl was read: 1 row, and no text in them"),
        ("metadata.csv", "file_name,text,text\n0.png,a,b", "metadata.csv: 2 columns are called text; rename those that are not meant"),
        ("0.txt", " \n", "1 text file is empty, the first is that of 0.png; fill them, or write"),
    ],
)
def test_a_table_without_texts_is_told(tmp_path, name, content, said):
    pictures(tmp_path, "0.png")
    (tmp_path / name).write_text(content)
    assert said in told(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.json", '{"0.png": "a ring, red", "1": "a dot"}'),
        ("metadata.csv", 'file_name, text\n0.png, "a ring, red"\n1.png, a dot'),
        ("metadata.csv", 'file_name;text\n0.png;a ring, red\n1.png;" a dot"'),
    ],
)
def test_tables_that_people_write_by_hand(tmp_path, name, content):
    pictures(tmp_path, "0.png", "1.png")
    (tmp_path / name).write_text(content)
    assert words(tmp_path)[0] == {"0.png": ["a ring, red"], "1.png": ["a dot"]}


def test_texts_in_columns_of_bytes_are_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pictures(tmp_path, "0.png")
    pq.write_table(pa.table({"file_name": ["0.png"], "text": pa.array(["brûlé".encode()], pa.binary())}), tmp_path / "metadata.parquet")
    assert words(tmp_path)[0] == {"0.png": ["brûlé"]}


def test_some_other_object_of_texts_is_no_table(tmp_path):
    pictures(tmp_path, "0.png")
    (tmp_path / "metadata.json").write_text('{"name": "mine", "licence": "none"}')
    (tmp_path / "0.txt").write_text("a ring")
    assert words(tmp_path)[0] == {"0.png": ["a ring"]}


def test_pictures_twice_in_shards_and_beside_them_are_told(tmp_path):
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(packed([*sample("a", 0), *sample(f"b{name}", int(name[0]) + 1)]))
    pictures(tmp_path, "loose.png")
    notes = check(source_at(str(tmp_path)))[0].notes
    assert "1 picture is the same file as another, such as 1.tar/a and 0.tar/a; each is learned from" in notes
    assert any(f"1 picture lies beside the shards, not read, such as {tmp_path / 'loose.png'}" in note for note in notes)


def test_captions_beside_pictures_in_letters_of_any_case(tmp_path):
    pictures(tmp_path, "IMG_0.JPG", "IMG_1.JPG", "é.png")
    for name, text in (("IMG_0.TXT", "first"), ("img_1.Caption", "second"), (unicodedata.normalize("NFD", "é.txt"), "third")):
        (tmp_path / name).write_text(text)
    assert words(tmp_path)[0] == {"IMG_0.JPG": ["first"], "IMG_1.JPG": ["second"], "é.png": ["third"]}


@pytest.mark.parametrize("form", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("text", ["a dog on grass", "рыжая кошка", "ένας σκύλος", "नीला घर", "x"])
def test_wide_captions_are_read_with_and_without_a_mark(form, text):
    assert text_captions(text.encode(form), "x.txt") == (text,)


# Pictures


def tiff(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "white"),
    [(np.float32, 1.0), (np.float32, 255.0), (np.float32, 65535.0), (np.int32, 255), (np.int32, 65535), (np.uint16, 65535)],
)
def test_the_range_of_wide_pictures_is_that_of_their_values(kind, white):
    ramp = np.linspace(0, white, 64 * 64).reshape(64, 64)
    wanted = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    assert np.abs(view(tiff(ramp.astype(kind)), 64).pixels[..., 0] - wanted).max() <= 1
    if kind == np.int32:
        return  # Pillow opens no negative of these
    negative = bytearray(tiff(ramp.astype(kind)))
    negative[negative.index(b"\x06\x01\x03\x00\x01\x00\x00\x00") + 8] = 0  # PhotometricInterpretation: white is zero
    assert np.abs(view(bytes(negative), 64).pixels[..., 0] - (255 - wanted)).max() <= 1


@pytest.mark.parametrize("values", [np.linspace(-1, 1, 4096, dtype=np.float32), np.full(4096, 2**31 - 1, np.int32)])
def test_a_range_that_nobody_can_know_is_left_out(values):
    with pytest.raises(Rejected, match="format not supported: values from"):
        view(tiff(values.reshape(64, 64)), 64)


def test_a_large_float_picture_has_one_range(monkeypatch):
    ramp = np.linspace(0, 200, 256 * 256, dtype=np.float32).reshape(256, 256)  # its first bands reach to less than 1
    whole = view(tiff(ramp), 64).pixels
    monkeypatch.setattr("ldm.data.images.LARGE", 1)
    monkeypatch.setattr("ldm.data.images.BAND", 256)
    assert np.abs(view(tiff(ramp), 64).pixels.astype(int) - whole).max() <= 1


# Archives


def test_thumbnails_of_a_network_drive_are_no_pictures(tmp_path):
    plain = [f"{i}.jpg" for i in range(4)]
    found, _ = words(
        pictures(tmp_path, *plain, "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/old.jpg", "$RECYCLE.BIN/x.png"), caption="a dog"
    )
    assert set(found) == set(plain)


def test_what_macos_adds_to_tars_is_no_picture(tmp_path):
    resource = b"\0\5\x16\7" + bytes(150)
    members = [m for i in range(12) for m in (*sample(f"{i:04d}", i), (f"._{i:04d}.jpg", resource), (f"__MACOSX/._{i:04d}.txt", resource))]
    (tmp_path / "a.tar").write_bytes(packed([*members, (".DS_Store", resource), ("./.hidden/x.jpg", resource)]))
    data = ShardsSource(path=str(tmp_path)).build("train")
    assert data.total == 12 and data.describe()["rejected"] == {} and data.index.shards[0].other == {"hidden": 26}


def test_packed_folders_say_how_to_unpack(tmp_path):
    (tmp_path / "a b.tar.gz").write_bytes(b"\x1f\x8b")
    assert "gunzip -c 'a b.tar.gz' > 'a b.tar'" in told(tmp_path)
    assert "a b.tar.gz is an archive; unpack it" in told(tmp_path / "a b.tar.gz")
    (tmp_path / "a b.tar.gz").rename(tmp_path / "x.zip")
    assert "an archive (x.zip); unpack it to a folder of pictures first" in told(tmp_path)


def test_the_bytes_say_what_a_picture_is(tmp_path):
    for name, kind in (("0.jpg", "PNG"), ("1.png", "JPEG"), ("2.webp", "PNG"), ("3.jpg", "WEBP")):
        (tmp_path / name).write_bytes(painted(1, (64, 64), kind))
    found, data = words(tmp_path, caption="x")
    assert len(found) == 4 and data.load(range(len(data)), range(len(data)), 32, 0, False).image.std() > 0.05 and not data.replaced


# Long captions


@pytest.mark.slow
def test_captions_that_are_cut_are_counted(tmp_path, kl_model, capsys):
    pictures(tmp_path, *(f"{i}.png" for i in range(4)))
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("red circle, " * (40 if i < 2 else 20) + "the end")
    found, _ = check(source_at(str(tmp_path)), decode=0)
    assert found.cut_captions is not None
    assert {k: found.cut_captions[k] for k in ("count", "of", "room", "longest")} == {"count": 2, "of": 4, "room": 75, "longest": 122}
    assert any("2 of 4 captions are longer than the 75 tokens" in line for line in lines(found))
    assert main(["data", "check", str(tmp_path), "--decode", "0", "--model", str(kl_model)]) == 0
    room = TextEncoder.load(kl_model).room
    assert room != 75 and f"4 of 4 captions are longer than the {room} tokens" in capsys.readouterr().out
