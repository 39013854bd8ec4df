"""Two data sets as one, in fixed shares: pictures of something new beside pictures of its kind (DreamBooth's prior preservation)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.batch import ImageBatch, cat
from ldm.data.buckets import sizes_of
from ldm.data.dataset import DataSet
from ldm.data.images import Shape


class Mixed:
    """Samples of `first` and of `second`, the latter `share` of all; each once in an epoch at least, the fewer ones as often as that takes.

    Args:
        share: of the second, between 0 and 1.
    """

    def __init__(self, first: DataSet, second: DataSet, share: float) -> None:
        self.parts, self.share = (first, second), share
        total = max(math.ceil(len(first) / (1 - share)), math.ceil(len(second) / share))
        self.others = max(1, round(total * share))  # samples of the second
        self.own = total - self.others

    @property
    def mirrors(self) -> bool:
        """Whether captions of both stay true when a picture is mirrored."""
        return all(part.mirrors for part in self.parts)

    def __len__(self) -> int:
        return self.own + self.others

    def _place(self, index: int) -> tuple[int, int]:
        """Which part a sample is of, and its number there."""
        part = int(index >= self.own)
        return part, (index - part * self.own) % len(self.parts[part])

    def _each(self, index: Sequence[int], ask: Callable[[DataSet, list[int]], Any]) -> list[Any]:
        return [ask(self.parts[part], [number]) for part, number in map(self._place, index)]

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Samples.load`."""
        found, order = [], []
        for part, data in enumerate(self.parts):
            rows = [row for row, i in enumerate(index) if self._place(i)[0] == part]
            if rows:
                numbers = [self._place(index[row])[1] for row in rows]
                found.append(data.load(numbers, [position[row] for row in rows], resolution, seed, flip and self.mirrors))
                order += rows
        whole = cat(found)
        back = torch.tensor(np.argsort(order))
        return ImageBatch(
            image=whole.image[back], caption=tuple(whole.caption[i] for i in back), size=whole.size[back], position=whole.position[back]
        )

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        places = zip(map(self._place, index), position, strict=True)
        return [self.parts[part].captions([number], [at], seed)[0] for (part, number), at in places]

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return [found[0] for found in self._each(index, lambda data, numbers: data.all_captions(numbers))]

    def origin(self, index: int) -> str:
        """As the part's."""
        part, number = self._place(int(index))
        return self.parts[part].origin(number)

    def sizes(self) -> NDArray[np.int32] | None:
        """Of all samples, where both parts know them."""
        known = [sizes_of(part) for part in self.parts]
        if known[0] is None or known[1] is None:
            return None
        return np.concatenate([known[part][np.arange(count) % len(known[part])] for part, count in enumerate((self.own, self.others))])  # type: ignore[index, arg-type]

    def describe(self) -> dict[str, object]:
        """The first's own, and how many there are of the second."""
        return {
            **self.parts[0].describe(), "of_its_kind": len(self.parts[1]), "share_of_its_kind": self.share,
            "fingerprint": self.fingerprint(),
        }  # fmt: skip

    def fingerprint(self) -> str:
        """Of both parts and the share."""
        said = ["mixed", 1, *(part.fingerprint() for part in self.parts), self.share]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()
