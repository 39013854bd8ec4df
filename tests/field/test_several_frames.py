"""Files that hold more than one picture (animations, pages), and side files that cannot be read: what is not taken is told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tars import packed, painted

from ldm.__main__ import main
from ldm.data.folder import FolderSource
from ldm.data.hugging_face import DatasetsSource
from ldm.data.images import FIRST, header
from ldm.data.shards import ShardsSource
from ldm.runs.execution import data_lines

MOVING = ("GIF", "PNG", "WEBP", "TIFF")
COLOURS = ("white", "black", "red")


def film(kind: str, count: int = 3, size: tuple[int, int] = (32, 32), **more: Any) -> bytes:
    out = io.BytesIO()
    first, *others = [Image.new("RGB", size, colour) for colour in COLOURS[:count]]
    first.save(out, kind, save_all=count > 1, append_images=others, **more)
    return out.getvalue()


@pytest.mark.parametrize("kind", MOVING)
def test_a_header_says_whether_more_pictures_follow(kind: str) -> None:
    assert header(film(kind)).several and not header(film(kind, 1)).several


def test_previews_of_cameras_and_of_maps_are_no_pages() -> None:
    assert not header(film("MPO")).several  # a JPEG with another view behind it, as telephones write
    out = io.BytesIO()
    small = Image.new("RGB", (8, 8))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    Image.new("RGB", (32, 32)).save(out, "TIFF", save_all=True, append_images=[small])
    assert not header(out.getvalue()).several


def told(data: Any) -> str:
    return "\n".join(data_lines(data.describe()))


def test_training_pictures_that_move_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for n in range(5):
        (folder / f"{n}.png").write_bytes(film("PNG", 3 if n < 2 else 1))
    for _ in range(2):  # looked at, and remembered
        data = FolderSource(path=str(folder), caption="a thing", val_share=0).build("train")
        assert f"warning: 2 with {FIRST}; the first is 0.png" in told(data)
    members = [(f"{n}.{end}", text) for n in range(5) for end, text in (("gif", film("GIF", 1 + n % 2)), ("txt", b"a thing"))]
    (tmp_path / "a.tar").write_bytes(packed(members))
    shards = ShardsSource(path=str(tmp_path / "a.tar"), val_share=0).build("train")
    assert f"warning: 2 with {FIRST}; the first is a.tar/1" in told(shards)


def test_masks_and_maps_that_move_are_counted(tmp_path: Path) -> None:
    (tmp_path / "edges").mkdir()
    for n in range(5):
        (tmp_path / f"{n}.jpg").write_bytes(painted(n))
        (tmp_path / f"{n}-masklabel.png").write_bytes(film("PNG", 3 if n < 2 else 1))
        (tmp_path / "edges" / f"{n}.gif").write_bytes(film("GIF", 2 if n == 4 else 1))
    found = FolderSource(path=str(tmp_path), caption="a thing", val_share=0, masks="beside", views={"edges": "edges"})
    assert f"warning: 3 with {FIRST}; the first is 0-masklabel.png" in told(found.build("train"))
    without = FolderSource(path=str(tmp_path), caption="a thing", val_share=0, views={"edges": "edges"}).build("train")
    assert f"warning: 1 with {FIRST}; the first is edges/4.gif" in told(without)


def test_rows_that_move_are_counted(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("datasets")
    from pyarrow import parquet

    rows = [{"image": {"bytes": film("WEBP", 1 + (n == 3)), "path": None}, "text": "a thing"} for n in range(5)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = DatasetsSource(path=str(tmp_path / "a.parquet"), val_share=0).build("train")
    assert f"warning: 1 with {FIRST}; the first is row 3" in told(data)


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (b'{"aesthetic": 5.5, "wid', "a JSON file that cannot be read"),
        (b"[1, 2]", "a JSON file that holds no object but a list"),
        (b"[" * 100_000, "a JSON file that cannot be read"),
        (b" " * 2**20 + b"{}", "a JSON file of over"),
    ],
    ids=["torn", "list", "deep", "long"],
)
def test_a_json_file_beside_a_captioned_picture_that_cannot_be_read_is_told(beside: bytes, said: str, tmp_path: Path) -> None:
    members = [(f"{n}.{end}", text) for n in range(4) for end, text in (("jpg", painted(n)), ("txt", b"a thing"))]
    members += [("2.json", beside), ("1.json", json.dumps({"original_width": 900, "original_height": 900}).encode())]
    (tmp_path / "a.tar").write_bytes(packed(members))
    data = ShardsSource(path=str(tmp_path / "a.tar"), val_share=0).build("train")
    assert len(data) == 4 and f"warning: 1 with {said}" in told(data) and "the first is a.tar/2" in told(data)


def test_masks_and_init_pictures_that_move_are_told(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mask.gif").write_bytes(film("GIF"))
    (tmp_path / "init.webp").write_bytes(film("WEBP"))
    words = ["sample", "a ring", "--model", str(kl_model), "--steps", "1", "--out", str(tmp_path / "o")]
    words += ["--init", str(tmp_path / "init.webp")]
    assert main([*words, "--size", "32", "--mask", str(tmp_path / "mask.gif")]) == 0
    said = capsys.readouterr().err
    assert f"init: {tmp_path / 'init.webp'}: {FIRST}" in said and f"mask: {tmp_path / 'mask.gif'}: {FIRST}" in said
    assert main([*words, "--outpaint", "left=32"]) == 0
    assert f"init: {tmp_path / 'init.webp'}: {FIRST}" in capsys.readouterr().err
