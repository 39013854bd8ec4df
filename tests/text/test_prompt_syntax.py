"""Weights, switches, turns, breaks and joined prompts mean what their notation says, and no text is an error."""

from __future__ import annotations

import random

import pytest

from ldm.text.prompt_syntax import Piece, literal, read


def pieces(text: str, step: int = 0, steps: int = 10) -> list[tuple[str, float]]:
    (part,) = read(text).at(step, steps)
    return [(piece.text, round(piece.weight, 6)) for piece in part]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red cube", [("a red cube", 1)]),
        ("a (red) cube", [("a ", 1), ("red", 1.1), (" cube", 1)]),
        ("a (red:1.3) cube", [("a ", 1), ("red", 1.3), (" cube", 1)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) cube:0.5)", [("a ", 0.5), ("red", 1), (" cube", 0.5)]),
        ("[red]", [("red", round(1 / 1.1, 6))]),
        (r"a \(red\) cube \[x\] \\", [(r"a (red) cube [x] " + "\\", 1)]),
        ("at 10:30 (noon: sun)", [("at 10:30 ", 1), ("noon: sun", 1.1)]),
        ("a|b", [("a|b", 1)]),
        ("(unclosed", [("unclosed", 1.1)]),
        ("closed)", [("closed)", 1)]),
        ("", [("", 1)]),
        ("((a:2):3)", [("a", 6)]),
        ("(a:1e9)", [("a:1e9", 1.1)]),
        ("(a:999)", [("a", 100)]),
    ],
)
def test_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(text) == expected


def test_a_switch_happens_at_its_share_or_number_of_steps() -> None:
    assert [pieces("a [cat:dog:0.5]", step)[0][0] for step in (0, 4, 5, 9)] == ["a cat", "a cat", "a dog", "a dog"]
    assert [pieces("a [cat:dog:3]", step)[0][0] for step in (2, 3)] == ["a cat", "a dog"]
    assert [pieces("a[ cat:0.5]", step)[0][0] for step in (0, 5)] == ["a", "a cat"]
    assert [pieces("a[ cat::0.5]", step)[0][0] for step in (0, 5)] == ["a cat", "a"]
    assert pieces("[a (b:2):c:0.5]", 0) == [("a ", 1), ("b", 2)] and pieces("[a (b:2):c:0.5]", 9) == [("c", 1)]
    assert pieces("[[a:b:0.2]:c:0.5]", 3) == [("b", 1)]


def test_turns_go_round() -> None:
    assert [pieces("[a|b|c]", step)[0][0] for step in range(5)] == ["a", "b", "c", "a", "b"]
    assert [pieces("x[ y|]", step)[0][0] for step in range(2)] == ["x y", "x"]
    assert pieces("[(a:1.5)|b]", 0) == [("a", 1.5)]


def test_break_begins_a_chunk() -> None:
    (part,) = read("a cube BREAK (a ball:1.2) BREAK end").at(0, 1)
    assert part == (Piece("a cube"), Piece("a ball", 1.2, breaks=True), Piece("end", 1, breaks=True))


def test_and_joins_prompts_with_weights() -> None:
    prompt = read("a cat AND a dog :0.5 AND (a fox:1.2)")
    assert [part.weight for part in prompt.parts] == [1, 0.5, 1]
    assert [part[0].text for part in prompt.at(0, 1)] == ["a cat", "a dog", "a fox"]
    assert prompt.at(0, 1)[2][0].weight == 1.2
    assert len(read("SAND and ANDES").parts) == 1


def test_plain_words_are_known() -> None:
    assert read("a red cube, at night").plain()
    assert not any(read(text).plain() for text in ("(a)", "[a|b]", "a AND b", "a BREAK b"))
    assert literal("(a:2)").plain() and literal("(a:2)").at(0, 1) == ((Piece("(a:2)"),),)


def test_any_text_is_read() -> None:
    """Ten thousand random strings of the notation's own characters: no error, and every word is kept at some step."""
    chance = random.Random(0)
    for _ in range(10_000):
        text = "".join(chance.choice("ab()[]:|\\ 0.5") for _ in range(chance.randrange(24)))
        prompt = read(text)
        for step in (0, 3, 9):
            for part in prompt.at(step, 10):
                assert all(abs(piece.weight) <= 100 for piece in part)
    deep = "([" * 30 + "a" + "])" * 30
    assert pieces(deep)[0][0] == "a"
    deeper = "[" * 5000 + "a"
    assert pieces(deeper) == [(deeper, 1)]
