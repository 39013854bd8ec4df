"""Init images and masks of img2img, inpainting and outpainting: read, checked, and fitted to the size that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ldm.config.errors import UserError
from ldm.data.images import Rejected, probe, to_rgb


@dataclass(frozen=True)
class InitImage:
    """A picture as large as what is drawn, with what of it is to be new."""

    pixels: np.ndarray  # (H,W,3) uint8
    mask: np.ndarray | None  # (H,W) bool, True where new
    init_hash: str  # SHA-256 of the file
    mask_hash: str
    notice: str  # what was done to its size; empty: nothing

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) px."""
        return self.pixels.shape[0], self.pixels.shape[1]


def init_image_of(
    init: Path,
    mask: Path | None,
    margins: tuple[int, int, int, int] | None,
    size: tuple[int, int],
    old: dict[str, Any],
    tell: Callable[[str], None],
) -> InitImage:
    """What is drawn out of: a picture as it is, or with margins around it.

    Args:
        old: a recipe that is followed; files that differ from its own are told.
        tell: told what a user should know.
    """
    found = read_init_image(init, mask, size) if margins is None else read_outpainted(init, margins)
    if found.notice:
        tell(found.notice)
    for name, path, said in (("init", init, found.init_hash), ("mask", mask, found.mask_hash)):
        if old.get(name) and old[name] != said:
            tell(f"{name}: {path or 'nothing'} is not the file that the recipe was made with: the picture will differ")
    return found


def read_init_image(init: Path, mask: Path | None, size: tuple[int, int]) -> InitImage:
    """The picture and the mask, resized to cover `size` (height, width) px and cropped at the centre.

    Raises:
        UserError: if a file is missing or no picture, if the two differ in size, or if nothing is white in the mask.
    """
    picture, init_hash = _read("init", init)
    height, width = size
    notice = ""
    if picture.size != (width, height):
        notice = f"{init}: {picture.width}x{picture.height} px, resized and cropped to {width}x{height}"
    new, mask_hash = None, ""
    if mask is not None:
        shape, mask_hash = _read("mask", mask)
        if shape.size != picture.size:
            raise UserError(
                f"mask: {mask} is {shape.width}x{shape.height} px, but {init} is {picture.width}x{picture.height}; make them equal"
            )
        new = np.asarray(_fit(shape.convert("L"), size)) >= 128
        if not new.any():
            raise UserError(f"mask: {mask} has no white in it; white is where the picture will be new")
    return InitImage(np.asarray(_fit(picture, size)), new, init_hash, mask_hash, notice)


def read_outpainted(init: Path, margins: tuple[int, int, int, int]) -> InitImage:
    """The picture with margins (left, top, right, bottom; px) around it that are to be new; they continue its outermost pixels.

    Raises:
        UserError: if the file is missing or no picture.
    """
    picture, init_hash = _read("init", init)
    left, top, right, bottom = margins
    pixels = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    new = np.ones(pixels.shape[:2], bool)
    new[top : top + picture.height, left : left + picture.width] = False
    return InitImage(pixels, new, init_hash, "", "")


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _read(option: str, path: Path) -> tuple[Image.Image, str]:
    """A picture, upright and RGB, and the hash of its file."""
    try:
        probe(path)  # refuses what is no picture, or too large, before a pixel is decoded
        data = path.read_bytes()
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image)), hashlib.sha256(data).hexdigest()
    except Rejected as error:
        raise UserError(f"{option}: {path}: {error}") from None
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror or error}") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{option}: {path}: cannot be read as a picture ({type(error).__name__}: {error})") from None
