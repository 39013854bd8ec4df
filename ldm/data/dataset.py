"""Data set protocols: map-style samples addressed by number, with captions, origin and fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, Self, TypeVar, runtime_checkable

from ldm.config.errors import UserError
from ldm.data.images import Shape
from ldm.data.views import ViewKind, kind_of
from ldm.diffusion.batch import ImageBatch, MomentBatch
from ldm.diffusion.rng import Rng

Split = Literal["train", "val"]
B = TypeVar("B", ImageBatch, MomentBatch, covariant=True)


class Samples(Protocol[B]):
    """Map-style data set of images or cached moments; safe to call from several threads."""

    @property
    def mirrors(self) -> bool:
        """Whether captions stay true when a picture is mirrored; if not, `flip` is ignored everywhere."""
        ...

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> B:
        """The samples `index`, each in the view that its global `position` draws.

        Crop, flip and choice of caption are draws of `Rng(seed, position)`: equal arguments give equal bits, whatever
        the neighbours, the rank or the thread. Images are float32 in [-1,1], (len(index),3,height,width).

        Args:
            index: sample numbers in [0, len).
            position: one global sample position per index.
            resolution: px, the side of the square that comes out, or its height and width.
            seed: the run's seed.
            flip: whether half of the positions are mirrored, if the data `mirrors`.
        """
        ...

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """The captions that `load` would give, without decoding any image."""
        ...

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """Every caption of each sample, at least one; `captions` and `load` draw from these."""
        ...

    def origin(self, index: int) -> str:
        """Where a sample came from (a file's path, say), for messages."""
        ...

    def describe(self) -> dict[str, object]:
        """Counts, rejections by reason and the fingerprint, as plain JSON values for the log and the report."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything that the samples depend on."""
        ...


DataSet = Samples[ImageBatch]


@runtime_checkable
class Decoded(Protocol):
    """Data set that gives uint8 images, which need not become floats before they are on a device."""

    def load_bytes(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `Samples.load`, with images as uint8."""
        ...


def loaded(data: Samples[B], index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> B:
    """As `Samples.load`, with images as bytes where the data has them; `.to(device)` gives the same batch in either case."""
    if isinstance(data, Decoded):
        return data.load_bytes(index, position, resolution, seed, flip)  # type: ignore[return-value]
    return data.load(index, position, resolution, seed, flip)


@runtime_checkable
class ReadsAhead(Protocol):
    """Data set that reads many samples by one request where it is told which will be wanted."""

    def ahead(self, index: Sequence[int]) -> None:
        """These samples are loaded soon, each once; returns at once."""
        ...


def expect(data: Samples[B], index: Sequence[int]) -> None:
    """Tell a data set what will be loaded, where it makes use of that."""
    if isinstance(data, ReadsAhead):
        data.ahead(index)


@runtime_checkable
class HasViews(Protocol):
    """Data set that knows more of its pictures than captions, and tells it where it is asked."""

    def views(self) -> Mapping[str, ViewKind]:
        """What it offers by name, besides what any picture gives (`ldm.data.views.ANY`)."""
        ...

    def with_views(self, names: tuple[str, ...]) -> Self:
        """The same samples, whose batches have these views; they are in its fingerprint, too."""
        ...


def offered(data: object, names: Sequence[str]) -> dict[str, ViewKind]:
    """The kinds of the views that a model asks of a data set, by name.

    Raises:
        UserError: naming the first that it does not offer, what it has, and the fix.
    """
    own = data.views() if isinstance(data, HasViews) else {}
    return {name: kind_of(own, name) for name in names}


def asked(data: Samples[B], names: Sequence[str]) -> Samples[B]:
    """A data set asked for views; without names as it is.

    Raises:
        UserError: as `offered`, or where it tells no views at all.
    """
    if not names:
        return data
    offered(data, names)
    if not isinstance(data, HasViews):
        raise UserError(f"views {', '.join(names)}: this data ({data.describe().get('kind', 'data')}) tells none of its pictures")
    found: Samples[B] = data.with_views(tuple(names))
    return found


def draw_flips(seed: int, position: Sequence[int], flip: bool) -> list[bool]:
    """Random horizontal flips by global position: half of them if `flip`, else none."""
    if not flip or not position:
        return [False] * len(position)
    return [bool(u < 0.5) for u in Rng(seed, position).uniform("flip").tolist()]


def draw_captions(choices: Sequence[Sequence[str]], position: Sequence[int], seed: int) -> list[str]:
    """One of each sample's captions, drawn by its global position; no draw where there is one only."""
    several = [i for i, c in enumerate(choices) if len(c) > 1]
    chosen = [c[0] for c in choices]
    if not several:
        return chosen
    for i, u in zip(several, Rng(seed, [position[i] for i in several]).uniform("caption").tolist(), strict=True):
        chosen[i] = choices[i][int(u * len(choices[i]))]
    return chosen
