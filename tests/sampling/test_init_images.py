"""The pictures that edits start from: every mistake one line, every size fitted the same way as its mask."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.config.errors import UserError
from ldm.sampling.init_images import read_init_image


def picture(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def masked(path: Path, width: int = 64, height: int = 48, columns: int = 16) -> Path:
    values = np.zeros((height, width), np.uint8)
    values[:, :columns] = 255
    Image.fromarray(values).save(path)
    return path


def test_bytes_at_the_right_size_are_untouched(tmp_path: Path) -> None:
    init, mask = picture(tmp_path / "a.png"), masked(tmp_path / "m.png")
    found = read_init_image(init, mask, (48, 64))
    assert np.array_equal(found.pixels, np.asarray(Image.open(init))) and not found.notices
    assert found.mask is not None and found.mask[:, :16].all() and not found.mask[:, 16:].any()
    assert found.init_hash == hashlib.sha256(init.read_bytes()).hexdigest() and len(found.mask_hash) == 64
    alone = read_init_image(init, None, (48, 64))
    assert alone.mask is None and alone.mask_hash == ""


def test_another_size_covers_and_is_cropped_at_the_centre_with_a_notice(tmp_path: Path) -> None:
    init, mask = picture(tmp_path / "a.png", 128, 48), masked(tmp_path / "m.png", 128, 48, columns=64)
    found = read_init_image(init, mask, (48, 48))
    assert np.array_equal(found.pixels, np.asarray(Image.open(init))[:, 40:88])
    assert found.notices == (f"{init}: 128x48 px, resized and cropped to 48x48",)
    assert found.mask is not None and found.mask[:, :24].all() and not found.mask[:, 24:].any()
    assert read_init_image(init, None, (32, 80)).pixels.shape == (32, 80, 3)


def test_pictures_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(64 * 48, dtype=np.uint32).reshape(48, 64).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    found = read_init_image(tmp_path / "turned.png", None, (64, 48))
    assert np.array_equal(found.pixels[..., 0], np.rot90(np.asarray(image), -1)) and not found.notices
    Image.new("RGBA", (8, 8), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    assert (read_init_image(tmp_path / "clear.png", None, (8, 8)).pixels == 255).all()


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    init, small = picture(tmp_path / "a.png"), masked(tmp_path / "small.png", 32, 48)
    black = masked(tmp_path / "black.png", columns=0)
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(init.read_bytes()[:2000])
    for name, said in {
        "none.png": "No such file",
        "text.png": "not an image",
        "empty.png": "empty file",
        "cut.png": "cannot be read|truncated",
        ".": "director",
    }.items():
        with pytest.raises(UserError, match=rf"init: .*{said}"):
            read_init_image(tmp_path / name, None, (48, 64))
        with pytest.raises(UserError, match=rf"mask: .*{said}"):
            read_init_image(init, tmp_path / name, (48, 64))
    with pytest.raises(UserError, match=r"mask: .*small\.png is 32x48 px, but .*a\.png is 64x48; make them equal"):
        read_init_image(init, small, (48, 64))
    with pytest.raises(UserError, match=r"mask: .*black\.png has no white in it"):
        read_init_image(init, black, (48, 64))
