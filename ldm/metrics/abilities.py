"""Prompts by ability, as DrawBench (arXiv 2205.11487) and GenEval (2310.11513) ask them, about scenes that the checker reads exactly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.scenes.captions import Phrase, Target, reword, say, stated
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import COLOURS, SHAPES, TIERS, TierName, addresses
from ldm.metrics import adherence
from ldm.metrics.bench import Bench, Values, floats

DROPPED = 0.5  # share of facts that partial prompts leave open
EVERY = (1 << 63) - 1  # every word that has a synonym
COLOURED = re.compile(rf"\ban? ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
GROUND = re.compile(r"^(.*) (on a [a-z ]*background)$")


@dataclass(frozen=True)
class Asked:
    """Prompts of one ability, what each states, and which score of `adherence.score` says whether it holds."""

    text: tuple[str, ...]
    targets: tuple[Target, ...]
    score: str = "strict"


def names(tier: TierName) -> tuple[str, ...]:
    """The abilities that scenes of a tier can answer for."""
    kind = TIERS[tier]
    of_one = ("object", "colour", "position") if kind.least == 1 else ()
    of_two = ("two_objects", "binding", "relation") if kind.most > 1 else ()
    return (*of_one, *of_two, *(("counting",) if kind.most > 2 else ()), "background", "unseen_pair", "partial", "wording")


def asked(tier: TierName, many: int, seed: int = 0) -> dict[str, Asked]:
    """Prompts by ability, those alone that scenes of the tier can answer.

    `object`, `colour`, `position`: one object, of which no more is said; `two_objects`, `binding` (two colours on two shapes),
    `relation`; `counting`: two to four alike; `background`; `unseen_pair`: colour and shape that training withholds together;
    `partial`: half of the facts left open; `wording`: facts that training says, in words that it does not use.

    Args:
        tier: whose words and scenes.
        many: prompts of each ability.
        seed: other seeds give other prompts.
    """
    able = names(tier)
    seen, unseen = prompts(tier, many, seed), prompts(tier, many, seed, "held-out")
    first = [replace(target.phrases[0], count=1) for target in seen.targets]
    found: dict[str, list[Target]] = {}
    if "object" in able:
        found["object"] = [_one(Phrase(shape=p.shape)) for p in first]
        found["colour"] = [_one(Phrase(colour=p.colour)) for p in first]
        found["position"] = [_one(Phrase(colour=p.colour, shape=p.shape, cell=i % 9)) for i, p in enumerate(first)]
    if "relation" in able:
        pairs = [target.phrases for target in prompts("T1", many, seed).targets]
        plain = [tuple(Phrase(colour=p.colour, shape=p.shape) for p in pair) for pair in pairs]
        found["two_objects"] = [Target(tuple(Phrase(shape=p.shape) for p in pair)) for pair in plain]
        found["binding"] = [Target(pair) for pair in plain]
        found["relation"] = [Target(pair, relation=i % 4) for i, pair in enumerate(plain)]
    if "counting" in able:
        found["counting"] = [_one(Phrase(count=2 + i % 3, colour=p.colour, shape=p.shape)) for i, p in enumerate(first)]
    found["background"] = [replace(target, texture=-1) for target in seen.targets]
    found["unseen_pair"] = [
        Target(tuple(Phrase(count=p.count, colour=p.colour, shape=p.shape) for p in target.phrases)) for target in unseen.targets
    ]
    keys = addresses(np.arange(many), "abilities", "partial", seed)
    found["partial"] = stated(seen.specs, tier, keys, DROPPED)
    said = {name: Asked(tuple(map(say, targets)), tuple(targets)) for name, targets in found.items()}
    said["background"] = replace(said["background"], score="tone")
    return said | {"wording": Asked(tuple(otherwise(seen.targets)), seen.targets)}


def otherwise(targets: Sequence[Target]) -> list[str]:
    """Each target in one of three wordings that training does not have: synonyms throughout, the background first, colours after shapes."""
    said = []
    for i, target in enumerate(targets):
        text = say(target)
        if i % 3 == 0:
            text = reword(text, EVERY)
        elif i % 3 == 1 and (match := GROUND.match(text)):
            text = f"{match[2]}, {match[1]}"
        else:
            text = COLOURED.sub(r"a \2 that is \1", text)
        said.append(text)
    return said


def _one(phrase: Phrase) -> Target:
    return Target((phrase,))


@config
class Abilities:
    """Which abilities a model has: prompts of one kind each, every one read by the scenes' exact checker."""

    kind: Literal["abilities"] = "abilities"
    tier: TierName  # whose words and scenes
    prompts: Positive = 24  # of each ability
    guidance: NonNegative = 0.0  # 0: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    size: Count = 0  # px; 0: the model's own
    seed: Count = 0  # of prompts and pictures

    asks = "sample"  # of the model
    of_prompts = True  # and it is to read them, or views of what they say

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("mean", *names(self.tier))

    def run(self, bench: Bench) -> Values:
        """The share of prompts whose every stated fact holds, by ability, the mean of them, and intervals."""
        wanted = bench.wanted(self)
        size = (self.size, self.size) if self.size else None
        groups = asked(self.tier, self.prompts, self.seed)
        found: Values = {}
        for number, (name, group) in enumerate(groups.items()):

            def on_step(step: int, steps: int, base: int = number * self.prompts, name: str = name) -> None:
                bench.progress(base + self.prompts * step // steps, len(groups) * self.prompts, name.replace("_", " "))

            seeds = [self.seed * 1_000_003 + i for i in range(self.prompts)]
            images = bench.sample(group.text, seeds, wanted, size=size, on_step=on_step)
            scores = adherence.score(images.numpy(), group.targets)
            found[name] = adherence.summary({name: scores[group.score]})[name]
            bench.show(f"abilities-{name}-{images.shape[1]}", floats(images[:8]), 8, group.text[:8])
        used = bench.model.settings(wanted)
        protocol = {"tier": self.tier, "prompts": self.prompts, **bench.used(wanted)}
        protocol |= {"spacing": used.spacing, "seed": self.seed, "size": self.size or bench.model.defaults["size"][0]}
        shares = {name: round(value.mean, 4) for name, value in found.items()}
        mean = round(sum(shares.values()) / len(shares), 4)
        return {"mean": mean, **shares, "by_ability": {name: value.to_dict() for name, value in found.items()}, "protocol": protocol}
