"""Prompts by ability: what they say, and models that have some abilities and lack others."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.scenes.captions import Target, parse, say
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.spec import PAIR_DEV, PAIR_TEST, SEEN, SIDE, Specs
from ldm.metrics.abilities import Abilities, asked, otherwise
from ldm.metrics.bench import Bench
from ldm.metrics.evaluator import Evaluator

WITHHELD = set(PAIR_DEV + PAIR_TEST)
PLACES = {0: (3, 5), 1: (5, 3), 2: (1, 7), 3: (7, 1), -1: (0, 8, 2, 6)}  # cells of objects by relation


def scene(target: Target) -> Specs:
    """A scene in which all that is stated holds; colours are red and yellow, shapes diamonds where nothing is said."""
    objects, most = target.objects, 4
    values = {name: np.full((1, most), -1, np.int64) for name in ("colour", "shape", "size", "cell", "fill")}
    x, y, side = np.zeros((1, most)), np.zeros((1, most)), np.full((1, most), 0.1)
    for k, phrase in enumerate(objects):
        cell = phrase.cell if phrase.cell >= 0 else (4 if len(objects) == 1 else PLACES[target.relation][k])
        size = phrase.size if phrase.size >= 0 else 2 if len(objects) == 1 else 0
        said = {"colour": max(phrase.colour, 0), "shape": phrase.shape if phrase.shape >= 0 else 3, "size": size, "cell": cell, "fill": 0}
        for name, value in said.items():
            values[name][0, k] = value
        side[0, k] = SIDE[size]
        column, row = cell % 3, cell // 3
        if len(objects) > 1:
            x[0, k], y[0, k] = 0.2 + 0.3 * column, 0.2 + 0.3 * row
        else:
            x[0, k], y[0, k] = np.clip([(column + 0.5) / 3, (row + 0.5) / 3], 0.27, 0.73)
    plain: dict[str, Any] = {"texture": np.zeros(1, np.int64), "wave": np.zeros((1, 4)), "light": np.array([[0.0, 0.05]])}
    plain |= {"grain": np.zeros(1), "rich": np.zeros(1, bool), "key": np.zeros(1, np.uint64)}
    return Specs(**values, **plain, x=x, y=y, side=side, tone=np.array([max(target.tone, 0)]))


class Able:
    """Draws what prompts state, but for those in which a word stands that it does not know."""

    defaults: ClassVar[dict[str, Any]] = {"size": (64, 64)}

    def __init__(self, tier: Any, many: int, deaf: str = "") -> None:
        self.known = {text: target for group in asked(tier, many).values() for text, target in zip(group.text, group.targets, strict=True)}
        self.deaf = deaf

    def settings(self, wanted: Any) -> SimpleNamespace:
        return SimpleNamespace(guidance=wanted.guidance or 3.0, steps=20, sampler="ddim", spacing="trailing")

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], settings: Any, *, size: Any = None, on_step: Any = None) -> Tensor:
        on_step(1, 1)
        side = (size or self.defaults["size"])[0]
        heard = [scene(parse("a red ring") if self.deaf and self.deaf in text else self.known[text]) for text in prompts]
        return torch.cat([torch.from_numpy(to_bytes(render(one, side))) for one in heard])


def measured(metric: Abilities, model: Able) -> dict[str, Any]:
    return metric.run(Bench(model, None, 64, 0, torch.device("cpu"), None, lambda *line: None))


def test_each_ability_is_asked_of_the_tiers_that_have_it():
    single = ["object", "colour", "position", "background", "unseen_pair", "partial", "wording"]
    two = ["two_objects", "binding", "relation"]
    assert list(asked("one", 2)) == list(asked("T0", 2)) == single
    assert set(asked("T1", 2)) == {*two, *single[3:]}
    assert set(asked("T2", 2)) == {*single, *two, "counting"}


@pytest.mark.parametrize("tier", ["one", "T1", "T2"])
def test_prompts_say_what_they_are_graded_by(tier):
    for name, group in asked(tier, 9, seed=3).items():
        assert len(group.text) == len(group.targets) == 9
        if name != "wording":
            assert [parse(text) for text in group.text] == list(group.targets), name
        pairs = {(p.colour, p.shape) for target in group.targets for p in target.phrases if p.colour >= 0 and p.shape >= 0}
        assert pairs <= (WITHHELD if name == "unseen_pair" else set(SEEN)), name
    assert (
        asked(tier, 4, seed=1)["binding" if tier == "T1" else "colour"] != asked(tier, 4, seed=2)["binding" if tier == "T1" else "colour"]
    )


def test_partial_prompts_leave_facts_open():
    whole, part = asked("one", 60)["background"].targets, asked("one", 60)["partial"].targets
    known = [(t.tone >= 0) + sum(v >= 0 for v in (t.phrases[0].colour, t.phrases[0].shape, t.phrases[0].cell)) for t in part]
    assert 2 < np.mean(known) < 3.5 and len(set(known)) > 2
    assert all(w.tone in (p.tone, w.tone) and (p.tone in (-1, w.tone)) for w, p in zip(whole, part, strict=True))


def test_other_wordings_are_none_of_the_grammar_but_synonyms():
    group = asked("one", 9)["wording"]
    told = otherwise(group.targets)
    assert told == list(group.text) and all(text != say(target) for text, target in zip(told[:6], group.targets, strict=False))
    for text in (told[1], told[2]):
        with pytest.raises(ValueError, match="not a scene's caption"):
            parse(text)
    assert told[1].startswith("on a ") and " that is " in told[2]


@pytest.mark.parametrize("tier", ["one", "T2"])
def test_a_model_that_has_every_ability_scores_one(tier):
    if tier == "one":
        found = measured(Abilities(tier=tier, prompts=9), Able(tier, 9))
        assert found["mean"] == 1 and set(found["by_ability"]) == set(asked(tier, 1))
    else:
        found = measured(Abilities(tier=tier, prompts=6), Able(tier, 6))
        for name in ("object", "colour", "two_objects", "binding", "relation", "counting", "background"):
            assert found[name] == 1, name


def test_what_a_model_lacks_shows_in_that_ability_alone():
    found = measured(Abilities(tier="one", prompts=9), Able("one", 9, deaf=" that is "))
    assert found["wording"] < 1 and found["object"] == found["colour"] == found["position"] == 1
    assert found["by_ability"]["wording"]["n"] == 9 and found["protocol"]["prompts"] == 9


def test_it_is_a_metric_of_stages():
    made = build({"kind": "abilities", "tier": "one"}, Evaluator, "test")  # type: ignore[arg-type]
    assert isinstance(made, Abilities) and {"mean", "partial", "wording"} <= set(made.names(True))
    with pytest.raises(UserError, match="tier"):
        build({"kind": "abilities", "tier": "T9"}, Evaluator, "test")  # type: ignore[arg-type]
