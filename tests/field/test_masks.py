"""Masks as programs save them: one rule for transparent, grey and coloured ones of any depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.sampling.init_images import read_init_image
from ldm.sampling.recipe import Recipe, read_recipe

SIDE = 16
LEFT = np.arange(SIDE) < SIDE // 2  # what is kept; the right half is new
NEW = np.tile(~LEFT, (SIDE, 1))


def layers(paint: tuple[int, int, int], kept: tuple[int, int, int], alpha_new: int, alpha_kept: int) -> Image.Image:
    """RGBA: `paint` at the right half and `kept` at the left, each as transparent as said."""
    values = np.zeros((SIDE, SIDE, 4), np.uint8)
    values[:, ~LEFT] = (*paint, alpha_new)
    values[:, LEFT] = (*kept, alpha_kept)
    return Image.fromarray(values)


def holed() -> Image.Image:
    """A bright picture of many colours with a hole at the right."""
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    values[..., 3] = np.where(NEW, 0, 255)
    return Image.fromarray(values)


def palette() -> Image.Image:
    image = Image.fromarray(np.where(NEW, 1, 0).astype(np.uint8), "P")
    image.putpalette([9, 9, 9, 255, 255, 255])
    return image


def clear_palette() -> Image.Image:
    image = palette()
    image.info["transparency"] = 0
    return image


SOFT = np.where(NEW, 200, 40).astype(np.uint8)
MASKS = {
    "white paint on a transparent layer": layers((255, 255, 255), (0, 0, 0), 255, 0),
    "white paint on transparent white": layers((255, 255, 255), (255, 255, 255), 255, 0),
    "red paint": layers((255, 0, 0), (0, 0, 0), 255, 0),
    "soft paint": layers((255, 255, 255), (0, 0, 0), 180, 60),
    "black with a hole": layers((0, 0, 0), (0, 0, 0), 0, 255),
    "black with a white hole": layers((255, 255, 255), (0, 0, 0), 0, 255),
    "a picture with a hole": holed(),
    "opaque": layers((255, 255, 255), (0, 0, 0), 255, 255),
    "all transparent": layers((255, 255, 255), (0, 0, 0), 0, 0),
    "nearly opaque": layers((255, 255, 255), (0, 0, 0), 255, 250),
    "white paint, LA": layers((255, 255, 255), (0, 0, 0), 255, 0).convert("LA"),
    "a hole, LA": layers((0, 0, 0), (0, 0, 0), 0, 255).convert("LA"),
    "grey": Image.fromarray(SOFT),
    "of one bit": Image.fromarray(NEW),
    "of zeros and ones": Image.fromarray(NEW.astype(np.uint8)),
    "coloured": layers((0, 0, 255), (0, 0, 0), 255, 255).convert("RGB"),
    "of zeros and ones, RGB": Image.fromarray(np.repeat(NEW[..., None], 3, 2).astype(np.uint8)),
    "of 16 bits": Image.fromarray(np.where(NEW, 65535, 300).astype(np.uint16)),
    "of 16 bits up to 255": Image.fromarray(np.where(NEW, 255, 0).astype(np.uint16)),
    "of 16 bits up to 1": Image.fromarray(NEW.astype(np.uint16)),
    "palette": palette(),
    "palette with a clear colour": clear_palette(),
    "CMYK": Image.fromarray(np.repeat(np.where(NEW, 255, 0).astype(np.uint8)[..., None], 3, 2)).convert("CMYK"),
    "floating point to 1": Image.fromarray(np.where(NEW, 1.0, 0.2).astype(np.float32)),
    "floating point to 255": Image.fromarray(np.where(NEW, 255.0, 3.0).astype(np.float32)),
}


def saved(folder: Path, image: Image.Image) -> Path:
    path = folder / ("m.tif" if image.mode in ("F", "CMYK") else "m.png")
    image.save(path)
    return path


@pytest.fixture
def init(tmp_path: Path) -> Path:
    Image.new("RGB", (SIDE, SIDE), (10, 20, 30)).save(tmp_path / "init.png")
    return tmp_path / "init.png"


@pytest.mark.parametrize("name", MASKS)
def test_the_right_half_is_new(name: str, init: Path, tmp_path: Path) -> None:
    found = read_init_image(init, saved(tmp_path, MASKS[name]), (SIDE, SIDE))
    assert found.mask is not None and np.array_equal(found.mask, NEW)
    told = name.split(",")[0] in ("white paint", "a hole") or any(word in name for word in ("paint", "hole", "clear"))
    assert bool(found.notices) == told, found.notices


def test_black_and_white_paint_on_a_transparent_layer(init: Path, tmp_path: Path) -> None:
    values = np.zeros((SIDE, SIDE, 4), np.uint8)
    values[:, ~LEFT] = 255
    values[:4, LEFT] = (0, 0, 0, 255)
    found = read_init_image(init, saved(tmp_path, Image.fromarray(values)), (SIDE, SIDE))
    assert found.mask is not None and np.array_equal(found.mask, NEW) and "white is new" in found.notices[0]


def test_what_keeps_nothing_is_told_and_what_keeps_all_refused(init: Path, tmp_path: Path) -> None:
    found = read_init_image(init, saved(tmp_path, Image.new("L", (SIDE, SIDE), 255)), (SIDE, SIDE))
    assert found.mask is not None and found.mask.all() and "nothing of" in found.notices[0] and "is kept" in found.notices[0]
    for image in (Image.new("L", (SIDE, SIDE), 0), Image.new("RGB", (SIDE, SIDE), (90, 90, 90)), Image.new("1", (SIDE, SIDE))):
        with pytest.raises(UserError, match="nothing would be new"):
            read_init_image(init, saved(tmp_path, image), (SIDE, SIDE))
    bad = np.full((SIDE, SIDE), np.nan, np.float32)
    for values in (bad, -np.ones_like(bad)):
        with pytest.raises(UserError, match=r"mask: .*negative or no numbers"):
            read_init_image(init, saved(tmp_path, Image.fromarray(values)), (SIDE, SIDE))


def test_a_picture_with_a_hole_is_its_own_mask(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    values[..., 3] = 255
    values[8:24, 8:24, 3] = 0
    Image.fromarray(values).save(tmp_path / "h.png")
    words = ["sample", "a small red circle", "--model", str(kl_model), "--init", str(tmp_path / "h.png"), "--steps", "2", "--out"]
    assert main([*words, str(tmp_path / "a")]) == 0
    assert "where it is transparent it is new" in capsys.readouterr().err
    drawn = np.asarray(Image.open(tmp_path / "a" / "00000_seed0.png"))
    changed = (drawn != values[..., :3]).any(2)
    assert changed[8:24, 8:24].all() and changed.sum() == 16 * 16
    made = read_recipe(tmp_path / "a" / "00000_seed0.png")
    assert isinstance(made, Recipe) and made.mask == made.init != "" and made.strength == 1.0
    again = [*words[:1], *words[2:], str(tmp_path / "b"), "--from", str(tmp_path / "a" / "00000_seed0.png")]
    assert main(again) == 0 and "differ" not in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b" / "00000_seed0.png")), drawn)


def test_a_picture_that_is_transparent_everywhere_is_told(tmp_path: Path) -> None:
    """It is laid over white, so nothing of what its colours show is drawn out of."""
    Image.fromarray(np.zeros((SIDE, SIDE, 4), np.uint8)).save(tmp_path / "clear.png")
    found = read_init_image(tmp_path / "clear.png", None, (SIDE, SIDE))
    assert found.mask is None and (found.pixels == 255).all() and "transparent everywhere" in found.notices[0]
    Image.fromarray(np.full((SIDE, SIDE, 4), 127, np.uint8)).save(tmp_path / "half.png")
    assert not read_init_image(tmp_path / "half.png", None, (SIDE, SIDE)).notices


def test_a_mask_without_white_says_how_bright_it_is(tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "init.png")
    Image.fromarray(np.where(NEW, 100, 0).astype(np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="its brightest is 100 of 255"):
        read_init_image(tmp_path / "init.png", tmp_path / "mask.png", (SIDE, SIDE))
