"""Axes of a table of pictures."""

from __future__ import annotations

import pytest

from ldm.config.errors import UserError
from ldm.sampling.axes import BOUNDS, KINDS, Axis, cells, read_axis
from ldm.sampling.recipe import Recipe

BASE = Recipe(
    prompt="a red circle",
    negative="",
    seed=3,
    steps=4,
    guidance=2.0,
    rescale=0.0,
    sampler="ddim",
    spacing="trailing",
    eta=0.0,
    width=32,
    height=32,
    model="m",
    model_hash="h",
)


def spacing_of(sampler: str) -> str:
    return f"{sampler}'s"


def test_words_become_axes() -> None:
    assert read_axis("guidance=1,3,7") == Axis("guidance", (1.0, 3.0, 7.0)) == read_axis("cfg=1,3,7")
    assert read_axis("seeds=1,5").values == (1, 5)
    assert read_axis(r"prompt=a\, b,c").values == ("a, b", "c")
    assert read_axis('prompt=red,"dark, blue"').values == ("red", "dark, blue")
    assert read_axis('prompt= "a ""b"", c" ,say "no",\\(x\\),"').values == ('a "b", c', 'say "no"', "\\(x\\)", '"')
    assert read_axis("negative=,blurry").values == ("", "blurry")
    assert read_axis("guidance=1.5").label(1.5) == "guidance 1.5"
    assert {name for name, kind in KINDS.items() if kind is not str} == set(BOUNDS) & set(KINDS)


def test_the_last_axis_changes_fastest() -> None:
    made = cells(BASE, [read_axis("steps=5,20"), read_axis("guidance=1,3,7")], spacing_of)
    assert [(r.steps, r.guidance) for r in made] == [(5, 1), (5, 3), (5, 7), (20, 1), (20, 3), (20, 7)]
    assert all((r.seed, r.prompt) == (3, "a red circle") for r in made)


def test_words_of_the_prompt_are_replaced_and_samplers_bring_their_spacing() -> None:
    assert [r.prompt for r in cells(BASE, [read_axis("prompt=red,blue")], spacing_of)] == ["a red circle", "a blue circle"]
    assert [r.spacing for r in cells(BASE, [read_axis("sampler=heun,lcm")], spacing_of)] == ["heun's", "lcm's"]
    both = cells(BASE, [read_axis("spacing=karras,trailing"), read_axis("sampler=heun,ddim")], spacing_of)
    assert [r.spacing for r in both] == ["karras", "karras", "trailing", "trailing"]
    assert cells(BASE, [read_axis("variation=0,0.5")], spacing_of)[1].variation_seed == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("colour=1", "x: got 'colour=1'; write NAME=VALUE,VALUE with one of guidance"),
        ("guidance", "write NAME=VALUE"),
        ("steps=many", "x: steps is 'many'; a whole number is needed"),
        ("guidance=nan", "x: guidance is 'nan'; a number from 0 to 1000"),
        ("strength=2", "a number from 0 to 1 is needed"),
        ("sampler=eulr", "x: sampler is 'eulr'; choose from ddpm"),
        ("steps=4,4", "each value once"),
    ],
)
def test_mistakes_are_named(text: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        read_axis(text)
    assert expected in str(error.value)


def test_what_cannot_be_a_table_is_refused() -> None:
    for words, expected in (
        (["steps=1,2", "steps=3"], "each its own setting"),
        (["prompt=green,blue"], "'green' is not in 'a red circle'"),
        ([f"seed={','.join(map(str, range(30)))}", f"steps={','.join(map(str, range(1, 20)))}"], "570 pictures; at most 400"),
    ):
        with pytest.raises(UserError, match=expected):
            cells(BASE, [read_axis(word) for word in words], spacing_of)
