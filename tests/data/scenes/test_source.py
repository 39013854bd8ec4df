"""Scenes: vocabulary and geometry, splits by rule, addressed drawing, rendering and the data set."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from ldm.data.scenes.captions import parse, say, stated
from ldm.data.scenes.checker import reads_back
from ldm.data.scenes.geometry import HALF_HEIGHT, HALF_WIDTH, distance, relation_of
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import Scenes, ScenesSource, certified, prompts
from ldm.data.scenes.spec import (
    CELLS,
    COLOURS,
    PAIR_DEV,
    PAIR_TEST,
    RELATIONS,
    SEEN,
    SHAPES,
    SIDE,
    SPLITS,
    TIERS,
    TierName,
    UniformDraws,
    addresses,
    draw_specs,
    hue_gap,
    pairs_of,
    withheld_relations,
)
from ldm.data.scenes.web import corrupt, draw_web

# SHA-256 of 16 training scenes in 8 bits
GOLDEN = {"one": "f84543157adf0f36", "T0": "22f8d5e78869a84e", "T1": "e1af096d8fd2e97a", "T2": "b7ce45146b91c028", "T3": "8c167df47c476da7"}


@pytest.mark.parametrize("shape", range(6))
def test_every_shape_has_the_area_and_the_box_it_promises(shape):
    n = 600
    place = ((np.arange(n) + 0.5) / n * 2 - 1) * 1.0
    inside = distance(shape, *np.meshgrid(place, place), np.ones((n, n))) < 0
    assert inside.mean() * 4 == pytest.approx(1, abs=0.01)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert place[rows[-1]] == pytest.approx(HALF_HEIGHT[shape], abs=0.01) and place[rows[0]] == pytest.approx(-HALF_HEIGHT[shape], abs=0.01)
    assert place[columns[-1]] == pytest.approx(HALF_WIDTH[shape], abs=0.01)


def test_held_out_pairs_are_two_diagonals_that_leave_enough_of_each_word():
    assert len(PAIR_DEV) == len(PAIR_TEST) == 6 and len(SEEN) == 36 and not set(PAIR_DEV + PAIR_TEST) & set(SEEN)
    for pairs in (PAIR_DEV, PAIR_TEST):
        assert len({c for c, _ in pairs}) == len({s for _, s in pairs}) == 6
    assert [sum(s == shape for _, s in SEEN) for shape in range(6)] == [6] * 6
    assert min(sum(c == colour for c, _ in SEEN) for colour in range(8)) >= 4


@pytest.mark.parametrize("tier", TIERS)
def test_scenes_keep_the_rules_of_their_tier(tier):
    kind, specs = TIERS[tier], draw_specs(tier, "train", 0, np.arange(600))
    there = specs.shape >= 0
    assert specs.count.min() == kind.least and specs.count.max() == kind.most
    assert set(zip(specs.colour[there].tolist(), specs.shape[there].tolist(), strict=True)) <= set(SEEN)
    off = specs.side / SIDE[specs.size]
    assert (np.abs(off[there] - 1) <= 0.06 + 1e-9).all()
    x, y = specs.x[there], specs.y[there]
    assert ((y * 3).astype(int) * 3 + (x * 3).astype(int) == specs.cell[there]).all()
    for place in (x, y):
        assert np.abs(place[:, None] - [0, 1 / 3, 2 / 3, 1]).min() >= 0.03 - 1e-9
    shares = np.bincount(specs.cell[there], minlength=9) / there.sum()
    assert shares.min() > 0.075 and shares.max() < 0.15
    assert set(np.unique(specs.size[there])) == set(kind.sizes)
    assert (specs.texture.max() > 0) == kind.textured and (specs.fill.max() > 0) == kind.rich


@pytest.mark.parametrize("tier", ["T1", "T2"])
def test_objects_hide_at_most_a_quarter_and_touch_only_under_unlike_hues(tier):
    specs = draw_specs(tier, "train", 0, np.arange(150))
    place = (np.arange(96) + 0.5) / 96
    column, row = np.meshgrid(place, place)
    for i in range(len(specs)):
        masks = [
            distance(int(specs.shape[i, k]), column - specs.x[i, k], row - specs.y[i, k], np.full_like(row, specs.side[i, k])) < 0
            for k in range(specs.count[i])
        ]
        for k, mask in enumerate(masks):
            over = np.logical_or.reduce([np.zeros_like(mask), *masks[k + 1 :]])
            assert (mask & over).sum() <= 0.31 * mask.sum()  # a quarter, as sampled at 96 points
            for j, upper in enumerate(masks[k + 1 :], k + 1):
                if (mask & upper).any():
                    assert TIERS[tier].touching and hue_gap()[specs.colour[i, k], specs.colour[i, j]] >= 40


def test_a_scene_depends_on_its_address_alone():
    all_of = draw_specs("T2", "train", 3, np.arange(40))
    some = draw_specs("T2", "train", 3, np.array([31, 7]))
    assert np.array_equal(some.x, all_of.x[[31, 7]]) and np.array_equal(some.key, all_of.key[[31, 7]])
    assert np.array_equal(render(some, 48), render(all_of, 48)[[31, 7]])
    for other in (("T2", "val", 3), ("T2", "train", 4), ("T3", "train", 3)):
        assert not np.array_equal(draw_specs(*other, np.arange(40)).x, all_of.x)
    again = draw_specs("T2", "train", 3, np.arange(40), np.arange(40) % 2)
    same = (again.key == all_of.key).tolist()
    assert same[::2] == [True] * 20 and same[1::2] == [False] * 20


def test_draws_are_uniform_and_differ_by_word_and_slot():
    u = UniformDraws(addresses(np.arange(4000), "a"))(3)
    assert u.min() >= 0 and u.max() < 1 and np.allclose(u.mean(0), 0.5, atol=0.02) and np.allclose(u.var(0), 1 / 12, atol=0.005)
    assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.06
    assert not np.array_equal(addresses(np.arange(9), "a"), addresses(np.arange(9), "b"))


def test_relations_need_a_plain_offset_and_withheld_ones_are_an_eighth_closed_under_mirrors():
    names = [RELATIONS[relation_of(np.array(dx), np.array(dy))] for dx, dy in ((0.3, 0.1), (-0.3, 0), (0, 0.3), (0.1, -0.3))]
    assert names == ["left of", "right of", "above", "below"]
    assert relation_of(np.array([0.14, 0.3, -0.2]), np.array([0.0, 0.25, 0.2])).tolist() == [-1, -1, -1]
    table = withheld_relations()
    assert np.array_equal(table, table.transpose(0, 2, 1)) and np.triu(table).sum() == 5


def test_splits_hold_what_their_rules_say_and_nothing_of_it_is_learned():
    def facts(tier, split):
        specs = draw_specs(tier, split, 0, np.arange(150))
        return specs, stated(specs, tier)

    for split, pairs in (("pair_dev", PAIR_DEV), ("pair_test", PAIR_TEST), ("held-out", PAIR_DEV + PAIR_TEST)):
        specs, _ = facts("T1", split)
        assert {(c, s) for c, s in zip(specs.colour.ravel().tolist(), specs.shape.ravel().tolist(), strict=True)} == set(pairs)

    def many(target):
        return any(p.count >= 3 and SHAPES[p.shape] in ("square", "diamond", "ring") for p in target.phrases)

    def withheld(target):
        if target.relation < 0:
            return False
        return bool(withheld_relations()[target.relation // 2, target.phrases[0].shape, target.phrases[1].shape])

    assert all(many(t) for t in facts("T2", "count_test")[1])
    assert all(withheld(t) for t in facts("T1", "rel_test")[1])
    assert all(len(t.phrases) == 4 for t in facts("T2", "long_test")[1])
    for tier in ("T1", "T2"):
        for split in ("train", "val"):
            _, targets = facts(tier, split)
            assert not any(many(t) or withheld(t) for t in targets)
    assert any(p.count >= 3 for t in facts("T2", "train")[1] for p in t.phrases)
    with pytest.raises(ValueError, match="take another tier"):
        draw_specs("T0", "rel_test", 0, np.arange(2))


def test_renders_are_the_same_bits_everywhere():
    for tier, golden in GOLDEN.items():
        pictures = to_bytes(render(draw_specs(tier, "train", 0, np.arange(16)), TIERS[tier].pixels))
        assert hashlib.sha256(pictures.tobytes()).hexdigest()[:16] == golden, f"{tier} changed: raise scene_spec.VERSION"
    assert set(GOLDEN) == set(TIERS)


def test_a_scene_is_the_same_at_every_resolution():
    specs = draw_specs("T3", "train", 0, np.arange(3))
    large, small = render(specs, 256), render(specs, 64)
    averaged = large.reshape(3, 3, 64, 4, 64, 4).mean((3, 5))
    assert np.abs(averaged - small).mean() < 0.02
    assert render(specs, 33).shape == (3, 3, 33, 33)


def test_grain_has_its_deviation_and_relit_scenes_differ_in_light_alone():
    specs = draw_specs("T0", "train", 0, np.arange(64))
    smooth = render(
        type(specs)(**{name: getattr(specs, name) if name != "grain" else specs.grain * 0 for name in specs.__dataclass_fields__}), 32
    )
    grain = (render(specs, 32) - smooth)[(smooth > 0.1) & (smooth < 0.9)]
    assert grain.std() == pytest.approx(0.015, rel=0.03) and abs(grain.mean()) < 1e-3
    again = specs.relit(5)
    assert np.array_equal(again.x, specs.x) and not np.array_equal(again.light, specs.light) and (again.key != specs.key).all()


def small(split="train", **fields) -> Scenes:
    return ScenesSource(**{"tier": "T1", "images": 50, "val": 8, **fields}).build(split)


def test_the_data_set_keeps_the_contract():
    data = small()
    index, position = [4, 49, 0, 4], [100, 7, 8, 9]
    batch = data.load(index, position, 40, 3, flip=False)
    assert batch.image.shape == (4, 3, 40, 40) and batch.image.dtype == torch.float32 and batch.image.abs().max() <= 1
    assert batch.size.tolist() == [[40, 40, 0, 0, 40, 40]] * 4 and batch.position.tolist() == position and len(data) == 50
    assert list(batch.caption) == data.captions(index, position, 3)
    for i in range(4):
        alone = data.load([index[i]], [position[i]], 40, 3, flip=False)
        assert torch.equal(alone.image[0], batch.image[i]) and alone.caption[0] == batch.caption[i]
        assert batch.caption[i] in data.all_captions([index[i]])[0]
    assert data.captions([], [], 0) == [] and data.all_captions([]) == [] and data.origin(3)
    assert len(set(data.captions([0] * 40, range(40), 0))) > 1
    assert json.loads(json.dumps(data.describe()))["fingerprint"] == data.fingerprint()


def test_flips_are_ignored_because_captions_name_sides():
    data = small()
    flipped, straight = (data.load(range(20), range(20), 32, 0, flip=flip) for flip in (True, False))
    assert torch.equal(flipped.image, straight.image) and flipped.caption == straight.caption


def test_the_fingerprint_depends_on_all_that_the_samples_depend_on():
    changes = [{}, {"tier": "T2"}, {"images": 51}, {"seed": 1}, {"captions": 2}, {"drop": 0.1}]
    changes += [{"synonyms": True}, {"web": True}, {"certified": True}]
    prints = [small(**change).fingerprint() for change in changes] + [small("val").fingerprint()]
    assert len(set(prints)) == len(prints) and small().fingerprint() == prints[0]


def test_wordings_state_true_facts_and_the_first_states_all():
    data = small(captions=6, drop=0.5)
    specs = data.specs(range(30))
    full = stated(specs, "T1")
    for target, wordings in zip(full, data.all_captions(range(30)), strict=True):
        assert len(wordings) == 6 and wordings[0] == say(target)
    assert data.targets(range(30)) == full
    assert all(len(row) == 1 for row in small(drop=0.0).all_captions(range(5)))
    plain, reworded = small(), small(synonyms=True)
    pairs = zip(plain.all_captions(range(50)), reworded.all_captions(range(50)), strict=True)
    both = [(a, b) for one, other in pairs for a, b in zip(one, other, strict=True)]
    assert any(a != b for a, b in both) and all(parse(a) == parse(b) for a, b in both)


def test_certified_scenes_read_back_and_others_are_drawn_again(monkeypatch):
    data = small("val", tier="T2", val=24)
    assert reads_back(data.specs(range(24)), to_bytes(render(data.specs(range(24)), 64))).all()
    calls = []

    def strict(specs, images):
        calls.append(len(specs))
        return np.arange(len(specs)) % 2 == len(calls) % 2

    monkeypatch.setattr("ldm.data.scenes.source.reads_back", strict)
    assert certified("T0", "val", 0, np.arange(4)).tolist() == [1, 0, 3, 0] and calls == [4, 2, 1, 1]
    assert small("train", certified=True).describe()["certified"] and not small("train").describe()["certified"]


def test_prompts_state_every_fact_and_keep_to_their_pairs():
    for pairs, allowed in (("seen", SEEN), ("held-out", PAIR_DEV + PAIR_TEST)):
        made = prompts("T1", 12, seed=1, pairs=pairs)
        assert len(made) == len(made.text) == len(made.targets) == len(made.specs) == 12
        for text, target in zip(made.text, made.targets, strict=True):
            assert parse(text) == target and target.tone >= 0 and target.texture >= 0
            for phrase in target.phrases:
                assert (phrase.colour, phrase.shape) in allowed and phrase.size >= 0 and phrase.cell >= 0
    assert prompts("T1", 12, seed=1).text != prompts("T1", 12, seed=2).text
    assert prompts("T1", 5, seed=1).text == prompts("T1", 12, seed=1).text[:5]
    one = prompts("one", 60)
    assert {phrase.size for target in one.targets for phrase in target.phrases} == {-1}, "the size is no fact where all are large"
    assert {CELLS[t.phrases[0].cell] for t in one.targets} == set(CELLS)
    assert {COLOURS[t.phrases[0].colour] for t in one.targets} == set(COLOURS)


def test_the_web_spoils_pictures_in_known_shares_and_its_columns_tell():
    web = draw_web(addresses(np.arange(8000), "web"), 32)
    shares = {name: count / 8000 for name, count in web.counts().items()}
    for name, share in {"watermarked": 0.15, "wrong_caption": 0.15, "enlarged": 0.25, "blurred": 0.10, "noisy": 0.10}.items():
        assert shares[name] == pytest.approx(share, abs=0.015)
    assert web.original_px[web.enlarged].max() <= 16 and web.original_px[~web.enlarged].min() >= 64
    assert web.aesthetic.min() >= 0 and web.aesthetic.max() <= 10
    spoilt = web.enlarged | (web.blur > 0) | (web.noise > 0)
    assert web.aesthetic[spoilt].mean() < web.aesthetic[~spoilt & ~web.watermarked].mean() - 1
    kept = web.p_watermark < 0.5
    assert web.watermarked[kept].mean() < 0.02 and (kept & ~web.watermarked).sum() > 0.95 * (~web.watermarked).sum()


def test_web_pictures_show_their_corruption_and_sound_ones_none():
    specs = draw_specs("one", "train", 0, np.arange(200))
    web = draw_web(addresses(np.arange(200), "web"), 32)
    before = render(specs, 32)
    after = corrupt(before, web)
    change = np.abs(after - before).mean((1, 2, 3))
    spoilt = web.watermarked | web.enlarged | (web.blur > 0) | (web.noise > 0)
    assert (change[spoilt] > 1e-3).all() and (change[~spoilt] == 0).all()
    assert np.array_equal(corrupt(before[5:9], web.take(np.arange(5, 9))), after[5:9])
    bright = web.watermarked & ~web.enlarged & (web.blur == 0) & (web.noise == 0)
    assert (after[bright] >= before[bright] - 1e-6).all()


def test_a_web_corpus_has_wrong_captions_small_originals_and_a_clean_validation():
    data, clean = small(web=True, images=400, drop=0.0), small(images=400, drop=0.0)
    index = range(400)
    web, batch = data.web(index), data.load(index, index, 32, 0, flip=False)
    wrong = np.array([a != b for a, b in zip(batch.caption, clean.load(index, index, 32, 0, flip=False).caption, strict=True)])
    assert (wrong <= web.wrong_caption).all() and wrong.sum() > 0.9 * web.wrong_caption.sum()
    assert np.array_equal(batch.size[:, 0].numpy(), web.original_px) and list(batch.caption) == [row[0] for row in data.all_captions(index)]
    assert data.describe()["web"] == web.counts()
    assert torch.equal(small("val", web=True).load([0], [0], 32, 0, False).image, small("val").load([0], [0], 32, 0, False).image)


def test_the_configuration_refuses_other_words():
    for wrong in ({"tier": "T9"}, {"images": 0}, {"drop": 1.5}, {"captions": 0}, {"val": 0}, {"shapes": 3}):
        with pytest.raises(ValidationError):
            TypeAdapter(ScenesSource).validate_python(wrong)
    assert set(SPLITS) >= {"train", "val", "seen", "held-out"}


def test_scenes_of_chosen_pairs_alone() -> None:
    """They are other scenes with the same rules, and validation scenes and prompts follow."""
    from ldm.data.scenes.source import ScenesSource, prompts

    source = ScenesSource(tier="one", images=40, val=10, pairs=("cyan cross", "blue ring"))
    wanted = set(pairs_of(source.pairs))
    specs = source.build("train").specs(range(40))
    assert set(zip(specs.colour[:, 0].tolist(), specs.shape[:, 0].tolist(), strict=True)) == wanted
    for specs in (source.build("val").specs(range(10)), prompts("one", 10, only=("cyan cross",)).specs):
        assert set(zip(specs.colour[:, 0].tolist(), specs.shape[:, 0].tolist(), strict=True)) <= wanted
    assert source.build("train").fingerprint() != ScenesSource(tier="one", images=40, val=10).build("train").fingerprint()


@pytest.mark.parametrize(("tier", "name", "said"), [("one", "cyan dog", "no colour and shape"), ("T1", "cyan cross", "several objects")])
def test_pairs_that_cannot_be(tier: TierName, name: str, said: str) -> None:
    from ldm.config.errors import UserError
    from ldm.data.scenes.source import ScenesSource

    with pytest.raises(UserError, match=said):
        ScenesSource(tier=tier, pairs=(name,))
