"""Prompt syntax: attention weights, prompt editing and alternating words by step, BREAK, and composition by AND.

The notation is that of Stable Diffusion web UI:

    (word)            1.1 times the weight; nests
    (word:1.3)        1.3 times the weight
    [word]            the weight divided by 1.1
    [a:b:0.5]         a for the first half of the steps, then b; a whole number above 1 counts steps
    [b:0.5], [a::0.5] b from there on; a until there
    [a|b|c]           a, b and c in turn, one each step
    BREAK             what follows begins a new chunk of tokens
    a AND b :0.5      both prompts at once, the second with half the guidance
    embedding:NAME    a learned word, in ComfyUI's way: the text encoder knows which it has
    \\( \\) \\[ \\] \\\\    the characters themselves
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

STRONGER = 1.1
MAX_WEIGHT = 100.0
DEEPEST = 64  # brackets within brackets; a text with more is taken as it stands
TOKEN = re.compile(r"\\[\\()\[\]:|]|[()\[\]:|]|[^\\()\[\]:|]+|\\")
JOIN = re.compile(r"\bAND\b")
PART_WEIGHT = re.compile(r"^(.*?)\s*:\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$", re.DOTALL)
NUMBER = re.compile(r"^\s*([-+]?(?:\d+\.?\d*|\.\d+))\s*$")
LEARNED = re.compile(r"embedding:([\w.\-/\\]{1,100})")  # ComfyUI's way to say a learned word, by its file
BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Words:
    """Literal text."""

    text: str


@dataclass(frozen=True)
class Weighted:
    """Attention weight (emphasis) on nodes."""

    inside: tuple[Node, ...]
    weight: float


@dataclass(frozen=True)
class Switch:
    """Prompt editing: `before` until a step, `after` from then on."""

    before: tuple[Node, ...]
    after: tuple[Node, ...]
    when: float  # below 1: a share of the steps; otherwise a number of steps


@dataclass(frozen=True)
class Alternation:
    """Alternating words: one of several at each step, in turn."""

    options: tuple[tuple[Node, ...], ...]


Node = Words | Weighted | Switch | Alternation


@dataclass(frozen=True)
class Piece:
    """Weighted stretch of text; `breaks` where a new chunk of tokens begins before it."""

    text: str
    weight: float = 1.0
    breaks: bool = False


@dataclass(frozen=True)
class Subprompt:
    """Subprompt: one of the prompts that AND composes, with its weight."""

    nodes: tuple[Node, ...]
    weight: float = 1.0  # of its guidance

    def at(self, step: int, steps: int) -> tuple[Piece, ...]:
        """The text of step `step` (from 0) of `steps`."""
        return _merged(_flat(self.nodes, 1.0, step, steps))


@dataclass(frozen=True)
class Prompt:
    """Parsed prompt, or the interpolation between two."""

    parts: tuple[Subprompt, ...]
    end: Prompt | None = None  # the other one, with as many parts
    share: float = 0.0  # how far on the way there, from 0 to 1

    def at(self, step: int, steps: int) -> tuple[tuple[Piece, ...], ...]:
        """Every part's text at step `step` (from 0) of `steps`."""
        return tuple(part.at(step, steps) for part in self.parts)

    def plain(self) -> bool:
        """Whether it is nothing but words."""
        return (
            self.end is None
            and len(self.parts) == 1
            and self.parts[0].weight == 1
            and all(isinstance(node, Words) and not BREAK.search(node.text) for node in self.parts[0].nodes)
        )


def read(text: str) -> Prompt:
    """Parse a prompt. No text is an error: brackets without their partner reach to the end, or are words."""
    parts = []
    for written in JOIN.split(text):
        found = PART_WEIGHT.match(written) if "AND" in text else None
        # The last colon of a part is its weight only outside of brackets.
        if found and not _depth(found[1])[0]:
            parts.append(Subprompt(_nodes(found[1].strip()), _bounded(float(found[2]))))
        else:
            parts.append(Subprompt(_nodes(written.strip() if JOIN.search(text) else written)))
    return Prompt(tuple(parts))


def literal(text: str) -> Prompt:
    """A prompt whose every character is meant as it stands."""
    return Prompt((Subprompt((Words(text),)),))


def changes(prompt: Prompt) -> list[float]:
    """When words of a prompt give way to others: shares of the steps below 1, otherwise numbers of steps."""
    return [when for part in prompt.parts for when in _changes(part.nodes)]


def _changes(nodes: tuple[Node, ...]) -> list[float]:
    found: list[float] = []
    for node in nodes:
        if isinstance(node, Switch):
            found += [node.when, *_changes(node.before), *_changes(node.after)]
        elif isinstance(node, Weighted):
            found += _changes(node.inside)
        elif isinstance(node, Alternation):
            found += [when for option in node.options for when in _changes(option)]
    return found


def unweighted(prompt: Prompt) -> Prompt:
    """A prompt without the weights of its words."""
    return replace(prompt, parts=tuple(replace(part, nodes=_unweighted(part.nodes)) for part in prompt.parts))


def _unweighted(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    found: list[Node] = []
    for node in nodes:
        if isinstance(node, Weighted):
            found += _unweighted(node.inside)
        elif isinstance(node, Switch):
            found.append(replace(node, before=_unweighted(node.before), after=_unweighted(node.after)))
        elif isinstance(node, Alternation):
            found.append(Alternation(tuple(map(_unweighted, node.options))))
        else:
            found.append(node)
    return tuple(found)


def _depth(text: str) -> tuple[int, int]:
    """How many brackets of a text are open at its end, and at most."""
    depth = most = 0
    for token in TOKEN.findall(text):
        if len(token) == 1:
            depth = max(0, depth + (token in "([") - (token in ")]"))
            most = max(most, depth)
    return depth, most


def _bounded(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))


def _nodes(text: str) -> tuple[Node, ...]:
    if _depth(text)[1] > DEEPEST:
        return (Words(text),)
    tokens = TOKEN.findall(text)
    nodes, at = _sequence(tokens, 0, "")
    while at < len(tokens):  # a closing bracket that nothing opened
        more, end = _sequence(tokens, at + 1, "")
        nodes, at = [*nodes, Words(tokens[at]), *more], end
    return tuple(nodes)


def _sequence(tokens: list[str], at: int, stops: str) -> tuple[list[Node], int]:
    """Nodes from `at` to a character of `stops` or a closing bracket, and where that stands."""
    nodes: list[Node] = []
    while at < len(tokens):
        token = tokens[at]
        if token in ("(", "["):
            node, at = (_round if token == "(" else _square)(tokens, at + 1)
            nodes.append(node)
            continue
        if token in (")", "]") or (stops and len(token) == 1 and token in stops):
            break
        nodes.append(Words(token[1:] if len(token) == 2 and token[0] == "\\" else token))
        at += 1
    return nodes, at


def _round(tokens: list[str], at: int) -> tuple[Node, int]:
    """What stands after an opening round bracket, and where it ends."""
    sections: list[list[Node]] = []
    sign = ":"
    while sign == ":":
        nodes, at = _sequence(tokens, at, ":")
        sections.append(nodes)
        sign = tokens[at] if at < len(tokens) else ")"
        at = min(at + 1, len(tokens))
    if len(sections) > 1 and (weight := _number(sections[-1])) is not None:
        return Weighted(_joined(sections[:-1], ":"), _bounded(weight)), at
    return Weighted(_joined(sections, ":"), STRONGER), at


def _square(tokens: list[str], at: int) -> tuple[Node, int]:
    """What stands after an opening square bracket, and where it ends."""
    options: list[list[list[Node]]] = [[]]  # what | parts, each as what : parts
    while True:
        nodes, at = _sequence(tokens, at, ":|")
        options[-1].append(nodes)
        sign = tokens[at] if at < len(tokens) else "]"
        at = min(at + 1, len(tokens))
        if sign == "|":
            options.append([])
        elif sign != ":":
            break
    if len(options) > 1:
        return Alternation(tuple(_joined(option, ":") for option in options)), at
    sections = options[0]
    if len(sections) in (2, 3) and (when := _number(sections[-1])) is not None:
        before, after = sections[0] if len(sections) == 3 else [], sections[-2]
        return Switch(tuple(before), tuple(after), max(0.0, when)), at
    return Weighted(_joined(sections, ":"), 1 / STRONGER), at


def _joined(sections: list[list[Node]], sign: str) -> tuple[Node, ...]:
    nodes: list[Node] = []
    for i, section in enumerate(sections):
        nodes += ([Words(sign)] if i else []) + section
    return tuple(nodes)


def _number(nodes: list[Node]) -> float | None:
    if not all(isinstance(node, Words) for node in nodes):
        return None
    found = NUMBER.match("".join(node.text for node in nodes if isinstance(node, Words)))
    return float(found[1]) if found and math.isfinite(float(found[1])) else None


def _flat(nodes: tuple[Node, ...], weight: float, step: int, steps: int) -> list[Piece]:
    found: list[Piece] = []
    for node in nodes:
        if isinstance(node, Words):
            for i, text in enumerate(BREAK.split(node.text)):
                found.append(Piece(text, weight, breaks=i > 0))
        elif isinstance(node, Weighted):
            found += _flat(node.inside, _bounded(weight * node.weight), step, steps)
        elif isinstance(node, Switch):
            until = node.when * steps if node.when < 1 else node.when
            found += _flat(node.before if step < until else node.after, weight, step, steps)
        else:
            found += _flat(node.options[step % len(node.options)], weight, step, steps)
    return found


def _merged(pieces: list[Piece]) -> tuple[Piece, ...]:
    """Neighbours of one weight as one piece, and a break passed on to the text after it."""
    found: list[Piece] = []
    breaks = False
    for piece in pieces:
        breaks = breaks or piece.breaks
        if not piece.text:
            continue
        if found and not breaks and found[-1].weight == piece.weight:
            found[-1] = replace(found[-1], text=found[-1].text + piece.text)
        else:
            found.append(replace(piece, breaks=breaks and bool(found)))
        breaks = False
    return tuple(found) or (Piece(""),)
