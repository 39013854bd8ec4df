"""Lengths of captions in tokens: which of them a text encoder cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.config.counts import be, plural

LOOKED_AT = 5000  # captions of a data set, spread evenly, that are counted when a training starts


@dataclass(frozen=True)
class CutCaptions:
    """Captions that are longer than a text encoder reads."""

    count: int
    of: int  # captions that were looked at
    room: int  # tokens that are read
    longest: int  # tokens of the longest
    example: str  # the longest itself, its beginning

    def __str__(self) -> str:
        share = f"{self.count:,} of {plural(self.of, 'caption')} {be(self.count)}"
        what = f"{share} longer than the {self.room} tokens that the text encoder reads"
        return f"{what}, and what is beyond them is cut (the longest has {self.longest}: {self.example!r})"


def cut_captions(captions: Iterable[str], tokenizer: Callable[[], Any], room: int) -> CutCaptions | None:
    """Which captions have more than `room` tokens; None: none.

    Args:
        tokenizer: makes one of transformers; called only where a caption may be too long.
    """
    texts = list(captions)
    # A token stands for a byte at least, so that most need not be counted.
    long = [text for text in texts if len(text.encode("utf-8", "replace")) > room]
    if not long:
        return None
    counts = [len(ids) for ids in tokenizer()(long, add_special_tokens=False, verbose=False)["input_ids"]]
    over = [(count, text) for count, text in zip(counts, long, strict=True) if count > room]
    if not over:
        return None
    most, text = max(over)
    return CutCaptions(len(over), len(texts), room, most, text[:60])


def spread(total: int, most: int = LOOKED_AT) -> Sequence[int]:
    """At most so many of `total` numbers, evenly."""
    return range(0, total, max(1, -(-total // most)))
