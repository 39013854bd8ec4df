"""Scene specifications: vocabulary, difficulty tiers, splits by rule, and counter-based sampling of scenes.

Many scenes are one `Specs` of arrays, so that drawing and rendering cost NumPy calls per batch and not per scene. All lengths are in units
of the image's side, x to the right and y downwards; an object's centre is the centre of its bounding box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.geometry import HALF_HEIGHT, HALF_WIDTH, distances, outlines, relation_of
from ldm.diffusion.rng import mix

VERSION = 1  # raise it whenever any image changes
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "medium", "large")
TONES = ("black", "gray", "white")
TEXTURES = ("plain", "striped", "checkered")
FILLS = ("solid", "striped")
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
COLOUR_RGB = np.array(
    [
        [0.88, 0.12, 0.14],
        [0.95, 0.50, 0.08],
        [0.95, 0.88, 0.12],
        [0.13, 0.68, 0.20],
        [0.10, 0.78, 0.80],
        [0.13, 0.28, 0.88],
        [0.52, 0.16, 0.82],
        [0.97, 0.32, 0.68],
    ],
    np.float32,
)
TONE_RGB = np.array([[0.10, 0.10, 0.11], [0.45, 0.45, 0.46], [0.90, 0.90, 0.88]], np.float32)
SIDE = np.array([0.20, 0.28, 0.392])  # square root of the area, by size class
JITTER = 0.06  # of SIDE, either way
PERIOD = (0.17, 0.22)  # of the background's texture
BORDER = 0.03  # a centre keeps this far from the borders of its cell

TierName = Literal["one", "T0", "T1", "T2", "T3"]


@dataclass(frozen=True)
class Tier:
    """Difficulty tier of scenes."""

    pixels: int  # where its scenes are certified
    least: int  # objects
    most: int
    textured: bool = False
    fixed_light: bool = False
    grain: float = 0.015
    sizes: tuple[int, ...] = (0, 1, 2)
    centre_odds: float = 1.0  # of drawing the centre's cell, whose objects more often find no neighbour: evens the cells out
    touching: bool = False  # objects may touch and hide up to a quarter of each other
    rich: bool = False  # striped fills, fine texture and shadows


TIERS: dict[str, Tier] = {
    "one": Tier(32, 1, 1, fixed_light=True, grain=0.0, sizes=(2,)),
    "T0": Tier(32, 1, 1),
    "T1": Tier(32, 2, 2, textured=True, centre_odds=1.8),
    "T2": Tier(64, 1, 4, textured=True, centre_odds=1.25, touching=True),
    "T3": Tier(128, 1, 4, textured=True, centre_odds=1.25, touching=True, rich=True),
}


Pairs = tuple[tuple[int, int], ...]  # numbers of colour and shape


def _pairs(text: str) -> Pairs:
    words = (pair.split() for pair in text.split(","))
    return tuple((COLOURS.index(colour), SHAPES.index(shape)) for colour, shape in words)


def pairs_of(names: Sequence[str]) -> Pairs:
    """The colour-shape pairs that `cyan cross` and the like name.

    Raises:
        ValueError: naming what is no colour and shape.
    """
    for name in names:
        colour, _, shape = name.partition(" ")
        if colour not in COLOURS or shape not in SHAPES:
            raise ValueError(f"{name!r} is no colour and shape; colours are {', '.join(COLOURS)}, shapes {', '.join(SHAPES)}")
    return _pairs(",".join(names)) if names else ()


PAIR_DEV = _pairs("red circle,blue square,yellow triangle,pink diamond,cyan cross,orange ring")
PAIR_TEST = _pairs("cyan circle,orange square,purple triangle,green diamond,red cross,blue ring")
SEEN = tuple((c, s) for c in range(8) for s in range(6) if (c, s) not in PAIR_DEV + PAIR_TEST)


@dataclass(frozen=True)
class Rules:
    """Rules of a split: what it admits; `None` means either."""

    pairs: tuple[tuple[int, int], ...] = SEEN
    many: bool | None = False  # three or four equal squares, diamonds or rings
    relation: bool | None = False  # a relation of the withheld eighth
    phrases: int = 1  # at least so many different colour-shape pairs


SPLITS: dict[str, Rules] = {
    "train": Rules(),
    "val": Rules(),
    "seen": Rules(),  # of prompts
    "pair_dev": Rules(PAIR_DEV, None, None),
    "pair_test": Rules(PAIR_TEST, None, None),
    "held-out": Rules(PAIR_DEV + PAIR_TEST, None, None),
    "count_test": Rules(many=True, relation=None),
    "rel_test": Rules(many=None, relation=True),
    "long_test": Rules(many=None, relation=None, phrases=4),
}


@dataclass(frozen=True)
class Specs:
    """N scenes of at most K objects in paint order, as arrays; attributes index the word lists above, -1 where there is no object."""

    colour: NDArray[np.int64]  # (N,K)
    shape: NDArray[np.int64]  # (N,K)
    size: NDArray[np.int64]  # (N,K)
    cell: NDArray[np.int64]  # (N,K)
    fill: NDArray[np.int64]  # (N,K)
    x: NDArray[np.float64]  # (N,K) centre of the bounding box
    y: NDArray[np.float64]  # (N,K)
    side: NDArray[np.float64]  # (N,K) square root of the area
    tone: NDArray[np.int64]  # (N,)
    texture: NDArray[np.int64]  # (N,)
    wave: NDArray[np.float64]  # (N,4) angle, period and two phases of the texture
    light: NDArray[np.float64]  # (N,2) direction and fall-off
    grain: NDArray[np.float64]  # (N,) standard deviation
    rich: NDArray[np.bool_]  # (N,) fine texture and shadows
    key: NDArray[np.uint64]  # (N,) addresses the grain

    def __len__(self) -> int:
        return len(self.tone)

    @property
    def count(self) -> NDArray[np.int64]:
        """Objects per scene, (N,)."""
        return (self.shape >= 0).sum(1)

    def take(self, rows: NDArray[np.int64] | slice) -> Specs:
        """Some of the scenes."""
        return Specs(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def relit(self, seed: int) -> Specs:
        """The same scenes under other light and grain."""
        draw = UniformDraws(hashed(self.key ^ np.uint64(mix("relit", seed))))
        return replace(self, light=_light(draw, len(self)), key=draw.keys)


def hashed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 hash (finaliser) of each word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


STEP = np.uint64(0x9E3779B97F4A7C15)


def addresses(index: NDArray[np.int64], *words: int | str) -> NDArray[np.uint64]:
    """One key per index, different for different words, (N,)."""
    return hashed(hashed(np.asarray(index).astype(np.uint64) * STEP + np.uint64(mix(*words))) + STEP)


class UniformDraws:
    """Counter-based uniform random numbers in [0,1) for N keys; the k-th draw of a key depends on nothing but the two."""

    def __init__(self, keys: NDArray[np.uint64]) -> None:
        self.keys = keys
        self._used = 1

    def __call__(self, *shape: int) -> NDArray[np.float64]:
        """The next draws, (N, *shape)."""
        many = int(np.prod(shape, dtype=np.int64))
        slots = np.arange(self._used, self._used + many, dtype=np.uint64) * STEP
        self._used += many
        bits = hashed(self.keys[:, None] + slots) >> np.uint64(11)
        return (bits.astype(np.float64) * 2.0**-53).reshape(len(self.keys), *shape)


@cache
def hues() -> NDArray[np.float64]:
    """The colours' hues in degrees, (8,)."""
    import colorsys

    return np.array([360 * colorsys.rgb_to_hsv(*rgb)[0] for rgb in COLOUR_RGB.tolist()])


@cache
def hue_gap() -> NDArray[np.float64]:
    """Degrees between the colours' hues, (8,8)."""
    gap = np.abs(hues()[:, None] - hues()[None])
    return np.minimum(gap, 360 - gap)


@cache
def withheld_relations() -> NDArray[np.bool_]:
    """Which (axis, shape, shape) are kept for `rel_test`, (2,6,6): about an eighth; inverse and mirrored triples go together."""
    table = np.zeros((2, 6, 6), bool)
    triples = [(axis, a, b) for axis in range(2) for a in range(6) for b in range(a, 6)]
    for axis, a, b in sorted(triples, key=lambda triple: mix("rel_test", *triple))[: len(triples) // 8]:
        table[axis, a, b] = table[axis, b, a] = True
    return table


# ---- drawing ---------------------------------------------------------------------------------------------------------------------------
CELL_ORDER = np.array([0, 1, 2, 3, 5, 6, 7, 8, 4])  # the centre last
REPEAT = 0.15  # chance that an object of the rich tiers joins the group before it
TRIES = 12  # places tried for an object before the scene is drawn afresh
GAP = {False: 0.04, True: 0.04}  # between objects that must not touch, by Tier.touching
SIZE_ODDS = {1: (1, 1, 1), 2: (1, 1, 1), 3: (0.45, 0.40, 0.15), 4: (0.50, 0.40, 0.10)}  # by number of objects


def _light(draw: UniformDraws, n: int) -> NDArray[np.float64]:
    return draw(2) * (2 * np.pi, 0.25) + (0, 0.05)


def along(place: NDArray, extent: NDArray, u: NDArray) -> NDArray[np.float64]:
    """A coordinate in the first, second or third third, inside the image as far as the third allows."""
    high = 1 / 3 - BORDER
    low = np.minimum(extent + 0.01, high)
    outer = low + u * (high - low)
    middle = 1 / 3 + BORDER + u * (1 / 3 - 2 * BORDER)
    return np.where(place == 1, middle, np.where(place == 0, outer, 1 - outer))


def _attempt(tier: Tier, rules: Rules, keys: NDArray[np.uint64]) -> tuple[Specs, NDArray[np.bool_]]:
    """One scene per key, and whether it keeps the rules."""
    n, most = len(keys), tier.most
    draw = UniformDraws(keys)
    count = tier.least + (draw() * (most - tier.least + 1)).astype(np.int64)
    if rules.phrases > 1:
        count = np.full(n, most)
    there = np.arange(most) < count[:, None]
    offers = np.array(rules.pairs)[(draw(most, 4) * len(rules.pairs)).astype(np.int64)]  # (N,K,4,2)
    repeat, alike = draw(most) < (0.8 if rules.many else REPEAT), draw(most)
    pair = offers[:, :, 0].copy()
    for j in range(1, most):  # a new colour where one is offered, or a group: three red squares
        new = (offers[:, j, :, None, 0] != pair[:, None, :j, 0]).all(2)
        pair[:, j] = offers[np.arange(n), j, new.argmax(1)]
        if most > 2 and rules.phrases == 1:
            pair[:, j] = np.where(repeat[:, j, None], pair[:, j - 1], pair[:, j])
    odds = np.array([np.cumsum(np.array(SIZE_ODDS[c])[list(tier.sizes)]) for c in range(1, 5)])[count - 1]
    chosen = (draw(most)[..., None] * odds[:, None, -1:] >= odds[:, None, :]).sum(-1)
    size = np.array(tier.sizes)[np.minimum(chosen, len(tier.sizes) - 1)]
    side = SIDE[size] * (1 + JITTER * (2 * draw(most) - 1))
    fill = np.where(tier.rich & (draw(most) < 0.4) & (size > 0), 1, 0)
    colour, shape = pair[..., 0], pair[..., 1]
    for j in range(1, most):  # the members of a group mostly look alike
        same = (colour[:, j] == colour[:, j - 1]) & (shape[:, j] == shape[:, j - 1]) & (alike[:, j] < 0.8)
        for values in (size, fill):
            values[:, j] = np.where(same, values[:, j - 1], values[:, j])
        side[:, j] = np.where(same, side[:, j - 1], side[:, j])
    cells = CELL_ORDER[np.minimum(draw(most, TRIES) * (8 + tier.centre_odds), 8).astype(np.int64)]
    xs = along(cells % 3, (HALF_WIDTH[shape] * side)[..., None], draw(most, TRIES))
    ys = along(cells // 3, (HALF_HEIGHT[shape] * side)[..., None], draw(most, TRIES))
    cell, x, y, good = placed(tier, there, colour, shape, side, cells, xs, ys)
    good &= _admitted(rules, count, there, colour, shape, x, y)
    if most == 2:
        good &= colour[:, 0] != colour[:, 1]
    tone = (draw() * 3).astype(np.int64)
    texture = (draw() * 3).astype(np.int64) if tier.textured else np.zeros(n, np.int64)
    wave = draw(4) * (np.pi, PERIOD[1] - PERIOD[0], 1, 1) + (0, PERIOD[0], 0, 0)
    light = np.tile([1.25 * np.pi, 0.10], (n, 1)) if tier.fixed_light else _light(draw, n)
    colour, shape, size, cell, fill = (np.where(there, values, -1) for values in (colour, shape, size, cell, fill))
    grain, rich = np.full(n, tier.grain), np.full(n, tier.rich)
    return Specs(colour, shape, size, cell, fill, x, y, side, tone, texture, wave, light, grain, rich, keys), good


def placed(
    tier: Tier, there: NDArray, colour: NDArray, shape: NDArray, side: NDArray, cells: NDArray, xs: NDArray, ys: NDArray
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """For each object the first of its candidate places (N,K,T) that respects the objects before it."""
    n, most = there.shape
    pick = np.zeros((n, most), np.int64)
    good = np.ones(n, bool)
    rows = np.arange(n)
    edges, inners = outlines()
    x, y = xs[:, :, 0].copy(), ys[:, :, 0].copy()
    hidden = np.zeros((n, most, inners.shape[1]), bool)
    for j in range(1, most):
        fits = np.ones((n, xs.shape[2]), bool)
        covers = {}
        for i in range(j):
            both = there[:, j]
            at = np.stack([x[:, i], y[:, i]], 1)[:, None, None]
            edge = edges[shape[:, j]] * side[:, j, None, None]
            gap = distances(
                shape[:, i],
                edge[:, None] + np.stack([xs[:, j], ys[:, j]], -1)[:, :, None],
                np.repeat(x[:, i, None], TRIES, 1),
                np.repeat(y[:, i, None], TRIES, 1),
                side[:, i],
            )
            back = distances(
                shape[:, j],
                np.repeat((edges[shape[:, i]] * side[:, i, None, None])[:, None] + at, TRIES, 1),
                xs[:, j],
                ys[:, j],
                side[:, j],
            )
            apart = np.minimum(gap.min(-1), back.min(-1)) > GAP[tier.touching]
            if tier.touching:
                inner = (inners[shape[:, i]] * side[:, i, None, None])[:, None] + at
                cover = distances(shape[:, j], np.repeat(inner, TRIES, 1), xs[:, j], ys[:, j], side[:, j]) < 0
                covers[i] = cover
                share = (cover | hidden[:, i, None]).mean(-1)
                far = (hue_gap()[colour[:, i], colour[:, j]] >= 40)[:, None]
                apart |= far & (share <= 0.25)
            fits &= apart | ~both[:, None]
        pick[:, j] = fits.argmax(1)
        good &= fits.any(1)
        x[:, j], y[:, j] = xs[rows, j, pick[:, j]], ys[rows, j, pick[:, j]]
        for i, cover in covers.items():
            hidden[:, i] |= cover[rows, pick[:, j]] & there[:, j, None]
    cell = np.take_along_axis(cells, pick[..., None], 2)[..., 0]
    return cell, x, y, good


def _admitted(rules: Rules, count: NDArray, there: NDArray, colour: NDArray, shape: NDArray, x: NDArray, y: NDArray) -> NDArray:
    """Whether scenes keep the rules of a split, (N,) bool."""
    good = np.ones(len(count), bool)
    pair = np.where(there, colour * 6 + shape, -1)
    equal = (pair[:, :, None] == pair[:, None, :]) & there[:, :, None]
    if rules.many is not None:
        many = (equal.sum(2) >= 3) & np.isin(shape, (1, 3, 5)) & there
        good &= many.any(1) == rules.many
    if rules.relation is not None and pair.shape[1] > 1:
        relation = np.where(count == 2, relation_of(x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]), -1)
        withheld = (relation >= 0) & withheld_relations()[relation // 2, shape[:, 0], shape[:, 1]]
        good &= withheld == rules.relation
    first = ~(equal & (np.arange(pair.shape[1])[None, None, :] < np.arange(pair.shape[1])[None, :, None])).any(2) & there
    return good & (first.sum(1) >= rules.phrases)


def draw_specs(
    tier: str, split: str, seed: int, index: NDArray[np.int64], attempt: NDArray[np.int64] | None = None, only: Pairs = ()
) -> Specs:
    """Scene `index` of a corpus: a pure function of (tier, its version, split, seed, index, attempt).

    A scene that breaks a rule is drawn again under the next inner number, so every index gives a scene; `attempt` (N,) asks for another
    scene at the same index, for certification.

    Args:
        only: the colour-shape pairs that objects have, in place of those of the split.

    Raises:
        ValueError: if the tier cannot hold what the split asks for.
    """
    kind, rules = TIERS[tier], SPLITS[split]
    needed = 2 if rules.relation else 3 if rules.many else rules.phrases
    if kind.most < needed:
        raise ValueError(f"tier {tier} has at most {kind.most} objects; split {split} needs {needed}: take another tier")
    index = np.asarray(index, np.int64)
    keys = addresses(index, "scene", VERSION, tier, split, seed)
    if only:
        rules = replace(rules, pairs=only)
        keys = hashed(keys ^ np.uint64(mix("only", *(number for pair in only for number in pair))))
    if attempt is not None:
        keys = np.where(attempt > 0, hashed(keys + attempt.astype(np.uint64) * STEP), keys)
    specs, good = _attempt(kind, rules, keys)
    left = np.flatnonzero(~good)
    again = 0
    while len(left):
        again += 1
        more, good = _attempt(kind, rules, hashed(keys[left] ^ np.uint64(mix("again", again))))
        for field in fields(specs):
            getattr(specs, field.name)[left[good]] = getattr(more, field.name)[good]
        left = left[~good]
    return specs
