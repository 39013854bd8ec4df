"""Settings of token models and translators that change nothing are told, and no setting is told of that nobody gave."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.config.errors import UserError
from ldm.families.cyclegan import CycleGAN, CycleGANFamily
from ldm.families.draws import DIRECT, SamplingCall
from ldm.families.tokens.writing import WritingFamily
from ldm.families.translator import PICTURE
from ldm.models.translation import PatchGANConfig, ResNetGeneratorConfig
from ldm.sampling import doubts
from ldm.sampling.recipe import Recipe
from ldm.sampling.unheard import in_recipe

USUAL = replace(DIRECT, steps=8, guidance=3.0)


def recipe(**more: Any) -> Recipe:
    told: dict[str, Any] = {"prompt": "a red ring", "seed": 0, "steps": 8, "guidance": 3.0, "sampler": "", "width": 32, "height": 32}
    told |= {"rescale": 0.0, "spacing": "", "negative": "", "model": "m", "model_hash": ""}
    return Recipe(**{**told, **more})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, ""),
        ({"temperature": 0.0}, ""),
        ({"temperature": 0.0, "top_k": 5}, "top_k: temperature 0 draws the likeliest codes alone"),
        ({"temperature": 0.0, "top_p": 0.5}, "top_p: temperature 0 draws the likeliest codes alone"),
        ({"guidance": 1.0, "negative": "cyan"}, "negative: is not read without guidance"),
        ({"guidance": 0.0}, "guidance: 0 leaves the prompt out"),
        ({"guidance_from": 0.3, "guidance_to": 0.31}, "guidance_interval: none of the 8 steps lies in 0.3 to 0.31"),
    ],
)
def test_models_of_codes_tell_of_what_they_do_not_read(more: dict[str, Any], said: str) -> None:
    found = list(in_recipe(recipe(**more), USUAL))
    assert len(found) == bool(said) and all(one.startswith(said) for one in found)


def translator(*domains: str) -> CycleGANFamily:
    config = CycleGAN(
        domains=(domains[0], domains[1]),
        generator=ResNetGeneratorConfig(channels=4, blocks=1),
        discriminator=PatchGANConfig(channels=4, layers=1),
    )
    return CycleGANFamily(config, PICTURE, 16)


def test_domains_of_several_words_can_be_named() -> None:
    found = translator("photo", "oil painting")
    assert found.player("as an Oil Painting, please") == "_A" and found.player("photo") == "_B"
    with pytest.raises(UserError, match="prompt: got 'oil'; say what the picture shall become: photo or oil painting"):
        found.player("oil")
    nested = translator("winter", "winter night")
    assert nested.player("winter") == "_B" and nested.player("Winter night ") == "_A"
    with pytest.raises(UserError, match="say what"):
        nested.player("a winter night")
    assert found.config.usage("a red ring", "MODEL") == 'python sample.py "oil painting" --init PICTURE --model MODEL'


def test_a_translator_draws_of_one_picture_whatever_the_seed() -> None:
    found = translator("day", "night")
    image = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="given: this model of kind cyclegan draws of one picture"):
        found.sample(["night"], edits=(*found.edits(image), *found.edits(image)))
    told = {"prompt": "night", "width": 16, "height": 16, "given": "", "negative": "", "to": "", "source": "", "notation": False}
    asked: list[Any] = [SimpleNamespace(**told, seed=seed) for seed in (1, 2)]
    assert [one.split(":")[0] for one in doubts.of(asked, found)] == ["seed"]
    assert not list(doubts.of(asked[:1], found))


@pytest.mark.parametrize(
    ("reads", "how"), [("none", "say how many by ldm caption --count"), ("image", "give it pictures, with ldm caption")]
)
def test_a_model_of_captions_says_how_they_are_had(reads: str, how: str) -> None:
    family = WritingFamily.__new__(WritingFamily)
    torch.nn.Module.__init__(family)
    family.said = SimpleNamespace(writes="caption", reads=reads)  # type: ignore[assignment]
    with pytest.raises(UserError, match=f"sample: this model of kind tokens writes captions; {how}"):
        family.draw(SamplingCall(prompts=["a red ring"], seeds=[0], size=(32, 32)))
