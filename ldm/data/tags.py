"""Captions as lists of tags: shuffled, some left out, as kohya's scripts do; and fixed words before and after every caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, config, refuse_unread
from ldm.data.buckets import HasBuckets, sizes_of
from ldm.data.dataset import B, HasViews, Samples, asked, expect, loaded
from ldm.data.images import Shape
from ldm.data.views import ViewKind
from ldm.diffusion.batch import MomentBatch
from ldm.diffusion.rng import Rng


@config
class Tags:
    """Captions as tags: in another order, and some left out, each time that a picture is seen. One without a separator stays as it is."""

    shuffle: bool = False  # in another order each time
    keep: Count = 0  # tags at the front that stay where they are (kohya's keep_tokens)
    dropout: Fraction = 0.0  # share of the other tags that are left out (kohya's caption_tag_dropout_rate)
    separator: str = ","  # between tags

    def __post_init__(self) -> None:
        if not self.separator:
            raise UserError("separator: empty; give what stands between tags, such as ','")
        if not self.shuffle and not self.dropout:
            refuse_unread(self, ("keep", "separator"), "where tags stay as they are; set shuffle=true or dropout, or leave tags out")

    def idle(self, captions: Sequence[str]) -> str:
        """What to say where none of some captions, prefixes included, can be said in another way, or nothing is left of them."""
        behind = [len(caption.split(self.separator)) - self.keep for caption in captions if self.separator in caption]
        if captions and max(behind, default=0) < (1 if self.dropout else 2):
            return f"tags: no caption has more than keep={self.keep} tags with {self.separator!r} between them; they stay as they are"
        if self.dropout == 1:
            return f"tags: dropout=1 leaves out every tag behind the first {self.keep}, each time"
        return ""


def affixed(caption: str, prefix: str, suffix: str) -> str:
    """A caption between fixed words, a blank apart unless the suffix begins with a punctuation mark."""
    behind = suffix.strip()
    found = f"{prefix.strip()} {caption}".strip()
    return f"{found}{behind}" if behind[:1] in tuple(",.;:") and behind else f"{found} {behind}".strip()


def varied(caption: str, tags: Tags, order: NDArray[np.float64], left: NDArray[np.float64], fixed: Sequence[tuple[str, str]] = ()) -> str:
    """One way to say a caption.

    Args:
        order: a uniform draw for each tag; the tags stand in its order.
        left: a uniform draw for each tag; those below `dropout` are left out.
        fixed: prefixes and suffixes, which are no tags and stay where they are.
    """
    before, inner, after = _parted(caption, fixed)
    if tags.separator not in inner:
        return caption
    words = [word for part in inner.split(tags.separator) if (word := part.strip())]
    kept, others = words[: tags.keep], list(enumerate(words))[tags.keep :]
    others = [(i, word) for i, word in others if left[i] >= tags.dropout]
    if tags.shuffle:
        others.sort(key=lambda entry: order[entry[0]])
    joint = f"{tags.separator} " if tags.separator.strip() == tags.separator else tags.separator
    return affixed(joint.join([*kept, *(word for _, word in others)]), before, after)


def _parted(caption: str, fixed: Sequence[tuple[str, str]]) -> tuple[str, str, str]:
    """A caption's prefix, what is its own, and its suffix."""
    for prefix, suffix in sorted(fixed, key=lambda pair: -len(pair[0]) - len(pair[1])):
        before, after = prefix.strip(), suffix.strip()
        if caption.startswith(before) and caption.endswith(after) and len(caption) >= len(before) + len(after):
            return before, caption[len(before) : len(caption) - len(after)].strip(), after
    return "", caption, ""


def count_tags(caption: str, tags: Tags) -> int:
    """How many draws a caption takes."""
    return caption.count(tags.separator) + 1


class TaggedSamples(Generic[B]):
    """Data set whose captions are said in another way at each position; pictures or cached latents, which stay what they are.

    Args:
        fixed: prefixes and suffixes of its sources.
    """

    def __init__(self, data: Samples[B], tags: Tags, fixed: Sequence[tuple[str, str]] = ()) -> None:
        self.data: Samples[B] = data
        self.tags, self.fixed = tags, tuple(pair for pair in fixed if any(pair))

    @property
    def mirrors(self) -> bool:
        """As the data's."""
        return self.data.mirrors

    def __len__(self) -> int:
        return len(self.data)

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> B:
        """As `ldm.data.dataset.Samples.load`."""
        return self._said(self.data.load(index, position, resolution, seed, flip), position, seed)

    def load_bytes(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> B:
        """As `ldm.data.dataset.Decoded.load_bytes`, where the data is such."""
        return self._said(loaded(self.data, index, position, resolution, seed, flip), position, seed)

    def ahead(self, index: Sequence[int]) -> None:
        """As `ldm.data.dataset.ReadsAhead.ahead`, where the data does."""
        expect(self.data, index)

    def _said(self, batch: B, position: Sequence[int], seed: int) -> B:
        found = replace(batch, caption=tuple(self._vary(batch.caption, position, seed)))
        # States that were kept are those of the caption as it was.
        return replace(found, text=None) if isinstance(found, MomentBatch) else found

    def _vary(self, captions: Sequence[str], position: Sequence[int], seed: int) -> list[str]:
        rng = Rng(seed, position)
        streams = zip(captions, rng.streams("tag_order"), rng.streams("tag_dropout"), strict=True)
        counted = ((caption, count_tags(caption, self.tags), order, left) for caption, order, left in streams)
        return [varied(caption, self.tags, order.random(n), left.random(n), self.fixed) for caption, n, order, left in counted]

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return self._vary(self.data.captions(index, position, seed), position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As the data's: every tag, in its own order."""
        return self.data.all_captions(index)

    def origin(self, index: int) -> str:
        """As the data's."""
        return self.data.origin(index)

    def views(self) -> Mapping[str, ViewKind]:
        """As the data's."""
        return self.data.views() if isinstance(self.data, HasViews) else {}

    def with_views(self, names: tuple[str, ...]) -> TaggedSamples[B]:
        """As the data's, with the captions as they are said here."""
        return TaggedSamples(asked(self.data, names), self.tags, self.fixed)

    def sizes(self) -> NDArray[np.int32] | None:
        """As the data's, where it knows them."""
        return sizes_of(self.data)

    def buckets(self) -> tuple[Sequence[tuple[int, int]], NDArray[np.int64]] | None:
        """As the data's, where its samples have their shapes already."""
        return self.data.buckets() if isinstance(self.data, HasBuckets) else None

    def describe(self) -> dict[str, object]:
        """As the data's."""
        return self.data.describe()

    def fingerprint(self) -> str:
        """As the data's; what is done to captions stands in the stage's settings."""
        return self.data.fingerprint()
