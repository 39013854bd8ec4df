"""Captions of scenes: true, complete, readable back, with facts left out at the rate that is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from ldm.data.scenes.captions import Phrase, Target, parse, reword, say, stated
from ldm.data.scenes.spec import CELLS, COLOURS, SHAPES, SIZES, TEXTURES, TIERS, TONES, addresses, draw_specs

RED, CIRCLE = COLOURS.index("red"), SHAPES.index("circle")


def phrase(text: str, count: int = 1, size: str = "", cell: str = "", fill: int = -1) -> Phrase:
    colour, shape = text.split()
    size_cell = SIZES.index(size) if size else -1, CELLS.index(cell) if cell else -1
    return Phrase(count, COLOURS.index(colour), SHAPES.index(shape), *size_cell, fill)


@pytest.mark.parametrize(
    ("target", "caption"),
    [
        (Target((phrase("red circle"),)), "a red circle"),
        (Target((phrase("orange cross", size="small", cell="center"),)), "a small orange cross in the center"),
        (Target((phrase("orange cross", 2),)), "two orange crosses"),
        (Target((phrase("orange ring"),), tone=TONES.index("gray")), "an orange ring on a gray background"),
        (Target((Phrase(shape=2),), tone=0, texture=TEXTURES.index("striped")), "a triangle on a striped black background"),
        (Target((Phrase(colour=0, size=2),)), "a large red shape"),
        (Target((phrase("red circle"), phrase("blue ring")), relation=0), "a red circle left of a blue ring"),
        (Target((phrase("red circle", cell="top"), phrase("blue ring")), relation=1), "a red circle at the top, right of a blue ring"),
        (Target((phrase("red circle", cell="top right"), phrase("blue ring"))), "a red circle at the top right and a blue ring"),
        (
            Target((phrase("red circle"), phrase("blue ring", 3, fill=1), phrase("pink square"))),
            "a red circle, three striped blue rings and a pink square",
        ),
    ],
)
def test_what_is_stated_is_said_in_plain_words_and_read_back(target, caption):
    assert say(target) == caption and parse(caption) == target


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_every_caption_is_read_back_whole_with_synonyms_too(tier, drop):
    keys = addresses(np.arange(400), "test")
    targets = stated(draw_specs(tier, "train", 0, np.arange(400)), tier, keys, drop)
    said = [say(target) for target in targets]
    assert [parse(caption) for caption in said] == targets
    assert [parse(reword(caption, key)) for caption, key in zip(said, keys.tolist(), strict=True)] == targets
    assert reword(said[0], 0) == said[0] and reword("a large circle", 2**64 - 1) == "a big disc"
    assert len({word for caption in said for word in caption.replace(",", "").split()}) <= 55


@pytest.mark.parametrize("tier", TIERS)
def test_nothing_false_is_stated_and_all_objects_are_mentioned(tier):
    specs = draw_specs(tier, "train", 1, np.arange(300))
    full, some = stated(specs, tier), stated(specs, tier, addresses(np.arange(300), "some"), 0.5)
    for i, (all_facts, fewer) in enumerate(zip(full, some, strict=True)):
        assert len(all_facts.objects) == len(fewer.objects) == specs.count[i]
        assert all_facts.tone == specs.tone[i] and fewer.tone in (-1, specs.tone[i]) and fewer.relation in (-1, all_facts.relation)
        columns = (getattr(specs, name)[i, : specs.count[i]].tolist() for name in ("colour", "shape", "size", "cell", "fill"))
        truth = list(zip(*columns, strict=True))
        for whole, part in zip(all_facts.phrases, fewer.phrases, strict=True):
            members = [facts for facts in truth if facts[:2] == (whole.colour, whole.shape)]
            assert len(members) == whole.count
            for name, k in (("colour", 0), ("shape", 1), ("size", 2), ("cell", 3), ("fill", 4)):
                assert getattr(part, name) in (-1, getattr(whole, name))
                assert getattr(whole, name) in (-1, *(facts[k] for facts in members))
            assert (whole.cell >= 0) == (whole.count == 1) and part.count == whole.count
            assert part.colour >= 0 or part.shape >= 0
            if tier != "one":
                assert (whole.size >= 0) == (len({facts[2] for facts in members}) == 1)


def test_relations_are_true_of_the_centres():
    specs = draw_specs("T1", "train", 0, np.arange(300))
    seen = set()
    for i, target in enumerate(stated(specs, "T1")):
        seen.add(target.relation)
        dx, dy = specs.x[i, 1] - specs.x[i, 0], specs.y[i, 1] - specs.y[i, 0]
        if target.relation >= 0:
            assert (dx > 0.15, dx < -0.15, dy > 0.15, dy < -0.15)[target.relation]
    assert seen == {-1, 0, 1, 2, 3}


def test_facts_are_left_out_at_their_rate_independently():
    n = 4000
    specs = draw_specs("T0", "train", 0, np.arange(n))
    targets = stated(specs, "T0", addresses(np.arange(n), "rate"), 0.4)
    missing = np.array([[getattr(t.phrases[0], name) < 0 for name in ("colour", "shape", "size", "cell")] + [t.tone < 0] for t in targets])
    assert np.allclose(missing.mean(0), [0.09, 0.1, 0.4, 0.4, 0.4], atol=0.025)
    assert np.abs(np.corrcoef(missing[:, 2:].T) - np.eye(3)).max() < 0.06


def test_what_is_alike_in_a_whole_tier_is_not_said():
    for tier in ("one", "T0"):
        targets = stated(draw_specs(tier, "train", 0, np.arange(30)), tier)
        assert all(t.texture < 0 and t.phrases[0].fill < 0 and (t.phrases[0].size < 0) == (tier == "one") for t in targets)
    assert any(p.fill >= 0 for t in stated(draw_specs("T3", "train", 0, np.arange(30)), "T3") for p in t.phrases)


@pytest.mark.parametrize(
    "caption", ["", "a photograph of a dog", "a red circle left", "a red circle and", "red circle", "a red circle on a pink background"]
)
def test_other_sentences_are_refused(caption):
    with pytest.raises(ValueError, match="not a scene's caption"):
        parse(caption)
