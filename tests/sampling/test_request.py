"""A sampling request: its options, what they refuse, and what is taken over of a recipe."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.config.options import bounds, option, options_of
from ldm.families.draws import DIRECT, Running, Wanted
from ldm.sampling.recipe_values import LIMITS
from ldm.sampling.request import Adapters, Base, Choice, Editing, Guidance, PromptOptions, Request, SamplerOptions, size_of


def options(kind: type) -> list[str]:
    """Names of the options of a dataclass and of those in it."""
    found = list(options_of(kind))
    for part in fields(kind):
        if isinstance(part.default_factory, type):
            found += options(part.default_factory)
    return found


def test_no_option_stands_twice() -> None:
    names = options(Request)
    assert len(names) == len(set(names)) and {"prompt", "steps", "init", "lora", "out", "tile", "device", "watermark"} <= set(names)


def test_bounds_are_those_of_the_axes_too() -> None:
    told = bounds(SamplerOptions, Base, Editing)
    assert all(told[name] == LIMITS[name] for name in LIMITS if name in told) and told["seed"] == LIMITS["seed"]


def test_what_is_asked_goes_before_a_recipe_and_that_before_what_is_usual() -> None:
    asked = SamplerOptions(steps=5, guidance_interval="0.1,0.8")
    old = {"steps": 9, "guidance": 2.0, "sampler": "heun", "spacing": "karras", "prompt": "p"}
    own = replace(DIRECT, sampler="ddim")
    found = asked.chosen(old, {"guidance": 1.0, "eta": 0.5}, own)
    assert found == Wanted(steps=5, guidance=2.0, sampler="heun", spacing="karras", eta=0.5, guidance_from=0.1, guidance_to=0.8)
    assert SamplerOptions(sampler="ddim").chosen(old, {}, own).spacing is None  # a spacing belongs to its sampler
    assert [SamplerOptions().chosen({}, {"sampler": "ddim"}, one).sampler for one in (own, DIRECT)] == ["ddim", None]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(sampler=SamplerOptions(sampler="x")), "sampler: got 'x'; choose one of ddpm"),
        (Request(sampler=SamplerOptions(guidance=float("nan"))), "guidance: got nan; a finite number"),
        (Request(sampler=SamplerOptions(guidance_interval="0.1")), "guidance_interval: got '0.1'"),
        (Request(choice=Choice(best=2)), "best: who chooses"),
        (Request(choice=Choice(variation_strength=0.5)), "variation_strength: got 0.5, but no variations"),
        (Request(editing=Editing(strength=0.5)), "strength: got 0.5, but no picture"),
        (Request(editing=Editing(outpaint="64")), "outpaint: no picture to go on from"),
        (Request(editing=Editing(hires_strength=0.5)), "hires_strength: got 0.5, but there is no second pass"),
        (Request(guidance=Guidance(classifier_scale=2.0)), "classifier_scale: got 2, but no classifier"),
        (Request(running=Running(low_memory=True), adapters=Adapters(lora=("a",))), "low_memory: not together with"),
    ],
)
def test_what_does_not_belong_together_is_refused(request_: Request, said: str) -> None:
    with pytest.raises(UserError, match=said):
        request_.fields({})


def test_a_recipe_is_taken_over() -> None:
    old = {"notation": True, "to": "b", "share": 0.5, "watermark": "w", "hires": 2.0, "hires_strength": 0.3}
    assert Request().fields(old) == old
    assert PromptOptions().read("a\0b")[0].prompt == "a b" and Base().shape({"height": 8, "width": 16}) == (8, 16)
    assert size_of("32x16") == (16, 32)


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Toy: options of a test."""

    word: str = option(MISSING, "A word.", argument=True)
    many: tuple[int, ...] = option((), "Numbers.")
    low: float = option(0.5, "A share.", low=0, high=1)
    sure: bool = option(False, "A flag.", name="--certain")
    place: Path | None = option(None, "A place.", variable="TOY_PLACE")


def test_dataclasses_are_command_lines(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def verb(toy: Toy, base: Base) -> int:
        """A verb."""
        seen.append((toy, base))
        return 3

    monkeypatch.setenv("TOY_PLACE", "here")
    assert call(verb, ["w", "--many", "1", "--many", "2", "--certain", "--seed", "4"], "toy") == 3
    assert seen == [(Toy(word="w", many=(1, 2), sure=True, place=Path("here")), Base(seed=4))]
    assert call(verb, ["--help"], "toy") == 0
    assert "Toy" in (said := capsys.readouterr().out) and "--certain" in said and "Model and picture" in said
    for words, problem in (([], "word"), (["w", "--low", "2"], "--low"), (["w", "--nosuch"], "--nosuch")):
        with pytest.raises(UserError, match=problem):
            call(verb, words, "toy")
