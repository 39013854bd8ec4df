"""Example prompts of a finished model: captions that differ in their words."""

from __future__ import annotations

from collections.abc import Sequence


def varied(captions: Sequence[str], most: int) -> list[str]:
    """The first caption, and after it always the one that brings the most words that none before has, the first of equals.

    Args:
        captions: to choose from; the same twice counts once.
        most: so many at most.
    """
    left, chosen, told = list(dict.fromkeys(captions)), list[str](), set[str]()
    while left and len(chosen) < most:
        best = max(left, key=lambda text: len(set(text.lower().split()) - told)) if chosen else left[0]
        left.remove(best)
        chosen.append(best)
        told |= set(best.lower().split())
    return chosen
