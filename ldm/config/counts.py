"""Counts in sentences."""

from __future__ import annotations


def plural(count: int, one: str, several: str = "") -> str:
    """A count and what it counts, in its number: "1 image is", "2,000 images are".

    Args:
        one: what is said of one thing, the verb with it where that changes.
        several: of others; empty: `one` and an s.
    """
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def be(count: int) -> str:
    """The verb of a share: "1 of 3 captions is"."""
    return "is" if count == 1 else "are"
