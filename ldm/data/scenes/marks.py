"""Marks of scenes: a scene as a short sequence of numbers, background first and then each object, and back to a scene that is drawn."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.geometry import HALF_HEIGHT, HALF_WIDTH, relation_of
from ldm.data.scenes.spec import (
    CELLS,
    COLOURS,
    FILLS,
    PERIOD,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    TIERS,
    TONES,
    TRIES,
    Specs,
    UniformDraws,
    along,
    hashed,
    placed,
)
from ldm.diffusion.rng import mix

MOST = 4  # objects
GROUND = (len(TONES), len(TEXTURES), len(RELATIONS) + 1)  # choices of the background and of the first two objects' relation, the last: none
OBJECT = (len(SHAPES), len(COLOURS), len(SIZES), len(CELLS), len(FILLS))  # choices of each object
_STARTS = tuple(accumulate((*GROUND, *OBJECT), initial=0))
END = _STARTS[-1]  # stands behind the last object
MARKS = END + 1
LENGTH = len(GROUND) + MOST * len(OBJECT) + 1
ATTEMPTS = 32  # at places that keep the relation


def to_marks(specs: Specs) -> NDArray[np.int64]:
    """The marks of scenes, (N,LENGTH); END fills what is left."""
    n, most = specs.shape.shape
    found = np.full((n, LENGTH), END)
    relation = np.full(n, -1)
    if most > 1:
        plain = relation_of(specs.x[:, 1] - specs.x[:, 0], specs.y[:, 1] - specs.y[:, 0])
        relation = np.where(specs.count == 2, plain, -1)
    ground = (specs.tone, specs.texture, np.where(relation < 0, len(RELATIONS), relation))
    for k, values in enumerate(ground):
        found[:, k] = _STARTS[k] + values
    for j in range(most):
        there = specs.shape[:, j] >= 0
        for k, name in enumerate(("shape", "colour", "size", "cell", "fill")):
            at = len(GROUND) + j * len(OBJECT) + k
            found[there, at] = _STARTS[len(GROUND) + k] + getattr(specs, name)[there, j]
    return found


def allowed(place: int) -> NDArray[np.bool_]:
    """Which marks may stand at a place, (MARKS,)."""
    found = np.zeros(MARKS, bool)
    behind = place - len(GROUND)
    kind = place if behind < 0 else len(GROUND) + behind % len(OBJECT)
    if place < LENGTH - 1:
        found[_STARTS[kind] : _STARTS[kind + 1]] = True
    found[END] = behind > 0 and behind % len(OBJECT) == 0
    return found


def from_marks(marks: NDArray[np.int64], seeds: NDArray[np.int64]) -> Specs:
    """Scenes that marks (N,LENGTH), each allowed at its place, tell of; where objects lie in their cells is drawn by seed.

    Places are tried until objects lie apart and stand in the relation that is told; where none does, the last ones are taken.
    """
    n = len(marks)
    ended = np.where((marks == END).any(1), (marks == END).argmax(1), LENGTH - 1)
    count = (ended - len(GROUND)) // len(OBJECT)
    there = np.arange(MOST) < count[:, None]
    tone, texture, relation = (marks[:, k] - _STARTS[k] for k in range(len(GROUND)))
    objects = marks[:, len(GROUND) : -1].reshape(n, MOST, len(OBJECT))
    shape, colour, size, cell, fill = (np.where(there, objects[:, :, k] - _STARTS[len(GROUND) + k], 0) for k in range(len(OBJECT)))
    side = SIDE[size]
    keys = hashed(np.asarray(seeds, np.int64).astype(np.uint64) ^ np.uint64(mix("marks")))
    x, y = np.zeros((n, MOST)), np.zeros((n, MOST))
    left = np.arange(n)
    for attempt in range(ATTEMPTS):
        draw = UniformDraws(hashed(keys[left] ^ np.uint64(mix("place", attempt))))
        cells = np.repeat(cell[left][..., None], TRIES, 2)
        half = np.stack([HALF_WIDTH[shape[left]], HALF_HEIGHT[shape[left]]]) * side[left]
        xs, ys = along(cells % 3, half[0][..., None], draw(MOST, TRIES)), along(cells // 3, half[1][..., None], draw(MOST, TRIES))
        tier = TIERS["T1" if attempt < ATTEMPTS // 2 else "T2"]  # apart; then, where that cannot be, touching
        _, x[left], y[left], good = placed(tier, there[left], colour[left], shape[left], side[left], cells, xs, ys)
        stands = relation_of(x[left, 1] - x[left, 0], y[left, 1] - y[left, 0])
        good &= (count[left] != 2) | (stands == np.where(relation[left] == len(RELATIONS), -1, relation[left]))
        left = left[~good]
        if not len(left):
            break
    draw = UniformDraws(keys)
    wave = draw(4) * (np.pi, PERIOD[1] - PERIOD[0], 1, 1) + (0, PERIOD[0], 0, 0)
    light = np.tile([1.25 * np.pi, 0.10], (n, 1))
    shape, colour, size, cell, fill = (np.where(there, values, -1) for values in (shape, colour, size, cell, fill))
    return Specs(colour, shape, size, cell, fill, x, y, side, tone, texture, wave, light, np.zeros(n), np.asarray((fill > 0).any(1)), keys)
