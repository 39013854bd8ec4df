"""Perceptual hashes: near for what is nearly the same, far for what is not; and a folder made better by them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image, ImageEnhance

from ldm.__main__ import main
from ldm.data.curation.hashes import COSINES, SIDE, perceptual_hash
from ldm.data.images import Rejected


def scene(number: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def packed(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def apart(a: bytes, b: bytes) -> int:
    return bin(int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).count("1")


def test_the_transform_is_scipys() -> None:
    from scipy.fft import dctn

    values = np.random.default_rng(0).random((SIDE, SIDE))
    assert np.allclose(4 * COSINES @ values @ COSINES.T, dctn(values, type=2))


@pytest.mark.parametrize("number", range(8))
def test_what_is_nearly_the_same_is_near_and_what_is_not_is_far(number: int) -> None:
    image = scene(number)
    own = packed(image)
    near = [
        packed(image, "JPEG", quality=60),
        packed(image.resize((90, 68), Image.Resampling.LANCZOS)),
        packed(image, "WEBP", quality=70),
        packed(ImageEnhance.Brightness(image).enhance(0.85)),
    ]
    assert max(apart(own, other) for other in near) <= 6
    assert min(apart(own, packed(scene(other))) for other in range(8) if other != number) >= 16


def test_a_folder_without_its_near_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        scene(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"scene {number}")
    scene(2).save(folder / "again.jpg", quality=70)
    (folder / "again.txt").write_text("scene 2 again")
    assert main(["data", "hash", str(folder), "--out", str(tmp_path / "table.parquet")]) == 0
    assert "7 pictures" in capsys.readouterr().out
    rows = {row["file_name"]: row for row in parquet.read_table(tmp_path / "table.parquet").to_pylist()}
    assert rows["3.png"]["sha256"] == hashlib.sha256((folder / "3.png").read_bytes()).hexdigest()
    assert rows["3.png"]["text"] == "scene 3" and (rows["3.png"]["width"], rows["3.png"]["height"]) == (200, 150)
    assert main(["data", "curate", str(tmp_path / "table.parquet"), "--out", str(tmp_path / "curated"), "--near", "6"]) == 0
    kept = {row["file_name"] for row in parquet.read_table(tmp_path / "curated" / "train.parquet").to_pylist()}
    assert len(kept) == 6 and len(kept & {"2.png", "again.jpg"}) == 1
    # The table that is left is the folder's captions, so that training sees those pictures alone.
    (tmp_path / "curated" / "train.parquet").replace(folder / "metadata.parquet")
    from ldm.data.folder import FolderSource

    parts = [FolderSource(path=str(folder), captions="metadata", max_bad=1.0).build(split) for split in ("train", "val")]
    assert {name for part in parts for name in part.names} == kept


def test_what_is_no_picture_is_said() -> None:
    with pytest.raises(Rejected, match="damaged image"):
        perceptual_hash(b"<html>")
