"""Base class of photo data sets: random views by position, damaged or slow samples replaced."""

from __future__ import annotations

import copy
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch

from ldm.config.counts import be, plural
from ldm.config.errors import UserError
from ldm.data import threads
from ldm.data.content import MOST, mark
from ldm.data.dataset import Split, draw_captions, draw_flips
from ldm.data.fields import Fields
from ldm.data.file_names import printable
from ldm.data.folder_views import APART, MAPS, WORDS
from ldm.data.images import Rejected, Shape, mask_view, sides, view
from ldm.data.images import View as SeenView
from ldm.data.view_files import EMPTY, map_view, part_of
from ldm.data.views import VERSION as VIEWS
from ldm.data.views import ViewKind, with_views
from ldm.diffusion.batch import ImageBatch, View, cat
from ldm.diffusion.rng import Rng, mix

LISTED = 20  # rejected files that describe() names; `rejected` has all
REJECTED = ("rejected_files", "rejected_samples", "rejected_rows")  # what describe() calls them
TOLERATED = 10  # bad files that never stop a run, however small the data
# Left out by a rule, not because they are broken.
HARMLESS = ("too small", "format not supported", "no caption", "side picture", *(f"no {name}" for name in (*MAPS, *WORDS)))

_log = logging.getLogger(__name__)


class PhotoSource(Protocol):
    """Settings that every source of photographs has (protocol)."""

    @property
    def crop(self) -> str:
        """`random` or `centre`."""
        ...

    @property
    def max_pixels(self) -> int:
        """Of one image."""
        ...

    @property
    def max_bad(self) -> float:
        """The share of unusable samples above which a run stops."""
        ...

    @property
    def masks(self) -> str:
        """`none`, `beside` (a file of their own) or `alpha` (the picture's opacity)."""
        ...

    @property
    def max_seconds(self) -> float:
        """For reading and decoding one sample."""
        ...


@dataclass(frozen=True)
class Rejection:
    """Rejected sample, and why."""

    name: str  # relative to the data; a row as file:line
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.reason}" + (f": {self.detail}" if self.detail else ""))


@dataclass
class _Work:
    """Views being made on a thread of their own, which is left behind if one of them takes too long."""

    rows: list[tuple[int, tuple[float, float], bool]]  # sample, place of the crop, mirrored
    under_way: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()))  # sample, since when
    reading: bool = False  # from a store that ends it by itself
    done: list[tuple[int, SeenView]] = field(default_factory=list)
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Photos(ABC):
    """One part of a data set of photographs; a subclass says what is there and reads the bytes.

    A sample that turns out damaged when it is decoded is replaced by the next usable one, so that every rank and every run
    agrees; it is logged once and counted. So is one that takes longer than `max_seconds`.

    Args:
        where: the data's path, for messages.
        source: settings of views.
        split: held-out images are cropped at the centre.
        tolerated: how many samples may be replaced before the run stops.
    """

    mirrors = True  # whoever asks for flips knows that the captions name no sides
    patient = False  # whether reading ends by itself, and is not counted in `max_seconds`
    _captions: Sequence[Sequence[str]]  # of each sample
    _fields: Fields
    _sizes: np.ndarray  # (N,2)
    _fingerprint: str
    _contents: Sequence[str]  # of each sample a hash of its picture
    _asked: tuple[str, ...] = ()  # views

    def __init__(self, where: str, source: PhotoSource, split: Split, tolerated: int) -> None:
        self.where, self.split = where, split
        self._look, self._tolerated = source, tolerated
        self.replaced: dict[str, str] = {}  # by name, why a sample was replaced when it was decoded

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a sample is called: unique, and the same wherever the data lies."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image file's bytes.

        Raises:
            Rejected: if they cannot be read or are not what they were.
        """

    def read_mask(self, index: int) -> bytes | None:
        """The bytes of the file that is a sample's mask; None: it has none.

        Raises:
            Rejected: if they cannot be read.
        """
        return None

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return [list(self._captions[i]) for i in index]

    def fields(self) -> Fields:
        """Original sizes and scores of all samples as tables tell them, else sizes by the headers."""
        return self._fields

    def sizes(self) -> np.ndarray:
        """Height and width of all samples by their headers, (N,2) px, upright where these tell."""
        return self._sizes

    def fingerprint(self) -> str:
        """Hash of what the samples are, of the options that change a view, and of what else is told of them."""
        return self._fingerprint if not self._asked else f"{mix(self._fingerprint, 'views', VIEWS, *self._asked):016x}"

    def views(self) -> Mapping[str, ViewKind]:
        """As `ldm.data.dataset.HasViews.views`: none but those that any picture gives."""
        return {}

    def read_view(self, index: int, name: str) -> bytes:
        """The bytes of the file that is a sample's map; here there is none.

        Raises:
            Rejected: if they cannot be read.
        """
        raise Rejected("no view", name)

    def words_of(self, index: int, name: str) -> View | None:
        """Boxes, points or a graph of a whole picture; None: nothing is told of it."""
        return None

    def own_view(self, name: str, seen: Sequence[tuple[int, SeenView]], flips: Sequence[bool]) -> View:
        """A view that the data has itself, of samples as they are seen."""
        kind = self.views()[name]
        if kind.form in ("map", "classes"):
            return torch.from_numpy(np.stack([one.views[name] for _, one in seen]))
        words = [self.words_of(index, name) for index, _ in seen]
        parts = [
            part_of(EMPTY[kind.form] if one is None else one, there.size, flip)
            for one, (_, there), flip in zip(words, seen, flips, strict=True)
        ]
        return cat(parts)  # type: ignore[type-var]

    def with_views(self, names: tuple[str, ...]) -> Self:
        """As `ldm.data.dataset.HasViews.with_views`."""
        found = copy.copy(self)
        found._asked = names
        return found

    def marks(self) -> np.ndarray | None:
        """As `ldm.data.content.HasMarks.marks`."""
        if len(self) > MOST:
            return None
        captions = self.all_captions(range(len(self)))
        rows = [(mark(self.name(i)), mark(repr((self._contents[i], captions[i])))) for i in range(len(self))]
        return np.array(rows, np.uint64).reshape(-1, 2)

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Samples.load`."""
        return self.load_bytes(index, position, resolution, seed, flip).to("cpu")

    def load_bytes(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """As `ldm.data.dataset.Decoded.load_bytes`."""
        if self._look.crop == "random" and self.split == "train":
            at = Rng(seed, position).uniform("crop", (2,)).tolist()
        else:
            at = [(0.5, 0.5)] * len(position)
        flips = draw_flips(seed, position, flip)
        rows = [(int(i), (w[0], w[1]), f) for i, w, f in zip(index, at, flips, strict=True)]
        found = self._in_time(rows, resolution)
        pixels = np.empty((len(index), 3, *sides(resolution)), np.uint8)
        for row, (_, seen) in enumerate(found):
            pixels[row] = seen.pixels.transpose(2, 0, 1)
        masks = None
        if self._look.masks != "none":
            masks = np.full((len(index), 1, *sides(resolution)), 255, np.uint8)
            for row, (_, seen) in enumerate(found):
                if seen.mask is not None:
                    masks[row, 0] = seen.mask
        batch = ImageBatch(
            image=torch.from_numpy(pixels),
            caption=tuple(self.captions([i for i, _ in found], position, seed)),
            size=torch.tensor([seen.size for _, seen in found], dtype=torch.float32).view(-1, 6),
            position=torch.tensor([int(p) for p in position], dtype=torch.int64),
            mask=None if masks is None else torch.from_numpy(masks),
        )
        own = {name: self.own_view(name, found, flips) for name in self._asked if name in self.views()} if self._asked else {}
        return with_views(batch, own, self._asked, seed)

    def _in_time(self, rows: list[tuple[int, tuple[float, float], bool]], resolution: Shape) -> list[tuple[int, SeenView]]:
        """The views of all rows; one thread for them all, another after each sample that took too long."""
        found: list[tuple[int, SeenView]] = []
        while len(found) < len(rows):
            work = _Work(rows[len(found) :])
            threads.start(self._work, "decode", work, resolution)
            slow, since = work.under_way
            while not work.ended.wait(max(0.0, since + self._look.max_seconds - time.monotonic())):
                if work.reading:
                    slow, since = work.under_way[0], time.monotonic()
                    continue
                if work.under_way == (slow, since):
                    self._replace(slow, Rejected("too slow", f"not read and decoded within {self._look.max_seconds:g} s"))
                    break
                slow, since = work.under_way
            found += work.done[: len(rows) - len(found)]
            if work.ended.is_set() and work.error is not None:
                raise work.error
        return found

    def _work(self, work: _Work, resolution: Shape) -> None:
        try:
            for index, at, flip in work.rows:
                with threads.piece():
                    work.done.append(self._view(work, index, resolution, at, flip))
        except BaseException as error:
            work.error = error
        finally:
            work.ended.set()

    def _view(self, work: _Work, index: int, resolution: Shape, at: tuple[float, float], flip: bool) -> tuple[int, SeenView]:
        last, i = index + len(self), index
        while i < last:
            here = i % len(self)
            if self.name(here) not in self.replaced:
                work.under_way = here, time.monotonic()
                try:
                    return here, self._seen(here, self._read(work, here), resolution, at, flip)
                except Rejected as error:
                    self._replace(here, error)
            i = self.after(i)
        why = f"{self.name(index)}: {self.replaced[self.name(index)]}"
        raise UserError(f"{self.where}: none of its {plural(len(self), 'image')} can be used any more, such as {why}")

    def _read(self, work: _Work, index: int) -> bytes:
        """A sample's bytes; where reading ends by itself the time for decoding begins behind it."""
        work.reading = self.patient
        try:
            return self.read(index)
        finally:
            if self.patient:
                work.under_way = index, time.monotonic()  # before `reading` ends, so that nobody sees the old time without it
            work.reading = False

    def _seen(self, index: int, data: bytes, resolution: Shape, at: tuple[float, float], flip: bool) -> SeenView:
        """A sample's view, with the same part of its mask."""
        most = self._look.max_pixels
        seen = view(data, resolution, at, flip, most)
        if maps := [name for name in self._asked if (kind := self.views().get(name)) and kind.form in ("map", "classes")]:
            shape = {name: sides(resolution) if name in APART else seen.size for name in maps}
            views = {name: map_view(self.read_view(index, name), self.views()[name], shape[name], flip, most) for name in maps}
            seen = replace(seen, views=views)
        mask = data if self._look.masks == "alpha" else self.read_mask(index) if self._look.masks == "beside" else None
        return seen if mask is None else replace(seen, mask=mask_view(mask, seen, flip, self._look.masks == "alpha", most))

    def after(self, index: int) -> int:
        """Which sample stands in for one that cannot be used; may run past the end, where the first follows the last."""
        return index + 1

    def _replace(self, index: int, error: Rejected) -> None:
        name = self.name(index)
        self.replaced[name] = str(error)
        if len(self.replaced) > self._tolerated:
            raise UserError(
                f"{self.where}: {len(self.replaced)} of {plural(len(self), 'image')} could not be decoded "
                f"({counted(Counter(v.split(':')[0] for v in self.replaced.values()))}; the last was {name}: {error.detail}); "
                f"mend or remove them, or raise max_bad (now {self._look.max_bad})"
            )
        _log.warning("%s: replaced by the next image: %s", self.origin(index), error)

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return draw_captions(self.all_captions(index), position, seed)

    def origin(self, index: int) -> str:
        """Where a sample came from."""
        return f"{self.where}/{self.name(index)}"


def tolerated(max_bad: float, total: int) -> int:
    """How many of `total` samples may be bad."""
    return max(TOLERATED, int(max_bad * total))


def held_out(names: Sequence[str], share: float) -> np.ndarray:
    """Which names are held out, (N,) bool: those whose hash lies below `share`, at least one of several and never all; none where it is 0.

    A name's part depends on the name alone, so samples that are added later do not move the others.
    """
    place = np.fromiter((mix("val", name) / 2**64 for name in names), np.float64, len(names))
    chosen = place < share
    if len(names) and chosen.all():
        chosen[np.argmax(place)] = False
    if share and len(names) > 1 and not chosen.any():
        chosen[np.argmin(place)] = True
    return chosen


def counted(counts: Counter[str]) -> str:
    """Reasons with their counts, most frequent first."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "none rejected"


def remarks(found: Iterable[tuple[str, str, int]]) -> list[str]:
    """Lines about samples that are taken, though not all of what they bring: (what, a sample's name, how many such)."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for what, name, count in found:
        counts[what] += count
        first.setdefault(what, name)
    return [f"{count:,} with {what}; the first is {first[what]}" for what, count in counts.items()]


def left_out(said: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """What several data sets leave out, by reason and the first of them, and what else they tell of.

    Args:
        said: what each describes itself as.
    """
    rejected: Counter[str] = Counter()
    for each in said:
        if isinstance(found := each.get("rejected"), Mapping):
            rejected.update(found)
    files = [str(file) for each in said for name in REJECTED for file in _list(each.get(name))]
    notes = [note for each in said for note in _list(each.get("notes"))]
    damaged = [each.get("damaged_shards") for each in said]
    shards = {name: places for each in damaged if isinstance(each, Mapping) for name, places in each.items()}
    return {"rejected": dict(rejected), "rejected_files": files[:LISTED], "notes": notes, **({"damaged_shards": shards} if shards else {})}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def refuse_bad(where: str, usable: int, rejected: Counter[str], first: str, max_bad: float) -> None:
    """Stop where too much is broken.

    Raises:
        UserError: with counts by reason and the first of them.
    """
    bad = sum(n for reason, n in rejected.items() if reason not in HARMLESS)
    if bad > tolerated(max_bad, usable + rejected.total()):
        raise UserError(
            f"{where}: {bad} of {plural(usable + rejected.total(), 'file')} {be(bad)} unusable ({counted(rejected)}); {first}; "
            f"mend or remove them, or raise data.max_bad (now {max_bad})"
        )
