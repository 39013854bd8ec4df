"""What is written, measured: facts of captions, bits of captions, marks of scenes, and pictures that were completed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldm.data.scenes.captions import Target, parse
from ldm.metrics.adherence import ATTRIBUTES, matched


def facts(found: Target | None, wanted: Target) -> tuple[int, int, int]:
    """Facts that two captions agree on, that the first states, and that the second states.

    Objects are matched one to one for the most agreeing facts. A fact is an attribute of an object, the relation of two, the background's
    tone or its texture. None states nothing.
    """
    states = (found, wanted)
    objects = [np.array([[getattr(phrase, name) for name in ATTRIBUTES] for phrase in (one.objects if one else ())]) for one in states]
    grounds = [np.array([one.relation, one.tone, one.texture] if one else [-1] * 3) for one in states]
    said, true = (int((a >= 0).sum() + (b >= 0).sum()) for a, b in zip(objects, grounds, strict=True))
    if not len(objects[0]):
        return 0, said, true
    agree = (objects[1][:, None] == objects[0][None]) & (objects[1] >= 0)[:, None]  # (T,D,5)
    mine, theirs = matched(agree)
    both = int(agree[mine, theirs].sum()) + int(((grounds[0] == grounds[1]) & (grounds[1] >= 0)).sum())
    return both, said, true


def read(caption: str) -> Target | None:
    """What a caption states; None where it is no caption of a scene."""
    try:
        return parse(caption)
    except ValueError:
        return None


def facts_agree(captions: Sequence[str], targets: Sequence[Target]) -> dict[str, float]:
    """How well captions state what they should: precision, recall and F1 of all their facts, and how many state all and no more."""
    rows = [facts(read(caption), target) for caption, target in zip(captions, targets, strict=True)]
    both, said, true = (sum(row[k] for row in rows) for k in range(3))
    exact = sum(row[0] == row[1] == row[2] for row in rows) / len(rows)
    found = {"f1": 2 * both / max(said + true, 1), "precision": both / max(said, 1), "recall": both / max(true, 1), "exact": exact}
    return {name: round(value, 4) for name, value in found.items()}


def words_agree(captions: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of captions' words, whatever their order, against other captions of the same pictures, all together."""
    both = said = true = 0
    for a, b in zip((one.split() for one in captions), (one.split() for one in wanted), strict=True):
        left = list(b)
        for word in a:
            if word in left:
                left.remove(word)
        both, said, true = both + len(b) - len(left), said + len(a), true + len(b)
    return round(2 * both / max(said + true, 1), 4)
