"""Animated picture files: frames read from a folder or a file, and written as WebP, PNG or GIF."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence

from ldm.config.errors import UserError
from ldm.data.images import Rejected, probe, to_rgb
from ldm.sampling.picture_texts import DESCRIPTION, OURS
from ldm.sampling.recipe import Recipe, claim, texts_of

SUFFIXES = (".webp", ".png", ".apng", ".gif")
MOST_FRAMES = 512


def read_clip(path: Path, size: tuple[int, int]) -> tuple[NDArray[np.uint8], str]:
    """Frames (F,H,W,3) of a folder of pictures, in the order of their names, or of an animated file; and the hash of all files.

    Args:
        size: (height, width) px that they are resized to cover, and cropped.

    Raises:
        UserError: if there are none, too many, or one cannot be read.
    """
    if not path.exists():
        raise UserError(f"clip: {path}: No such file or directory")
    kinds = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in kinds) if path.is_dir() else [path]
    if not files:
        raise UserError(f"clip: {path}: no pictures in it; frames are needed, or one animated file")
    found: list[NDArray[np.uint8]] = []
    whole = hashlib.sha256()
    for file in files:
        try:
            probe(file)
            whole.update(file.read_bytes())
            with Image.open(file) as image:
                for frame in ImageSequence.Iterator(image):
                    if len(found) == MOST_FRAMES:
                        raise UserError(f"clip: {path}: more than {MOST_FRAMES} frames; cut it first")
                    upright = to_rgb(ImageOps.exif_transpose(frame.convert("RGBA") if frame.mode == "P" else frame))
                    fitted = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.LANCZOS)
                    found.append(np.asarray(fitted if upright.size != (size[1], size[0]) else upright))
        except UserError:
            raise
        except Rejected as error:
            raise UserError(f"clip: {file}: {error}") from None
        except Exception as error:  # Pillow raises many kinds on damaged files
            raise UserError(f"clip: {file}: cannot be read as a picture ({type(error).__name__}: {error})") from None
    return np.stack(found), whole.hexdigest()


def save_clip(path: Path, frames: Sequence[Any], rate: float, recipe: Recipe) -> None:
    """Write frames (H,W,3) uint8 as an endless film with its recipe, whole or not at all; without loss but for a GIF's 256 colours.

    Raises:
        UserError: for another ending than WebP's, PNG's or GIF's.
        FileExistsError: if `path` is there already.
    """
    check_suffix(path)
    first, *others = [Image.fromarray(np.asarray(frame)) for frame in frames]
    texts = texts_of(recipe)
    told: dict[str, Any] = {"save_all": True, "append_images": others, "duration": round(1000 / rate), "loop": 0}
    if path.suffix == ".webp":
        exif = Image.Exif()
        exif[DESCRIPTION] = json.dumps(recipe.to_dict())  # EXIF's text is ASCII
        told |= {"format": "WEBP", "lossless": True, "exif": exif.tobytes()}
    elif path.suffix == ".gif":
        told |= {"format": "GIF", "comment": texts[OURS].encode(), "disposal": 2}
    else:
        from PIL import PngImagePlugin

        chunks = PngImagePlugin.PngInfo()
        for name, text in texts.items():
            chunks.add_itxt(name, text)
        told |= {"format": "PNG", "pnginfo": chunks}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        first.save(temporary, **told)
        claim(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_suffix(path: Path) -> None:
    """Refuse what is no film's file name.

    Raises:
        UserError: naming the possible endings.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"out: {path} ends in {path.suffix or 'nothing'}; films are written as {' '.join(SUFFIXES)}")
