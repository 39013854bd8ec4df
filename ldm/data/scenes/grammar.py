"""Distribution of the captions of scenes with one object, in closed form, and its entropy: the least that any model can need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

from ldm.data.scenes.captions import RARELY, Phrase, Target, say
from ldm.data.scenes.source import ScenesSource
from ldm.data.scenes.spec import CELLS, SPLITS, TIERS, TONES, pairs_of

Shares = Mapping[tuple[int, ...], float]  # probability of facts, -1 where one is left out


def captions_of(source: ScenesSource) -> dict[str, float] | None:
    """The probability of each caption of a source's scenes; None where it is not known in closed form.

    It is known of one object, whose facts are drawn apart: a wording states all of them, or leaves each out by itself. Certifying scenes,
    which the checker misreads now and then, changes it by little.
    """
    tier = TIERS[source.tier]
    if tier.most > 1 or source.called or source.synonyms or source.web:
        return None
    wordings = source.captions if source.drop else 1
    whole = 1 / wordings
    pairs = pairs_of(source.pairs) or SPLITS["train"].pairs
    tones = tuple(range(len(TONES))) if source.time == "any" else (TONES.index("white" if source.time == "day" else "black"),)
    sizes = tier.sizes if len(tier.sizes) > 1 else (-1,)
    named: Shares = {(colour, shape): pairs.count((colour, shape)) / len(pairs) for colour, shape in pairs}
    facts: list[Shares] = [{(k,): 1 / len(values) for k in values} for values in (sizes, tuple(range(len(CELLS))), tones)]
    found: dict[str, float] = {}
    every = [(whole, [named, *facts])]
    if wordings > 1:
        every.append((1 - whole, [_pairs(named, source.drop * RARELY), *(_left_out(one, source.drop) for one in facts)]))
    for weight, chances in every:
        for row in product(*(one.items() for one in chances)):
            (colour, shape), (size,), (cell,), (tone,) = (key for key, _ in row)
            caption = say(Target((Phrase(1, colour, shape, size, cell),), -1, tone))
            found[caption] = found.get(caption, 0.0) + weight * math.prod(share for _, share in row)
    return found


def _pairs(shares: Shares, drop: float) -> dict[tuple[int, ...], float]:
    """Colour and shape, of which one at most is left out: the shape first."""
    found: dict[tuple[int, ...], float] = {}
    for (colour, shape), share in shares.items():
        for key, odds in (((colour, shape), (1 - drop) ** 2), ((colour, -1), drop), ((-1, shape), drop * (1 - drop))):
            found[key] = found.get(key, 0.0) + share * odds
    return found


def _left_out(shares: Shares, drop: float) -> dict[tuple[int, ...], float]:
    """A fact that is left out with a chance; one that is never stated stays so."""
    if list(shares) == [(-1,)]:
        return dict(shares)
    return {**{key: share * (1 - drop) for key, share in shares.items()}, (-1,): drop}


def entropy(source: ScenesSource) -> float | None:
    """Bits of a caption, at the least and on average; None where they are not known in closed form."""
    found = captions_of(source)
    return None if found is None else -sum(share * math.log2(share) for share in found.values() if share)
