"""Example prompts of a finished model."""

from __future__ import annotations

from ldm.runs.examples import varied


def test_examples_differ_in_their_words() -> None:
    squares = [f"a {colour} square" for colour in ("cyan", "red", "green")]
    assert varied([*squares, "a cyan ring in the center", "a pink cross"], 3) == [
        "a cyan square",
        "a cyan ring in the center",
        "a pink cross",
    ]
    assert varied(["a", "a", "a"], 3) == ["a"] and varied([], 3) == []
    assert varied(squares, 2) == ["a cyan square", "a red square"]
