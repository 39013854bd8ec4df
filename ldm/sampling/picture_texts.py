"""Texts in picture files: the named chunks of a PNG, and what EXIF and comments of other formats hold in their place."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.files import require_regular
from ldm.formats.signature import is_weights
from ldm.sampling.named_recipe import read_named
from ldm.sampling.webui_text import read_parameters

PARAMETERS, OURS = "parameters", "ldm"  # the names of the web UI's chunk, and of ours
COMFY = ("prompt", "workflow")  # ComfyUI's: what was run, and how its editor shows it
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "TIFF", "BMP")
MAX_PIXELS = 178_000_000  # as Pillow itself allows: a PNG's pixels are passed on the way to its last chunks
MAX_TEXT = 2**22  # characters of one text
DESCRIPTION = 0x010E  # EXIF's field for text, where a format has no named ones
EXIF_TEXTS = (DESCRIPTION, 0x010F, 0x0110, 0x9C9C)  # make and model are ComfyUI's in WebP; the last is Windows' comment
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
XMP_COMMENT = "<exif:UserComment"
NAMED = re.compile(r"\s{0,9}(prompt|workflow)\s{0,9}:\s{0,9}(?=\{)", re.IGNORECASE)


def read_chunks(path: Path) -> dict[str, str]:
    """The texts that a picture file carries, by their names.

    Raises:
        UserError: if the file is no picture.
    """
    from PIL import Image

    try:
        require_regular(path)
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path}: {image.width}x{image.height} px; at most {MAX_PIXELS} pixels are read")
            found = _named(image)
            for text in _unnamed(image):
                found = _meant(text) | found
            return {name: text for name, text in found.items() if len(text) <= MAX_TEXT}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or _no_picture(path)}") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{path}: cannot be read as a picture ({' '.join(str(error).split())[:200]})") from None


def _no_picture(path: Path) -> str:
    """What a file is that no decoder knows, as far as its first bytes tell."""
    return (
        "weights, and not a picture; give the folder of the model, or of the run, that they belong to"
        if is_weights(path)
        else "not a picture"
    )


def _named(image: Any) -> dict[str, str]:
    """The named texts of a picture; of a PNG that is cut off those that stand before its pixels.

    Raises:
        OSError: if it is cut off and has none.
    """
    try:
        return {str(name): str(text) for name, text in getattr(image, "text", {}).items()}
    except OSError:
        ahead = {str(name): str(text) for name, text in image.info.items() if isinstance(text, str)}
        if not ahead:
            raise OSError(errno.EIO, "damaged or cut off") from None
        return ahead


def _unnamed(image: Any) -> Iterator[str]:
    """Texts that have no name of their own: EXIF's, and the comments of GIF and JPEG."""
    if isinstance(comment := image.info.get("comment"), bytes):
        yield comment.decode("utf-8", "replace")
    if isinstance(packet := image.info.get("xmp"), bytes) and len(packet) <= 4 * MAX_TEXT:
        yield from _xmp_comments(packet.decode("utf-8", "replace"))
    try:
        exif = image.getexif()
        values = [exif.get_ifd(EXIF_IFD).get(USER_COMMENT), *(exif.get(tag) for tag in EXIF_TEXTS)]
    except Exception:  # a damaged EXIF block is no reason to refuse a good picture
        return
    for value in values:
        if isinstance(value, bytes):
            yield exif_text(value)
        elif isinstance(value, str):
            yield value


def _xmp_comments(packet: str) -> Iterator[str]:
    """What XMP has as EXIF's comment, in one language or several: Draw Things' way. It is searched for and not parsed, in linear time."""
    start, end = packet.find(XMP_COMMENT), packet.find(f"</{XMP_COMMENT[1:]}")
    if not 0 <= start < end:
        return
    for item in packet[start:end].split("<rdf:li")[1:]:
        yield unescape(item.partition(">")[2].partition("</rdf:li>")[0])


def exif_text(value: bytes) -> str:
    """A text of EXIF: its first eight bytes name the code (`ASCII`, `UNICODE`, `JIS`), where they do."""
    code, rest = value[:8], value[8 : 8 + 4 * MAX_TEXT]
    if code.startswith(b"UNICODE"):
        return _utf16(rest).strip("\0")
    if code.startswith(b"JIS\0"):
        return rest.decode("iso2022_jp", "replace").strip("\0")
    if code.startswith(b"ASCII\0") or code == b"\0" * 8:
        return rest.decode("utf-8", "replace").strip("\0")
    whole = value[: 4 * MAX_TEXT]
    return (_utf16(whole) if b"\0" in whole[:2] or whole[:2] in (b"\xff\xfe", b"\xfe\xff") else whole.decode("utf-8", "replace")).strip(
        "\0"
    )


def _utf16(data: bytes) -> str:
    """UTF-16 of either byte order, told by its mark or by where the zeros of plain letters lie; without any zero UTF-8."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    high, low = data[::2].count(0), data[1::2].count(0)
    if not high and not low:
        return data.decode("utf-8", "replace")
    return data.decode("utf-16-be" if high >= low else "utf-16-le", "replace")


def _meant(text: str) -> dict[str, str]:
    """The chunk that a text without a name stands for; empty if it is no recipe."""
    if text.startswith('{"schema"'):
        return {OURS: text}
    if named := NAMED.match(text):
        return {named[1].lower(): text[named.end() :]}
    known = len(text) <= MAX_TEXT and (read_parameters(text) or read_named({PARAMETERS: text}))
    return {PARAMETERS: text} if known else {}
