"""Bytes become pixels: decode, orient, flatten, resize to cover and crop, with a reason wherever that is refused."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

FORMATS = ("PNG", "JPEG", "WEBP")  # an allow-list: no other decoder ever runs (EPS would start Ghostscript)
MAX_BYTES = 2**28  # of one file
MAX_PIXELS = 2**26  # of one image: 256 MiB as Pillow holds RGB
DRAFT = 1.5  # a scaled JPEG is at least so many times as large as needed: within 1.5 levels of the full one
WHOLE = 2.5  # images up to this aspect ratio are resized as a whole, longer ones cropped first

_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Rejected(ValueError):
    """A sample that cannot be used.

    Attributes:
        reason: one of a few fixed words, to count by.
        detail: what exactly, for the list of rejected files.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class View:
    """One square view of an image."""

    pixels: np.ndarray  # (R,R,3) uint8
    size: tuple[int, int, int, int, int, int]  # px: original height, width; crop top, left; target height, width


def probe(file: Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width by the header alone, before orientation; no pixel is decoded.

    Raises:
        Rejected: if the bytes are not an image of FORMATS or the header promises more than `max_pixels`.
    """
    if isinstance(file, Path):
        _check_length(file.stat().st_size)
        with file.open("rb") as stream, _open(stream, max_pixels) as image:
            return image.height, image.width
    _check_length(len(file))
    with _open(io.BytesIO(file), max_pixels) as image:
        return image.height, image.width


def _check_length(count: int) -> None:
    if count == 0:
        raise Rejected("empty file")
    if count > MAX_BYTES:
        raise Rejected("file too large", f"{count} bytes; at most {MAX_BYTES}")


def _open(stream: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        raise Rejected("not an image", f"none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Rejected("too many pixels", str(error)) from None
    except Exception as error:  # Pillow raises SyntaxError, RuntimeError, ValueError and struct.error besides OSError
        raise Rejected("damaged header", f"{type(error).__name__}: {error}") from None
    if image.width * image.height > max_pixels:
        raise Rejected("too many pixels", f"{image.width}x{image.height}; at most {max_pixels} pixels")
    if image.width < 1 or image.height < 1:
        raise Rejected("damaged header", f"{image.width}x{image.height} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of any mode: 16-bit grey is scaled, transparency is laid over white, CMYK and YCbCr are converted.

    Embedded colour profiles are ignored, as nearly every training pipeline does.
    """
    if image.mode.startswith("I"):  # `convert` would clip at 255 and turn most of a 16-bit ramp white
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.nan_to_num(np.asarray(image)).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def cover(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Height and width after the resize that makes the short side `resolution`."""
    short = min(height, width)
    return (
        max(resolution, math.floor(height * resolution / short + 0.5)),
        max(resolution, math.floor(width * resolution / short + 0.5)),
    )


def mirrored(size: Tensor) -> Tensor:
    """The size conditions (B,6) of the same views mirrored: what was cut on the right is now cut on the left."""
    rows = size.clone()
    for row in rows:
        height, width, _, left, target, target_width = (int(v) for v in row)
        row[3] = cover(height, width, target)[1] - target_width - left
    return rows


def view(
    data: bytes,
    resolution: int,
    at: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> View:
    """One square view: decoded (first frame), turned upright, made RGB, maybe mirrored, resized to cover and cropped.

    Resizing is antialiased bicubic in whole numbers; a JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8, but
    never below DRAFT times the resolution.

    Args:
        data: the file's bytes.
        resolution: px, the side of the result.
        at: where the crop lies, (down, across), each from 0 (top, left of the mirrored image) to 1.
        flip: whether to mirror left and right, before the crop.
        max_pixels: refuse an image of more.

    Raises:
        Rejected: if the bytes cannot be decoded completely.
    """
    _check_length(len(data))
    with _open(io.BytesIO(data), max_pixels) as image:
        height, width = image.height, image.width
        try:
            image.draft(None, (math.ceil(DRAFT * resolution), math.ceil(DRAFT * resolution)))
            image.load()
            turn = _TURN.get(_orientation(image))
            full = to_rgb(image)
        except Exception as error:  # as in _open
            raise Rejected("damaged image", f"{type(error).__name__}: {error}") from None
    if turn is not None:
        full = full.transpose(turn)
    if turn in (_TURN[5], _TURN[6], _TURN[7], _TURN[8]):
        height, width = width, height
    rows, columns = cover(height, width, resolution)
    top = min(int(at[0] * (rows - resolution + 1)), rows - resolution)
    left = min(int(at[1] * (columns - resolution + 1)), columns - resolution)
    start = columns - resolution - left if flip else left  # in the image as it is
    if full.size == (resolution, resolution):
        pixels = np.asarray(full)
    elif rows * columns <= WHOLE * resolution**2:
        pixels = _whole(full, rows, columns)[top : top + resolution, start : start + resolution]
    else:
        pixels = _part(full, rows, columns, top, start, resolution)
    return View(pixels[:, ::-1] if flip else pixels, (height, width, top, left, resolution, resolution))


def _whole(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """All of an image resized, (rows,columns,3) uint8; torch has Pillow's arithmetic in twice its speed, but no box."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, size=(rows, columns), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _part(image: Image.Image, rows: int, columns: int, top: int, left: int, side: int) -> np.ndarray:
    """A square of what an image would be as (rows,columns), without making the rest, which may be far larger."""
    down, across = image.height / rows, image.width / columns
    # Rounding must not carry the box past the edge, which Pillow refuses.
    right, bottom = (left + side) * across, (top + side) * down
    box = (left * across, top * down, min(right, float(image.width)), min(bottom, float(image.height)))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block is no reason to lose a good picture
        return 1


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Float32 (B,3,H,W) in [-1,1] of uint8 (B,H,W,3)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(127.5).sub_(1)
