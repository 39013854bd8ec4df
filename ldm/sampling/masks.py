"""Masks of inpainting: one rule for what is new in a grey, coloured or transparent picture, of any depth."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

HALF = 128  # of 255: from here on something counts as white, or as opaque
WHITES = (1.0, 255.0, 65535.0)  # what a largest value may stand for
SPREAD = 32  # of 255: colours no further apart are one colour
RULE = "white is new; on a transparent layer the paint is new, and in a picture with a hole the hole"


def novelty_of(image: Image.Image) -> tuple[np.ndarray, str]:
    """How new every pixel of a mask is, (H,W) uint8 from 0 to 255, and how that was read; empty: as white.

    Without transparency the brightest of a pixel's colours counts, and white is the smallest of 1, 255 and 65535 that no value
    exceeds. Where some of it is transparent and some opaque: paint of one bright colour is new where it is opaque (what layers and
    brushes of other programs save), black and white paint is new where it is white, and everything else is a picture with a hole,
    new where it is transparent (OpenAI's convention).

    Raises:
        ValueError: for values that are negative or no numbers.
    """
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))
    if not image.has_transparency_data:
        return _brightness(image), ""
    whole = image.convert("RGBA")
    alpha = np.asarray(whole.getchannel("A"))
    colours = np.asarray(whole.convert("RGB"))
    if alpha.max() < HALF or alpha.min() >= HALF:  # it tells nothing apart
        return _brightness(Image.fromarray(colours)), ""
    seen = colours[alpha >= HALF]
    if (np.ptp(seen.astype(int), axis=0) <= SPREAD).all():
        if seen.max() >= HALF:
            return alpha, "paint on a transparent layer: the paint is new"
        return 255 - alpha, "a layer with a hole: the hole is new"
    grey, level = np.ptp(seen.astype(int), axis=1).max() <= SPREAD, seen.max(1)
    if grey and ((level <= SPREAD) | (level >= 255 - SPREAD)).all():
        return np.minimum(_brightness(Image.fromarray(colours)), alpha), "black and white paint on a transparent layer: white is new"
    return 255 - alpha, "a picture with a hole: the hole is new"


def hole_of(image: Image.Image) -> np.ndarray | None:
    """How transparent a picture is, (H,W) uint8 from 0 to 255, where some of it is and some is not; else None."""
    if not image.has_transparency_data:
        return None
    alpha = np.asarray(image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA").getchannel("A"))
    return None if alpha.max() < HALF or alpha.min() >= HALF else 255 - alpha


def is_clear(image: Image.Image) -> bool:
    """Whether nothing of a picture is opaque enough to be seen, whatever its colours are."""
    if not image.has_transparency_data:
        return False
    return int(np.asarray(image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA").getchannel("A")).max()) == 0


def fitted(novelty: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which pixels are new (H,W) bool once it covers `size` (height, width)."""
    height, width = size
    if novelty.shape != size:
        novelty = np.asarray(ImageOps.fit(Image.fromarray(novelty), (width, height), Image.Resampling.LANCZOS))
    return novelty >= HALF


def _brightness(image: Image.Image) -> np.ndarray:
    """The largest of a pixel's colours, white being 255."""
    if image.mode == "1":
        return np.asarray(image.convert("L"))
    if not image.mode.startswith(("I", "F", "L")):
        image = image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    values = values.max(2) if values.ndim == 3 else values
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("holds values that are negative or no numbers; those of a mask go from 0 (kept) to 1 or 255 (new)")
    white = next((white for white in WHITES if values.max() <= white), values.max())
    return np.asarray((values * (255 / white)).round(), np.uint8)
