"""Agreement of pictures of scenes with what each of several views told of them, and with their words, by the exact checker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.captions import Target
from ldm.data.scenes.checker import WORK, Reading, colours, read
from ldm.data.scenes.spec import TONES, Specs
from ldm.data.views import parted
from ldm.metrics import adherence
from ldm.metrics.grounding import exact, grounded

WORDS = "words"  # what captions state, beside the views' names
Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Shown:
    """Pictures of scenes and what they should show."""

    specs: Specs
    targets: Sequence[Target]  # what the scenes' captions state
    images: NDArray[np.uint8]  # (N,H,W,3)
    reading: Reading

    @classmethod
    def of(cls, specs: Specs, targets: Sequence[Target], images: NDArray[np.uint8]) -> Shown:
        """With what is read of the pictures."""
        return cls(specs, targets, images, read(images))


def outline(shown: Shown) -> Shares:
    """Intersection over union of the objects' pixels and the scene's, of any colour, (N,); 0 where only one of the two has any."""
    told, seen = _classes(shown) >= 0, colours(shown.images) >= 0
    return _iou(told & seen, told | seen)


def classes(shown: Shown) -> Shares:
    """Intersection over union of the objects' pixels by colour, (N,)."""
    told, seen = _classes(shown), colours(shown.images)
    return _iou((told >= 0) & (told == seen), (told >= 0) | (seen >= 0))


def ground(shown: Shown) -> Shares:
    """Whether the background has the scene's tone and texture, (N,)."""
    return ((shown.reading.tone == shown.specs.tone) & (shown.reading.texture == shown.specs.texture)).astype(np.float64)


def boxed(shown: Shown) -> Shares:
    """Mean overlap of the objects' boxes with those of objects of the same colour and shape, (N,)."""
    return grounded(shown.specs, shown.reading)[1]


def stated(shown: Shown) -> Shares:
    """Whether all that the captions state is there, (N,): `strict`, and the background where it is stated."""
    scores = adherence.grade(shown.reading, shown.targets)
    return np.minimum(scores["strict"], np.where(np.isnan(scores["bg"]), 1.0, scores["bg"]))


AGREEMENTS: Mapping[str, Callable[[Shown], Shares]] = {
    WORDS: stated,
    "labels": classes,
    "edges": outline,
    "sketch": outline,
    "depth": outline,
    "boxes": boxed,
    "style": ground,
}


def agreement(name: str, shown: Shown) -> Shares:
    """Agreement with a view by its name, or with WORDS, in [0,1] of each picture (N,).

    Raises:
        KeyError: where none is known.
    """
    return AGREEMENTS[parted(name)[0]](shown)


def _classes(shown: Shown) -> NDArray[np.int64]:
    """The scene's objects by colour, (N,h,w) as pictures are read; below 0 the background."""
    labels = exact(shown.specs, ("labels",), min(shown.images.shape[1], WORK), 0)["labels"]
    return np.asarray(labels)[:, 0].astype(np.int64) - len(TONES)


def _iou(both: NDArray[np.bool_], either: NDArray[np.bool_]) -> Shares:
    return both.sum((1, 2)) / np.maximum(either.sum((1, 2)), 1)
