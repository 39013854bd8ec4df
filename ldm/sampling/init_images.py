"""Init images and masks of img2img, inpainting and outpainting: read, checked, and fitted to the size that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ldm.config.errors import UserError
from ldm.data.images import FIRST, Rejected, header, to_rgb
from ldm.sampling.masks import RULE, fitted, hole_of, is_clear, novelty_of

T = TypeVar("T")


@dataclass(frozen=True)
class InitImage:
    """A picture as large as what is drawn, with what of it is to be new."""

    pixels: np.ndarray  # (H,W,3) uint8
    mask: np.ndarray | None  # (H,W) bool, True where new
    init_hash: str  # SHA-256 of the file
    mask_hash: str
    notices: tuple[str, ...] = ()  # what was done to its size, and how its mask was read

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
    for notice in found.notices:
        tell(notice)
    for name, path, said in (("init", init, found.init_hash), ("mask", mask, found.mask_hash)):
        if old.get(name) and old[name] != said:
            tell(f"{name}: {path or 'nothing'} is not the file that the recipe was made with: the picture will differ")
    return found


def read_init_image(init: Path, mask: Path | None, size: tuple[int, int]) -> InitImage:
    """The picture and the mask, resized to cover `size` (height, width) px and cropped at the centre.

    Without a mask a picture that is transparent in parts is its own: new there.

    Raises:
        UserError: if a file is missing or no picture, if the two differ in size, or if nothing in the mask is new.
    """
    (picture, hole, clear), init_hash, notices = _read(
        "init", init, lambda image: (to_rgb(image), None if mask else hole_of(image), is_clear(image))
    )
    height, width = size
    if clear:
        notices.append(f"{init}: transparent everywhere, so it is plain white; draw out of another picture, or save it without its alpha")
    if picture.size != (width, height):
        notices.append(f"{init}: {picture.width}x{picture.height} px, resized and cropped to {width}x{height}")
    new, mask_hash = None, ""
    if mask is not None:
        (novelty, how), mask_hash, more = _read("mask", mask, novelty_of)
        notices += more
        if novelty.shape[::-1] != picture.size:
            sides = f"{novelty.shape[1]}x{novelty.shape[0]} px, but {init} is {picture.width}x{picture.height}"
            raise UserError(f"mask: {mask} is {sides}; make them equal")
        notices += [f"{mask}: {how}"] if how else []
        new = fitted(novelty, size)
        if not new.any():
            most = f"; its brightest is {novelty.max()} of 255" if novelty.max() else ""
            raise UserError(f"mask: {mask} has no white in it, so nothing would be new{most}; {RULE}")
    elif hole is not None:
        new, mask_hash = fitted(hole, size), init_hash
        notices.append(f"{init}: where it is transparent it is new, the rest is kept; give --mask for another choice")
    if new is not None and new.all():
        notices.append(f"{mask or init}: nothing of {init} is kept; {RULE}")
    return InitImage(np.asarray(_fit(picture, size)), new, init_hash, mask_hash, tuple(notices))


def read_outpainted(init: Path, margins: tuple[int, int, int, int]) -> InitImage:
    """The picture with margins (left, top, right, bottom; px) around it that are to be new; they continue its outermost pixels.

    Raises:
        UserError: if the file is missing or no picture.
    """
    picture, init_hash, notices = _read("init", init, to_rgb)
    left, top, right, bottom = margins
    pixels = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    new = np.ones(pixels.shape[:2], bool)
    new[top : top + picture.height, left : left + picture.width] = False
    return InitImage(pixels, new, init_hash, "", tuple(notices))


def _fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def hole_in(init: Path) -> bool:
    """Whether a picture is its own mask: transparent in parts. What cannot be read is told when it is drawn from."""
    try:
        return _read("init", init, hole_of)[0] is not None
    except UserError:
        return False


def _read(option: str, path: Path, use: Callable[[Image.Image], T]) -> tuple[T, str, list[str]]:
    """What is made of a picture, turned upright, the hash of its file, and what is to be told of it."""
    try:
        several = header(path).several  # refuses what is no picture, or too large, before a pixel is decoded
        notices = [f"{option}: {path}: {FIRST}"] if several else []
        data = path.read_bytes()
        with Image.open(path) as image:
            return use(ImageOps.exif_transpose(image)), hashlib.sha256(data).hexdigest(), notices
    except Rejected as error:
        raise UserError(f"{option}: {path}: {error}") from None
    except OSError as error:
        raise UserError(f"{option}: {path}: {error.strerror or error}") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{option}: {path}: cannot be read as a picture ({type(error).__name__}: {error})") from None
