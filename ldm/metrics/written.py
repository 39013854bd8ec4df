"""What is written, measured: facts of captions, bits of captions, marks of scenes, and pictures that were completed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ldm.config.schema import Count, Positive, config
from ldm.data.scenes.captions import Target, parse
from ldm.data.scenes.source import Scenes
from ldm.metrics import translation
from ldm.metrics.adherence import ATTRIBUTES, matched
from ldm.metrics.bench import Bench, Values


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


@config
class Captions:
    """Whether written captions say what held-out pictures show."""

    kind: Literal["captions"] = "captions"
    images: Positive = 200  # pictures; of scenes as many again with held-out colour-shape pairs
    seed: Count = 0  # of what is drawn at random, at a temperature above 0

    asks = "caption"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        own = ("f1", "precision", "recall", "exact")
        return ("words_f1", *own, *(f"held_out_{name}" for name in own), "shuffled_f1") if scenes else ("words_f1",)

    def run(self, bench: Bench) -> Values:
        """F1 of words against the first caption; of scenes also of facts, read by the grammar, and what shuffled captions would have."""
        found: Values = {}
        other = translation.held_out(bench.data, ())
        for name, data in (("", bench.data), ("held_out_", other)):
            if data is None and name:
                continue
            index = list(range(min(self.images, len(data)))) if data is not None else []
            real = replace(bench, data=data).real(self.images)
            said = bench.model.captions(real.image, [self.seed + i for i in index])
            bench.progress(len(index), len(index), "captions")
            if not name:
                found["words_f1"] = words_agree(said, [rows[0] for rows in data.all_captions(index)] if data is not None else [])
                bench.show("captions", real.image[:32], 8, said[:32])
            if isinstance(data, Scenes):
                targets = data.targets(index)
                found |= {f"{name}{key}": value for key, value in facts_agree(said, targets).items()}
                if not name:
                    found["shuffled_f1"] = facts_agree(said[1:] + said[:1], targets)["f1"]
        return {**found, "protocol": {"images": self.images, "temperature": bench.model.settings().temperature, "seed": self.seed}}
