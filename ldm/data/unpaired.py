"""Unpaired data: pictures of two domains that show nothing in common, each with its own folder or scenes (CycleGAN)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, PathGiven, config
from ldm.data.dataset import DataSet, Split, expect
from ldm.data.folder import FolderSource
from ldm.data.hugging_face import DatasetsSource
from ldm.data.images import Shape
from ldm.data.photos import left_out
from ldm.data.scenes.source import ScenesSource
from ldm.data.shards import ShardsSource
from ldm.data.views import ViewKind
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng, mix

OTHER = "other"  # the view that holds the second domain's picture
Domain = Annotated[FolderSource | ShardsSource | DatasetsSource | ScenesSource, BY_KIND]


@config
class UnpairedSource:
    """Two domains: the published layout trainA, trainB, testA, testB below `path`, or any two sources."""

    kind: Literal["unpaired"] = "unpaired"
    path: PathGiven | None = None  # a folder with trainA and trainB, and testA and testB to look at
    a: Domain | None = None  # the first domain, in place of a path
    b: Domain | None = None  # the second

    def __post_init__(self) -> None:
        if (self.path is None) == (self.a is None or self.b is None):
            raise UserError("path: give a folder with trainA and trainB, or two sources as a and b")

    def build(self, split: Split) -> Unpaired:
        """Both domains.

        Raises:
            UserError: if a folder of the layout is missing or empty.
        """
        if self.path is None:
            assert self.a is not None and self.b is not None
            return Unpaired(self.a.build(split), self.b.build(split))
        return Unpaired(*(_published(Path(self.path), letter, split) for letter in "AB"))


def _published(path: Path, letter: str, split: Split) -> DataSet:
    """A domain of the published layout; without a test folder a share of the training pictures is held out."""
    train, test = path / f"train{letter}", path / f"test{letter}"
    if not train.is_dir():
        raise UserError(f"data.path: {train} is missing; the layout is trainA and trainB, and testA and testB beside them")
    if not test.is_dir():
        return FolderSource(path=str(train), caption=letter).build(split)
    if split == "train":
        return FolderSource(path=str(train), caption=letter, val_share=0.0).build("train")
    return FolderSource(path=str(test), caption=letter, val_share=0.0, crop="centre").build("train")


class Unpaired:
    """Samples of the first domain, each with one of the second beside it that its position draws.

    An epoch sees every picture of the first domain once; of the second as many, drawn evenly at random.
    """

    def __init__(self, a: DataSet, b: DataSet) -> None:
        for letter, data in (("A", a), ("B", b)):
            if not len(data):
                raise UserError(f"data: the domain {letter} has no pictures in this part; add some, or set val_share")
        self.a, self.b = a, b

    @property
    def mirrors(self) -> bool:
        """Where both may be mirrored."""
        return self.a.mirrors and self.b.mirrors

    def __len__(self) -> int:
        return len(self.a)

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Samples.load`."""
        first = self.a.load(index, position, resolution, seed, flip and self.mirrors)
        drawn = (Rng(seed, position).uniform("other domain").double() * len(self.b)).long().clamp(max=len(self.b) - 1).tolist()
        other = self.b.load(drawn, [mix(p, "other domain") % 2**62 for p in position], resolution, seed, flip and self.mirrors)
        return replace(first, views={**(first.views or {}), OTHER: (other.image + 1) / 2})

    def ahead(self, index: Sequence[int]) -> None:
        """As `ldm.data.dataset.ReadsAhead.ahead`: the first domain's; the other's are drawn from all over it."""
        expect(self.a, index)

    def views(self) -> Mapping[str, ViewKind]:
        """The other domain's picture."""
        return {OTHER: ViewKind(form="map", channels=3)}

    def with_views(self, names: tuple[str, ...]) -> Unpaired:
        """Itself: the other domain is always there.

        Raises:
            UserError: for any other view, which would be of one domain alone.
        """
        if strange := [name for name in names if name != OTHER]:
            raise UserError(f"view {strange[0]!r}: unpaired data has none but {OTHER}")
        return self

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """The first domain's."""
        return self.a.captions(index, position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """The first domain's."""
        return self.a.all_captions(index)

    def origin(self, index: int) -> str:
        """Of the first domain's picture."""
        return self.a.origin(index)

    def describe(self) -> dict[str, object]:
        """Of both domains."""
        a, b = self.a.describe(), self.b.describe()
        return {"kind": "unpaired", "images": len(self), **left_out([a, b]), "a": a, "b": b, "fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """Of both domains."""
        return hashlib.sha256(json.dumps(["unpaired", self.a.fingerprint(), self.b.fingerprint()]).encode()).hexdigest()
