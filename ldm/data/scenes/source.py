"""Synthetic scenes data set: captioned scenes rendered on demand, and the evaluation prompts for models of them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, Positive, config
from ldm.data.dataset import Split
from ldm.data.fields import Fields
from ldm.data.images import Shape
from ldm.data.scenes.captions import Target, called, reword, say, stated
from ldm.data.scenes.checker import reads_back
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.spec import TIERS, VERSION, Specs, TierName, UniformDraws, addresses, draw_specs, pairs_of
from ldm.data.scenes.spec import Pairs as PairNumbers
from ldm.data.scenes.views import KINDS, SceneViews, by_day, by_night
from ldm.data.scenes.web import WebFields, corrupt, draw_web
from ldm.data.views import VERSION as VIEWS
from ldm.data.views import ViewKind, parted, with_views
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng

Pairs = Literal["seen", "held-out", "pair_dev", "pair_test", "count_test", "rel_test", "long_test"]
SHEET = 256  # scenes certified at a time


@config
class ScenesSource:
    """Synthetic scenes of coloured shapes with exact captions, rendered on the fly."""

    kind: Literal["scenes"] = "scenes"
    tier: TierName = "T0"  # one: one large object; T0: one of any size; T1: two; T2: up to four; T3: with fine texture and shadows
    images: Positive = 16384  # training scenes
    val: Positive = 512  # validation scenes, all certified by the checker
    seed: Count = 0  # which corpus; other seeds give other scenes of the same kind
    captions: Positive = 4  # wordings of each scene; the first states every fact
    drop: Fraction = 0.3  # chance that a fact is left out of a further wording; a quarter of it for colours and shapes
    synonyms: bool = False  # whether wordings take synonyms at random: big, disc, hoop
    web: bool = False  # whether training scenes are spoilt as pictures on the web are, for curation
    pairs: tuple[str, ...] = ()  # only such objects, as in [cyan cross, blue ring]; empty: all but the twelve withheld pairs
    called: str = ""  # what captions call the object in place of its colour and shape, such as <thing>; empty: by these
    time: Literal["any", "day", "night"] = "any"  # day: white, plain backgrounds; night: black, striped ones, lit from the right
    certified: bool = False  # whether training scenes must be read back perfectly, too: about 1 ms each at the start

    def __post_init__(self) -> None:
        try:
            pairs_of(self.pairs)
        except ValueError as error:
            raise UserError(f"pairs: {error}") from None
        if self.pairs and TIERS[self.tier].most > 1:
            raise UserError(f"pairs: scenes of tier {self.tier} have several objects; choose them in tier one or T0")
        if self.called and TIERS[self.tier].most > 1:
            raise UserError(f"called: scenes of tier {self.tier} have several objects; choose tier one or T0")

    def build(self, split: Split) -> Scenes:
        """The training scenes, or as many validation scenes as `val` says."""
        return Scenes(self, split)


class Scenes:
    """Scenes 0..n-1 of a split, each a pure function of (tier, its version, split, seed, index); nothing is stored.

    Training scenes obey the split's rules by construction and read back perfectly but for 1.5 % (T3) to none (one); validation scenes
    are certified: one that the checker misreads at its tier's size is drawn again. Thread-safe.
    """

    mirrors = False  # captions name places and sides
    _asked: tuple[str, ...] = ()  # views

    def __init__(self, source: ScenesSource, split: Split) -> None:
        self.source = source
        self.split: Split = split
        self._n = source.images if split == "train" else source.val
        self._web = source.web and split == "train"
        self._only = pairs_of(source.pairs)
        self._attempt: NDArray[np.int64] | None = None
        if split == "val" or source.certified:
            self._attempt = certified(source.tier, split, source.seed, np.arange(self._n), self._only, self._timed)

    def __len__(self) -> int:
        return self._n

    def specs(self, index: Sequence[int] | NDArray[np.int64]) -> Specs:
        """The scenes themselves."""
        rows = np.asarray(index, np.int64)
        attempt = None if self._attempt is None else self._attempt[rows]
        found = draw_specs(self.source.tier, self.split, self.source.seed, rows, attempt, self._only)
        return self._timed(found)

    def _timed(self, specs: Specs) -> Specs:
        return specs if self.source.time == "any" else by_day(specs) if self.source.time == "day" else by_night(specs)

    def views(self) -> Mapping[str, ViewKind]:
        """All exact views of scenes; where these are spoilt as on the web, none."""
        return {} if self._web else KINDS

    def with_views(self, names: tuple[str, ...]) -> Scenes:
        """As `ldm.data.dataset.HasViews.with_views`."""
        found = copy.copy(self)
        found._asked = names
        return found

    def targets(self, index: Sequence[int]) -> list[Target]:
        """All facts of scenes: what their pictures and reconstructions must show."""
        return stated(self.specs(index), self.source.tier)

    def web(self, index: Sequence[int] | NDArray[np.int64]) -> WebFields:
        """How training scenes are spoilt where the source says `web`, and the columns that filters read."""
        keys = addresses(np.asarray(index, np.int64), "web", VERSION, self.source.tier, self.split, self.source.seed)
        return draw_web(keys, TIERS[self.source.tier].pixels)

    def load(self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool) -> ImageBatch:
        """Render scenes, each with the wording that its position draws.

        `flip` is ignored: a mirrored scene would make its caption false. Draws depend on (seed, position) alone.

        Args:
            index: scene numbers in [0, len).
            position: one global sample position per index.
            resolution: px; the same scene at any size.
            seed: the run's seed.
            flip: ignored.
        """
        specs = self.specs(index)
        assert isinstance(resolution, int), "scenes have no sizes of their own, so no buckets"
        images = render(specs, resolution)
        original = np.full(len(images), resolution)
        if self._web:
            web = self.web(index)
            images, original = corrupt(images, web), web.original_px
        size = np.full((len(images), 6), resolution)
        size[:, 2:4] = 0
        size[:, :2] = original[:, None]
        images *= 2
        images -= 1
        batch = ImageBatch(
            image=torch.from_numpy(images),
            caption=tuple(self.captions(index, position, seed) if self._web else self._drawn(specs, index, position, seed)),
            size=torch.from_numpy(size).float(),
            position=torch.tensor(list(position), dtype=torch.int64),
        )
        if not self._asked:
            return batch
        next_ones = (np.asarray(index, np.int64) + 1) % self._n
        exact = SceneViews(specs, lambda: self.specs(next_ones), resolution, Rng(seed, position))
        own = {name: exact.view(name) for name in self._asked if parted(name)[0] in self.views()}
        return with_views(batch, own, self._asked, seed).to("cpu")

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """The captions that `load` gives: one of each scene's wordings, drawn by its global position."""
        if not len(index):
            return []
        shown = self._shown(index)
        return self._drawn(self.specs(shown), shown, position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """Every wording of each scene, `source.captions` of them unless no fact is ever left out."""
        if not len(index):
            return []
        shown = self._shown(index)
        specs = self.specs(shown)
        return [list(row) for row in zip(*(self._say(specs, shown, k) for k in range(self._wordings)), strict=True)]

    def fields(self) -> Fields:
        """What web pictures are said to be; of other scenes nothing is known, as they have any size."""
        if not self._web:
            unknown = np.full(self._n, np.nan, np.float32)
            return Fields(np.zeros(self._n, np.int32), np.zeros(self._n, np.int32), unknown, unknown)
        web = self.web(np.arange(self._n))
        side = web.original_px.astype(np.int32)
        return Fields(side, side, web.aesthetic.astype(np.float32), web.p_watermark.astype(np.float32))

    def origin(self, index: int) -> str:
        """A scene's address, for messages."""
        return f"scene {index} of {self.source.tier}/{self.split}, seed {self.source.seed}"

    def describe(self) -> dict[str, object]:
        """Counts, rejections by reason and the fingerprint, as plain JSON values."""
        source = self.source
        rejected = {} if self._attempt is None else {"misread by the checker": int(self._attempt.sum())}
        out: dict[str, object] = {"kind": source.kind, "tier": source.tier, "version": VERSION, "split": self.split, "images": self._n}
        out |= {"certified": self._attempt is not None, "rejected": rejected, "captions": self._wordings}
        if self._web:
            out["web"] = self.web(np.arange(self._n)).counts()
        return out | {"fingerprint": self.fingerprint()}

    def fingerprint(self) -> str:
        """A hash of everything that the samples depend on."""
        s = self.source
        facts: list[object] = [s.kind, s.tier, VERSION, self.split, self._n, s.seed, s.captions, s.drop, s.synonyms]
        facts += [self._web, self._attempt is not None]
        facts += [list(s.pairs)] if s.pairs else []
        facts += [["called", s.called]] if s.called else []
        facts += [s.time] if s.time != "any" else []
        facts += [["views", VIEWS, *self._asked]] if self._asked else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @cached_property
    def _wordings(self) -> int:
        return self.source.captions if self.source.drop or self.source.synonyms else 1

    def _shown(self, index: Sequence[int]) -> NDArray[np.int64]:
        """The scenes whose captions stand beside the pictures: other ones where a web caption is wrong."""
        shown = np.asarray(index, np.int64)
        if not self._web:
            return shown
        web = self.web(shown)
        return np.where(web.wrong_caption, (web.other * self._n).astype(np.int64), shown)

    def _drawn(self, specs: Specs, index: Sequence[int] | NDArray[np.int64], position: Sequence[int], seed: int) -> list[str]:
        """The wording of each scene that its position draws."""
        wording = (UniformDraws(addresses(np.asarray(position, np.int64), "caption", seed))() * self._wordings).astype(np.int64)
        numbers, out = np.asarray(index, np.int64), [""] * len(specs)
        for k in np.unique(wording).tolist():
            rows = np.flatnonzero(wording == k)
            for i, caption in zip(rows.tolist(), self._say(specs.take(rows), numbers[rows], k), strict=True):
                out[i] = caption
        return out

    def _say(self, specs: Specs, index: NDArray[np.int64], wording: int) -> list[str]:
        keys = addresses(index, "wording", wording, self.source.seed)
        said = [say(target) for target in stated(specs, self.source.tier, keys, self.source.drop if wording else 0.0)]
        if self.source.called:
            said = [called(caption, self.source.called) for caption in said]
        if self.source.synonyms and wording:
            return [reword(caption, key) for caption, key in zip(said, keys.tolist(), strict=True)]
        return said


def certified(
    tier: str,
    split: str,
    seed: int,
    index: NDArray[np.int64],
    only: PairNumbers = (),
    timed: Callable[[Specs], Specs] = lambda specs: specs,
) -> NDArray[np.int64]:
    """For each scene number the first attempt whose picture, in 8 bits at the tier's size, is read back perfectly, (N,).

    Args:
        timed: what is done to scenes before they are drawn.
    """
    attempt = np.zeros(len(index), np.int64)
    left = np.arange(len(index))
    while len(left):
        good = []
        for start in range(0, len(left), SHEET):
            rows = left[start : start + SHEET]
            specs = timed(draw_specs(tier, split, seed, index[rows], attempt[rows], only))
            good.append(reads_back(specs, to_bytes(render(specs, TIERS[tier].pixels))))
        left = left[~np.concatenate(good)]
        attempt[left] += 1
    return attempt


@dataclass(frozen=True)
class ScenePrompts:
    """What a model is asked for, and certified scenes that would be perfect answers."""

    text: tuple[str, ...]
    targets: tuple[Target, ...]  # what each prompt states: every fact
    specs: Specs

    def __len__(self) -> int:
        return len(self.text)


def prompts(tier: TierName, n: int, seed: int = 0, pairs: Pairs = "seen", only: Sequence[str] = ()) -> ScenePrompts:
    """Prompts that state every fact of scenes no data set holds.

    Args:
        tier: how hard.
        n: how many.
        seed: other seeds give other prompts.
        pairs: `seen`: colour-shape pairs, counts and relations of the training scenes; `held-out`: withheld pairs only (`pair_dev` and
            `pair_test` are its halves); or another split's rule: `count_test`, `rel_test`, `long_test`.
        only: objects are of these colour-shape pairs, such as `cyan cross`, in place of the split's.

    Raises:
        ValueError: if the tier cannot hold what the split asks for.
    """
    index = np.arange(n)
    chosen = pairs_of(only)
    specs = draw_specs(tier, pairs, seed, index, certified(tier, pairs, seed, index, chosen), chosen)
    targets = tuple(stated(specs, tier))
    return ScenePrompts(tuple(say(target) for target in targets), targets, specs)
