"""Metadata columns of picture tables (sizes, aesthetic and watermark scores) under canonical names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Each of our names with the columns that mean it, best first; letter case does not matter. LAION's tables in their variants (base,
# joined, aesthetic subsets, aesthetics v2 and LAION-Art; Schuhmann 2022, arXiv 2210.08402) and img2dataset's own.
ALIASES: dict[str, tuple[str, ...]] = {
    "url": ("url", "image_url"),
    "caption": ("caption", "text", "top_caption", "prompt"),
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "similarity": ("similarity",),
    "language": ("language", "lang"),
    "unsafe": ("punsafe",),
    "watermark": ("pwatermark", "p_watermark", "watermark"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics_score"),
    "hash": ("hash",),
    "sha256": ("sha256",),
    "phash": ("phash", "dhash", "perceptual_hash"),
    "key": ("key", "sample_id"),
}
_SIDES, _SCORES = ("height", "width"), ("aesthetic", "watermark")


def column_of(name: str, columns: Iterable[str]) -> str | None:
    """The column of a table that means one of our names; None if there is none."""
    by_lower = {column.lower(): column for column in reversed(list(columns))}
    return next((by_lower[alias] for alias in ALIASES[name] if alias in by_lower), None)


@dataclass(frozen=True)
class Fields:
    """Metadata of N samples, known before any is decoded."""

    height: NDArray[np.int32]  # (N,) px of the original, before any downloader made it smaller; 0: unknown
    width: NDArray[np.int32]  # (N,) as height
    aesthetic: NDArray[np.float32]  # (N,) 0..10; NaN: unknown
    watermark: NDArray[np.float32]  # (N,) probability; NaN: unknown

    def __getitem__(self, rows: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Fields:
        chosen = np.asarray(rows)
        return Fields(self.height[chosen], self.width[chosen], self.aesthetic[chosen], self.watermark[chosen])


@dataclass(frozen=True)
class Known:
    """Metadata of one row; 0 and NaN: unknown."""

    height: int = 0
    width: int = 0
    aesthetic: float = math.nan
    watermark: float = math.nan

    def over(self, other: Known) -> Known:
        """This, and the other's where this knows nothing."""
        return Known(
            self.height or other.height,
            self.width or other.width,
            other.aesthetic if math.isnan(self.aesthetic) else self.aesthetic,
            other.watermark if math.isnan(self.watermark) else self.watermark,
        )


def known(row: Mapping[str, object]) -> Known:
    """The sizes and scores in a row of any table; what is no number is unknown."""
    values = {name: _number(row.get(column_of(name, row) or "")) for name in (*_SIDES, *_SCORES)}
    sides = {name: int(values[name]) if 0 < values[name] < 2**31 else 0 for name in _SIDES}
    return Known(**sides, aesthetic=values["aesthetic"], watermark=values["watermark"])


def gather(rows: Sequence[Known]) -> Fields:
    """Many rows as columns."""
    return Fields(
        np.array([r.height for r in rows], np.int32),
        np.array([r.width for r in rows], np.int32),
        np.array([r.aesthetic for r in rows], np.float32),
        np.array([r.watermark for r in rows], np.float32),
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan
