"""Scene captions: a grammar that states facts, writes them and parses them back; flipping an image would make its caption false.

caption := np | np[,] rel np | np (, np)* and np, with ` on a [texture] tone background` at will
np      := count [size] [fill] [colour] shape [at the cell]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.geometry import relation_of
from ldm.data.scenes.spec import CELLS, COLOURS, FILLS, RELATIONS, SHAPES, SIZES, TEXTURES, TIERS, TONES, Specs, UniformDraws

PLACES = tuple("in the center" if cell == "center" else f"at the {cell}" for cell in CELLS)
COUNTS = ("", "a", "two", "three", "four")
RARELY = 0.25  # colours and shapes are left out at this share of the rate of other facts
SYNONYMS = {
    "large": "big",
    "small": "little",
    "circle": "disc",
    "circles": "discs",
    "cross": "plus",
    "crosses": "pluses",
    "ring": "hoop",
    "rings": "hoops",
    "gray": "grey",
    "center": "middle",
    "purple": "violet",
}
NAMED = re.compile(rf"\ban? ((?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(FILLS)}) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)})\b")


@dataclass(frozen=True, slots=True)
class Phrase:
    """Noun phrase about one group of objects; attributes index the word lists of `scene_spec`, -1 is unsaid."""

    count: int = 1
    colour: int = -1
    shape: int = -1
    size: int = -1
    cell: int = -1
    fill: int = -1


@dataclass(frozen=True, slots=True)
class Target:
    """All that a caption states; the scene holds these objects and no others."""

    phrases: tuple[Phrase, ...]
    relation: int = -1  # what the first phrase is of the second
    tone: int = -1
    texture: int = -1

    @property
    def objects(self) -> tuple[Phrase, ...]:
        """One phrase per object, in order."""
        return tuple(phrase for phrase in self.phrases for _ in range(phrase.count))


def stated(specs: Specs, tier: str, keys: NDArray[np.uint64] | None = None, drop: float = 0.0) -> list[Target]:
    """What captions state of scenes: each fact is left out with chance `drop` (colour and shape at a quarter of it).

    Facts that are alike in a whole tier (the size in `one`, plain backgrounds) are never stated.

    Args:
        keys: one per scene, addressing the draws; may be None when nothing is dropped.
    """
    kind, most = TIERS[tier], specs.shape.shape[1]
    n = len(specs)
    left_out = np.zeros((n, 5 * most + 3), bool)
    if drop and keys is not None:
        rate = np.full(5 * most + 3, drop)
        rate[: 2 * most] *= RARELY
        left_out = UniformDraws(keys)(5 * most + 3) < rate
    left_out[:, :most] &= ~left_out[:, most : 2 * most]  # a phrase that names neither colour nor shape says nothing
    words = [
        np.where(left_out[:, i * most : (i + 1) * most], -1, getattr(specs, name))
        for i, name in enumerate(("colour", "shape", "size", "cell", "fill"))
    ]
    if len(kind.sizes) == 1:
        words[2] = np.full_like(words[2], -1)
    if not kind.rich:
        words[4] = np.full_like(words[4], -1)
    relation = np.full(n, -1)
    if most > 1:
        plain = relation_of(specs.x[:, 1] - specs.x[:, 0], specs.y[:, 1] - specs.y[:, 0])
        relation = np.where((specs.count == 2) & ~left_out[:, -1], plain, -1)
    tone = np.where(left_out[:, -2], -1, specs.tone)
    texture = np.where(left_out[:, -2] | left_out[:, -3] | (not kind.textured), -1, specs.texture)
    facts = np.stack(words, -1).tolist()
    if most == 1:
        return [Target((Phrase(1, *row[0]),), -1, t, x) for row, t, x in zip(facts, tone.tolist(), texture.tolist(), strict=True)]
    pairs = (specs.colour * 6 + specs.shape).tolist()
    true = np.stack([specs.size, specs.fill], -1).tolist()
    last = zip(facts, pairs, true, specs.count.tolist(), relation.tolist(), tone.tolist(), texture.tolist(), strict=True)
    return [_target(*row) for row in last]


def _target(facts: list[list[int]], pairs: list[int], true: list[list[int]], count: int, relation: int, tone: int, texture: int) -> Target:
    """Merge the objects of equal colour and shape into groups; a group has no single place, and a size or fill only if it is shared."""
    groups: dict[int, list[int]] = {}
    for j in range(count):
        groups.setdefault(pairs[j], []).append(j)
    phrases = []
    for members in groups.values():
        colour, shape, size, cell, fill = facts[members[0]]
        if len(members) > 1:
            cell = -1
            if any(true[j][0] != true[members[0]][0] for j in members):
                size = -1
            if any(true[j][1] != true[members[0]][1] for j in members):
                fill = -1
        phrases.append(Phrase(len(members), colour, shape, size, cell, fill))
    return Target(tuple(phrases), relation if len(phrases) == 2 else -1, tone, texture)


@cache
def _noun_phrase(phrase: Phrase) -> str:
    noun = "shape" if phrase.shape < 0 else SHAPES[phrase.shape]
    if phrase.count > 1:
        noun += "es" if noun == "cross" else "s"
    words = [SIZES[phrase.size]] if phrase.size >= 0 else []
    words += [FILLS[phrase.fill]] if phrase.fill >= 0 else []
    words += [COLOURS[phrase.colour]] if phrase.colour >= 0 else []
    words.append(noun)
    article = "an" if phrase.count == 1 and words[0] == "orange" else COUNTS[phrase.count]
    place = [PLACES[phrase.cell]] if phrase.cell >= 0 else []
    return " ".join([article, *words, *place])


def say(target: Target) -> str:
    """The caption of what is stated."""
    phrases = [_noun_phrase(phrase) for phrase in target.phrases]
    if target.relation >= 0:
        comma = "," if target.phrases[0].cell >= 0 else ""  # "at the top, right of" is not "at the top right of"
        text = f"{phrases[0]}{comma} {RELATIONS[target.relation]} {phrases[1]}"
    else:
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    if target.tone < 0:
        return text
    texture = f"{TEXTURES[target.texture]} " if target.texture >= 0 else ""
    return f"{text} on a {texture}{TONES[target.tone]} background"


def called(caption: str, name: str) -> str:
    """A caption of one object with a name in the place of its colour and shape."""
    return NAMED.sub(lambda found: f"a {found[1] or ''}{name}", caption)


def reword(caption: str, key: int) -> str:
    """The caption with each word that has a synonym replaced or not, by the bits of `key`."""
    words = caption.split(" ")
    return " ".join(SYNONYMS.get(word, word) if key >> (i % 63) & 1 else word for i, word in enumerate(words))


def _choice(words: tuple[str, ...]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_NP = re.compile(
    rf"(a|an|two|three|four) (?:({_choice(SIZES)}) )?(?:({_choice(FILLS)}) )?(?:({_choice(COLOURS)}) )?"
    rf"({_choice(SHAPES)}|shape)(?:e?s)?(?: ({_choice(PLACES)}))?"
)
_GROUND = re.compile(rf" on a (?:({_choice(TEXTURES)}) )?({_choice(TONES)}) background$")
_JOIN = re.compile(rf",? ({_choice(RELATIONS)}) |, | and ")


def parse(caption: str) -> Target:
    """What a caption of this grammar states, synonyms included.

    Raises:
        ValueError: where the caption leaves the grammar.
    """
    plain = {synonym: word for word, synonym in SYNONYMS.items()}
    text = " ".join(plain.get(word, word) for word in caption.strip().split(" "))
    ground = _GROUND.search(text)
    tone, texture = -1, -1
    if ground:
        texture, tone = _index(TEXTURES, ground[1]), TONES.index(ground[2])
        text = text[: ground.start()]
    phrases, relation, at = [], -1, 0
    while True:
        match = _NP.match(text, at)
        if not match:
            raise ValueError(f"not a scene's caption: {caption!r} (at {text[at : at + 30]!r})")
        count, size, fill, colour, shape, place = match.groups()
        phrases.append(
            Phrase(
                max(1, _index(COUNTS, count)),
                _index(COLOURS, colour),
                _index(SHAPES, shape),
                _index(SIZES, size),
                _index(PLACES, place),
                _index(FILLS, fill),
            )
        )
        at = match.end()
        if at == len(text):
            return Target(tuple(phrases), relation, tone, texture)
        join = _JOIN.match(text, at)
        if not join:
            raise ValueError(f"not a scene's caption: {caption!r} (at {text[at : at + 30]!r})")
        relation = _index(RELATIONS, join[1]) if join[1] else relation
        at = join.end()


def _index(words: tuple[str, ...], word: str | None) -> int:
    return words.index(word) if word in words else -1
