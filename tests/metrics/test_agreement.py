"""Agreement with views, over subsets of them and over wobble: true pictures agree, others do not, and what is lost is named."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm.config.errors import UserError
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.data.scenes.views import KINDS
from ldm.families.draws import DIRECT
from ldm.metrics.agreement import AGREEMENTS, WORDS, Shown, agreement
from ldm.metrics.bench import Bench
from ldm.metrics.subsets import Subsets, least
from ldm.metrics.wobble import Wobble

SIDE, MANY = 64, 6


def drawn(roll: int = 0, tier: Any = "one") -> torch.Tensor:
    """The true pictures of the first scenes, each at the place of another."""
    return torch.from_numpy(np.roll(to_bytes(render(prompts(tier, MANY).specs, SIDE)), roll, axis=0))


def bench(views: tuple[str, ...], draw: Callable[[Any, dict[str, Any]], torch.Tensor]) -> Bench:
    """Of a model that reads views and draws by (captions, what it is told)."""

    def tell(given: Any, strength: Any, size: Any) -> tuple[Any, ...]:
        return (given,)

    def sample(captions: Any, seeds: Any, wanted: Any, edits: Any = (), on_step: Any = None) -> torch.Tensor:
        return draw(captions, edits[0] if edits else {})

    told = {view: KINDS[view.partition(":")[0]] for view in views}
    model = SimpleNamespace(told=told, defaults={"size": (SIDE, SIDE)}, settings=lambda wanted: DIRECT, tell=tell, sample=sample)
    return Bench(model, None, SIDE, 0, torch.device("cpu"), None, lambda done, total, what: None)


@pytest.mark.parametrize("tier", ["one", "T1"])
@pytest.mark.parametrize("name", list(AGREEMENTS))
def test_true_pictures_agree_and_those_of_other_scenes_do_not(tier: Any, name: str) -> None:
    asked = prompts(tier, MANY)
    right, wrong = (agreement(name, Shown.of(asked.specs, asked.targets, drawn(roll, tier).numpy())).mean() for roll in (0, 1))
    assert right > 0.85 and wrong < 0.6, (right, wrong)


def test_every_subset_is_drawn_and_what_a_further_view_costs_is_named() -> None:
    asked, calls = prompts("one", MANY), []

    def draw(captions: Any, given: dict[str, Any]) -> torch.Tensor:
        worded = tuple(captions) == asked.text
        assert worded or set(captions) == {""}
        calls.append((worded, *given))
        return drawn(1 if worded and "style" in given else 0)  # style makes the words be forgotten

    found = Subsets(tier="one", prompts=MANY).run(bench(("labels", "sketch", "style"), draw))
    assert len(calls) == len(set(calls)) == 15 == len(found["subsets"])
    assert found["subsets"]["words"] == {WORDS: 1.0} and found["subsets"]["words, style"][WORDS] < 0.5
    worst = found["worst"]
    assert worst["further"] in ("style", "words") and found["gain"] == worst["mean"] <= -0.5
    assert worst["of"] in worst["told"].split(", ") and worst["further"] not in worst["told"] and worst["n"] == MANY


def test_the_least_change_is_that_of_means_over_scenes() -> None:
    one, two = ("a",), ("a", "b")
    found = {
        one: {"a": np.array([0.5, 0.7])},
        ("b",): {"b": np.array([0.2, 0.2])},
        two: {"a": np.array([0.9, 0.2]), "b": np.array([0.5, 0.5])},
    }
    assert least(found) == {"told": "a", "further": "b", "of": "a", "mean": -0.05, "low": -0.5, "high": 0.4, "n": 2}


def test_subsets_of_what_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UserError, match="subsets: grey: what agrees with it cannot be read; name views among labels, edges"):
        Subsets(tier="one", views=("grey",))
    with pytest.raises(UserError, match="subsets: marks: what agrees"):
        Subsets(tier="one").run(bench(("labels", "marks"), lambda captions, given: drawn()))
    with pytest.raises(UserError, match="subsets: depth is no view that this model reads; it reads labels"):
        Subsets(tier="one", views=("depth",)).run(bench(("labels",), lambda captions, given: drawn()))
    with pytest.raises(UserError, match="subsets: this model reads no views"):
        Subsets(tier="one").run(bench((), lambda captions, given: drawn()))


def test_a_model_that_copies_the_lines_follows_their_wobble_and_one_that_reads_the_words_does_not() -> None:
    def copied(captions: Any, given: dict[str, Any]) -> torch.Tensor:
        (lines,) = given.values()
        assert set(given) == {"edges"}
        image = drawn()
        for k, own in enumerate(lines[:, 0] > 0):
            rows, columns = torch.nonzero(own, as_tuple=True)  # a red box about all that is drawn
            image[k] = 230
            image[k, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = torch.tensor([224, 31, 36], dtype=torch.uint8)
        return image

    metric = Wobble(tier="one", prompts=MANY, by=(0, 8), caption="empty")
    found = metric.run(bench(("edges",), copied))
    assert found["own"]["outline"] >= found["0"]["outline"] > found["8"]["outline"] + 0.05
    steady = metric.run(bench(("edges",), lambda captions, given: drawn()))
    assert steady["own"] == steady["0"] == steady["8"] and steady["8"]["outline"] > 0.9 and steady["8"]["strict"] == 1
    assert steady["protocol"]["view"] == "edges"
    assert {f"{w}.{name}" for w in ("own", "0", "8") for name in steady["8"]} <= set(metric.names(True))


def test_wobble_is_of_one_view_of_lines() -> None:
    for views, reads in (((), "no views"), (("labels",), "labels"), (("edges", "sketch"), "edges, sketch")):
        with pytest.raises(UserError, match=rf"wobble: is of models that read one view of lines .*; this one reads {reads}; leave it out"):
            Wobble(tier="one").run(bench(views, lambda captions, given: drawn()))
    for by in ((), (1, 1), (17,)):
        with pytest.raises(UserError, match=r"by: got .*; write different numbers from 0 to 16"):
            Wobble(tier="one", by=by)
