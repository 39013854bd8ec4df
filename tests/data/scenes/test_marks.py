"""Marks of scenes and the grammar's distribution: there and back, drawn as told, and exactly as likely as captions are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ldm.data.scenes.captions import parse
from ldm.data.scenes.grammar import captions_of, entropy
from ldm.data.scenes.marks import LENGTH, MARKS, allowed, from_marks, to_marks
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import ScenesSource, prompts
from ldm.data.scenes.spec import TIERS
from ldm.metrics import adherence, written


@pytest.mark.parametrize("tier", ["one", "T1", "T2"])
def test_marks_of_a_scene_give_its_like(tier):
    asked = prompts(tier, 40)
    found = to_marks(asked.specs)
    assert found.shape == (40, LENGTH) and found.max() < MARKS
    assert all((allowed(place)[found[:, place]] | (found[:, place - 1] == MARKS - 1)).all() for place in range(LENGTH))
    made = from_marks(found, np.arange(40))
    assert (to_marks(made) == found).all(1).mean() > 0.95  # a relation that none should be may not be avoidable
    scores = adherence.score(to_bytes(render(made, TIERS[tier].pixels)), asked.targets)
    assert scores["strict"].mean() > 0.95 and np.nanmin(scores["bg"]) == 1
    alone = from_marks(found[7:8], np.array([7]))
    assert (alone.x == made.x[7]).all() and (from_marks(found[7:8], np.array([8])).x != made.x[7]).any()


@pytest.mark.parametrize(
    "fields",
    [{"tier": "T0", "captions": 1}, {"tier": "T0", "captions": 4}, {"tier": "one", "captions": 3, "drop": 0.5, "pairs": ("red ring",)}],
)
def test_the_grammar_says_how_likely_captions_are(fields):
    """The chances add up to 1, and real captions surprise by the entropy, within five standard errors."""
    source = ScenesSource(images=3000, **fields)
    chances = captions_of(source)
    assert chances is not None and sum(chances.values()) == pytest.approx(1)
    captions = source.build("train").captions(range(3000), range(3000), 0)
    surprise = np.array([-math.log2(chances[caption]) for caption in captions])
    assert abs(surprise.mean() - entropy(source)) <= 5 * surprise.std() / math.sqrt(3000) + 1e-9


def test_closed_forms_of_the_entropy():
    assert entropy(ScenesSource(tier="T0", captions=1)) == pytest.approx(math.log2(36 * 3 * 9 * 3))
    assert entropy(ScenesSource(tier="one", captions=1, time="day")) == pytest.approx(math.log2(36 * 9))
    assert entropy(ScenesSource(tier="T1")) is None and entropy(ScenesSource(tier="T0", synonyms=True)) is None


def test_facts_of_captions_are_counted():
    wanted = parse("a small red ring at the top on a white background")  # five facts: size, colour, shape, place, tone
    assert written.facts(wanted, wanted) == (5, 5, 5)
    assert written.facts(parse("a large red ring on a white background"), wanted) == (3, 4, 5)
    two = parse("a red ring, left of a blue square on a white background")
    assert written.facts(parse("a blue square right of a red ring"), two) == (4, 5, 6)  # the relation is told the other way round
    assert written.facts(None, wanted) == (0, 0, 5)
    found = written.facts_agree(["a small red ring at the top on a white background", "nonsense"], [wanted, wanted])
    assert found == {"f1": 0.6667, "precision": 1.0, "recall": 0.5, "exact": 0.5}
    assert written.words_agree(["a red ring"], ["a blue ring"]) == 0.6667
