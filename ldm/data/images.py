"""Image decoding: EXIF orientation, alpha over white, resize to cover and crop, with a reason for every rejection."""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from ldm.data.file_names import FORMATS

MAX_BYTES = 2**28  # of one file
MAX_PIXELS = 61_000_000  # of one image: 233 MiB as Pillow holds RGB
WEIGHT = {"WEBP": 4, "AVIF": 4}  # pixels of these count so much, of progressive JPEGs 2: their decoders hold a picture several times
DRAFT = 1.5  # a scaled JPEG is at least so many times as large as needed: within 1.5 levels of the full one
BAND = 2**20  # pixels of a large image that are made RGB at a time
LARGE = 2**22  # pixels above which an image is large
SQUEEZED = 0.1  # share by which a mask or a map may be wider or narrower than its picture
WHOLE = 2.5  # images up to so many times the result's pixels are resized as a whole, others cropped first

Shape = int | tuple[int, int]  # px: the side of a square, or height and width

_ORIENTATION = 0x0112
_TURN: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # (H,W,3), by the value of EXIF's orientation
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}
LYING = 5  # from this value on height and width change places


class Rejected(ValueError):
    """Rejection of a sample that cannot be used.

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
    """View of an image: pixels after resize and crop, and its size conditions."""

    pixels: np.ndarray  # (H,W,3) uint8
    size: tuple[int, int, int, int, int, int]  # px: original height, width; crop top, left; target height, width
    mask: np.ndarray | None = None  # (H,W) uint8, the same part of the picture's mask; None: it has none
    views: Mapping[str, np.ndarray] = field(default_factory=dict)  # (C,h,w), the same part of its maps, by view


def probe(file: Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width by the header alone, upright where it tells; no pixel is decoded.

    Raises:
        Rejected: if the bytes are not an image of FORMATS or the header promises more than `max_pixels`.
    """
    found = header(file, max_pixels)
    return found.height, found.width


@dataclass(frozen=True)
class Header:
    """What a picture's file tells before a pixel is decoded."""

    height: int  # px, upright where it tells
    width: int
    several: bool  # whether more pictures of the same rank follow: frames of an animation, pages of a TIFF


FIRST = "an animation or several pages, of which the first is taken"  # what is said of those


def header(file: Path | bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """As `probe`, with what else it tells; raises as that."""
    if isinstance(file, Path):
        _check_length(file.stat().st_size)
        with file.open("rb") as stream, _open(stream, max_pixels) as image:
            return Header(*_upright(image), _several(image))
    _check_length(len(file))
    with _open(io.BytesIO(file), max_pixels) as image:
        return Header(*_upright(image), _several(image))


def read_file(path: Path) -> bytes:
    """The bytes of a picture's file, which may be a stranger's: an ordinary one, and no longer than MAX_BYTES.

    Raises:
        Rejected: for anything else.
        OSError: as reading it does.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Rejected("unreadable file", "not an ordinary file")
    _check_length(status.st_size)
    return path.read_bytes()


def _several(image: Image.Image) -> bool:
    """Whether the file holds more than its first picture; a TIFF's smaller copies of it (tag 254) are no pages."""
    try:
        if image.format != "TIFF":
            return image.format in ("GIF", "PNG", "WEBP", "AVIF") and bool(getattr(image, "is_animated", False))
        image.seek(1)
        return not image.tag_v2.get(254, 0) & 1  # type: ignore[attr-defined]
    except Exception:  # as in _open; there is no second one that could be read
        return False


def _upright(image: Image.Image) -> tuple[int, int]:
    # A PNG's orientation may follow its pixels, and Pillow would decode them to look for it.
    turned = "exif" in image.info and _orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


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
    most = max_pixels // (2 if image.info.get("progressive") else WEIGHT.get(image.format or "", 1))
    if image.width * image.height > most:
        raise Rejected("too many pixels", f"{image.width}x{image.height}; at most {most} pixels of {image.format}")
    if image.width < 1 or image.height < 1:
        raise Rejected("damaged header", f"{image.width}x{image.height} pixels")
    return image


@dataclass(frozen=True)
class Levels:
    """Levels of a picture of one wide channel (16-bit or 32-bit numbers, floats): the value that means white."""

    white: float
    inverted: bool  # it means black, and 0 white (TIFF's MinIsWhite, which Pillow heeds for bytes only)


def levels(image: Image.Image) -> Levels | None:
    """What the values of a picture mean; None where it has bytes, whose meaning their mode tells.

    16-bit numbers reach from 0 to 65535, or as far as the bits that a TIFF tells; where none exceeds 255 they are bytes that a
    program wrote as wider numbers, as Pillow and OpenCV do. Floats are 0 to 1 by convention; up to 255 or 65535 they are taken for
    such numbers as floats. What overshoots a little is clipped.

    Raises:
        Rejected: where no range is meant for sure.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(262) == 0
    if image.mode.startswith("I;16"):
        bits = tags.get(258, (16,))[0]
        if bits >= 16 and np.asarray(image).max() <= 255:
            return Levels(255, inverted)
        return Levels(2.0**bits - 1 if 8 < bits <= 16 else 65535, inverted)
    low, high = (float(value) for value in image.getextrema())  # type: ignore[arg-type]
    if not math.isfinite(low + high):
        values = np.asarray(image, np.float64)
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    white = next((white for white in ranges if high <= (2 * white if image.mode == "F" else white)), 0.0)
    if not white or low < -0.25 * white:
        raise Rejected("format not supported", f"values from {low:g} to {high:g}; floats are 0 to 1 or 0 to 255, whole numbers up to 65535")
    return Levels(white, inverted)


def to_rgb(image: Image.Image, wide: Levels | None = None) -> Image.Image:
    """Eight-bit RGB of any mode: wide numbers are scaled, transparency is laid over white, CMYK and YCbCr are converted.

    Embedded colour profiles are ignored, as nearly every training pipeline does.

    Args:
        wide: the `levels` of the picture that this is a part of; None: its own.

    Raises:
        Rejected: as `levels`.
    """
    if (scale := wide or levels(image)) is not None:  # `convert` would clip at 255 and turn most of a 16-bit ramp white
        share = np.nan_to_num(np.asarray(image, np.float64), posinf=scale.white).clip(0, scale.white) * (255 / scale.white)
        grey = (255 - share if scale.inverted else share).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def sides(shape: Shape) -> tuple[int, int]:
    """Height and width."""
    return (shape, shape) if isinstance(shape, int) else shape


def cover(height: int, width: int, shape: Shape) -> tuple[int, int]:
    """Height and width after the resize that keeps the aspect ratio and just covers `shape`."""
    high, wide = sides(shape)
    if high * width >= wide * height:
        return high, max(wide, math.floor(width * high / height + 0.5))
    return max(high, math.floor(height * wide / width + 0.5)), wide


def mirrored(size: Tensor) -> Tensor:
    """The size conditions (B,6) of the same views mirrored: what was cut on the right is now cut on the left."""
    rows = size.clone()
    for row in rows:
        height, width, _, left, *target = (int(v) for v in row)
        row[3] = cover(height, width, (target[0], target[1]))[1] - target[1] - left
    return rows


def view(data: bytes, shape: Shape, at: tuple[float, float] = (0.5, 0.5), flip: bool = False, max_pixels: int = MAX_PIXELS) -> View:
    """One view: decoded (first frame), turned upright, made RGB, maybe mirrored, resized to cover and cropped.

    Resizing is antialiased bicubic in whole numbers; a JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8, but
    never below DRAFT times the covering size.

    Args:
        data: the file's bytes.
        shape: px, of the result.
        at: where the crop lies, (down, across), each from 0 (top, left of the mirrored image) to 1.
        flip: whether to mirror left and right, before the crop.
        max_pixels: refuse an image of more.

    Raises:
        Rejected: if the bytes cannot be decoded completely.
    """
    high, wide = sides(shape)
    _check_length(len(data))
    with _open(io.BytesIO(data), max_pixels) as image:
        height, width = image.height, image.width
        try:
            least = math.ceil(DRAFT * min(cover(*_upright(image), shape)))
            image.draft(None, (least, least))
            full = _direct(image, data, (height, width))
            if full is None:
                image.load()
                full = _small_rgb(image, least)
            orientation = _orientation(image)  # a PNG's may follow its pixels
        except Rejected:
            raise
        except Exception as error:  # as in _open
            raise Rejected("damaged image", f"{type(error).__name__}: {error}") from None
    if orientation in _TURN:
        full = np.ascontiguousarray(_TURN[orientation](full))
        height, width = (width, height) if orientation >= LYING else (height, width)
    rows, columns = cover(height, width, shape)
    top = min(int(at[0] * (rows - high + 1)), rows - high)
    left = min(int(at[1] * (columns - wide + 1)), columns - wide)
    start = columns - wide - left if flip else left  # in the image as it is
    if full.shape[:2] == (high, wide):
        pixels = full
    elif rows * columns <= WHOLE * high * wide:
        pixels = _whole(full, rows, columns)[top : top + high, start : start + wide]
    else:
        pixels = _part(full, (rows, columns), (top, start), (high, wide))
    return View(pixels[:, ::-1] if flip else pixels, (height, width, top, left, high, wide))


def mask_view(data: bytes, seen: View, flip: bool, alpha: bool, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The part of a mask (H,W) uint8 that belongs to a view of its picture: white counts whole, black not at all.

    Args:
        data: a mask's file, of the picture's aspect ratio and any size: its grey value, times its opacity where it has any; or the
            picture's own file.
        alpha: take the opacity of the picture instead; one without transparency counts whole.

    Raises:
        Rejected: if the bytes cannot be decoded completely, or show another shape than the picture.
    """
    _check_length(len(data))
    with _open(io.BytesIO(data), max_pixels) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            opacity = upright.convert("RGBA").getchannel("A") if upright.has_transparency_data else None
            if alpha:
                grey = opacity or Image.new("L", upright.size, 255)
            elif opacity is None:
                grey = to_rgb(upright).convert("L")
            else:
                grey = ImageChops.multiply(upright.convert("RGBA").convert("RGB").convert("L"), opacity)
        except Rejected:
            raise
        except Exception as error:  # as in _open
            raise Rejected("damaged mask", f"{type(error).__name__}: {error}") from None
    height, width, top, left, high, wide = seen.size
    if abs(grey.width - grey.height * width / height) > max(1.5, SQUEEZED * grey.width):
        said = f"{grey.width}x{grey.height} px, of a picture of {width}x{height}"
        raise Rejected("mask of other proportions", f"{said}; what it shows would lie elsewhere: cut both alike")
    rows, columns = cover(height, width, (high, wide))
    start = columns - wide - left if flip else left
    down, across = grey.height / rows, grey.width / columns
    box = (start * across, top * down, min((start + wide) * across, float(grey.width)), min((top + high) * down, float(grey.height)))
    part = np.asarray(grey.resize((wide, high), Image.Resampling.BILINEAR, box=box))
    return part[:, ::-1] if flip else part


def _direct(image: Image.Image, data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """The pixels (H,W,3) of an RGB JPEG of `size` by simplejpeg, as small as its `draft`: Pillow's bits without two copies on the way.

    None where it is another kind or large, where simplejpeg is not installed, or where anything is odd: Pillow then has the say.
    """
    decode = _jpeg_decoder()
    if decode is None or image.format != "JPEG" or image.mode != "RGB" or image.width * image.height > LARGE:
        return None
    scale = next((s for s in (1, 2, 4, 8) if (-(-size[0] // s), -(-size[1] // s)) == (image.height, image.width)), 0)
    try:
        found: np.ndarray = decode(data, "RGB", min_height=image.height, min_width=image.width, min_factor=scale)
    except Exception:
        return None
    return found if found.shape == (image.height, image.width, 3) else None


@lru_cache(maxsize=1)
def _jpeg_decoder() -> Callable[..., np.ndarray] | None:
    """simplejpeg's, where it is installed."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        return None
    return decode_jpeg  # type: ignore[no-any-return]


def _small_rgb(image: Image.Image, least: int) -> np.ndarray:
    """RGB (H,W,3) of a decoded image; a large one is converted band by band and averaged down as far as its sides stay `least` px long."""
    if image.width * image.height <= LARGE:
        return np.array(to_rgb(image))
    by = max(1, min(image.size) // least)
    high = by * max(1, BAND // (image.width * by))
    out = np.empty((-(-image.height // by), -(-image.width // by), 3), np.uint8)
    wide = levels(image)
    for top in range(0, image.height, high):
        part = to_rgb(image.crop((0, top, image.width, min(top + high, image.height))), wide)
        out[top // by : (top + high) // by] = np.asarray(part.reduce(by) if by > 1 else part)
    return out


def _whole(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """All of an image (H,W,3) resized, (rows,columns,3) uint8; torch has Pillow's arithmetic in twice its speed, but no box."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels, size=(rows, columns), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _part(pixels: np.ndarray, whole: tuple[int, int], at: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """The part `shape` at `at` of what an image (H,W,3) would be as `whole`, without making the rest, which may be far larger."""
    image = Image.fromarray(pixels)
    down, across = image.height / whole[0], image.width / whole[1]
    # Rounding must not carry the box past the edge, which Pillow refuses.
    bottom, right = (at[0] + shape[0]) * down, (at[1] + shape[1]) * across
    box = (at[1] * across, at[0] * down, min(right, float(image.width)), min(bottom, float(image.height)))
    return np.asarray(image.resize(shape[::-1], Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block is no reason to lose a good picture
        return 1
