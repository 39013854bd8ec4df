"""The rules of curation as SQL: what each removes, and which of that is only not known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class RuleError(ValueError):
    """A rule that cannot be applied; one line for the user."""


@dataclass(frozen=True)
class Rule:
    """One reason to remove a row, over the columns of `typed`; never NULL."""

    name: str
    removes: str
    unknown: str = "false"  # removed since the row does not tell


def literal(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def rules_of(asked: Curation, columns: dict[str, str], removal: list[str]) -> list[Rule]:
    """The rules that are asked for, cheap ones first.

    Raises:
        RuleError: naming the column that is missing.
    """
    rules: list[Rule] = []

    def add(name: str, needs: tuple[str, ...], keeps: str) -> None:
        missing = [n for n in needs if n not in columns]
        if missing:
            raise RuleError(f"{name}: the table has no column {missing[0]}; it has {', '.join(columns.values()) or 'none that is known'}")
        unknown = " OR ".join(f"{n} IS NULL" for n in needs)
        rules.append(Rule(name, f"(({unknown}) OR NOT COALESCE({keeps}, false))", f"({unknown})"))

    side = ("height", "width")
    if asked.min_side:
        add(f"side >= {asked.min_side} px", side, f"least(height, width) >= {asked.min_side}")
    if asked.min_pixels:
        add(f"pixels >= {asked.min_pixels}", side, f"height * width >= {asked.min_pixels}")
    if asked.max_aspect:
        shape = f"least(height, width) > 0 AND greatest(height, width) <= {float(asked.max_aspect)!r} * least(height, width)"
        add(f"aspect <= {asked.max_aspect:g}", side, shape)
    for name, sign, bound in (
        ("aesthetic", ">", asked.min_aesthetic),
        ("watermark", "<", asked.max_watermark),
        ("unsafe", "<", asked.max_unsafe),
        ("similarity", ">", asked.min_similarity),
    ):
        if bound is not None:
            add(f"{name} {sign} {bound:g}", (name,), f"{name} {sign} {float(bound)!r}")
    if asked.languages:
        wanted = ", ".join(literal(n.lower()) for n in asked.languages)
        add(f"language {', '.join(asked.languages)}", ("language",), f"lower(language) IN ({wanted})")
    if asked.min_caption:
        add(f"caption >= {asked.min_caption} characters", ("caption",), f"length(trim(caption)) >= {asked.min_caption}")
    if asked.max_caption:
        add(f"caption <= {asked.max_caption} characters", ("caption",), f"length(trim(caption)) <= {asked.max_caption}")
    if asked.match:
        add(f"caption matches {asked.match}", ("caption",), f"regexp_matches(caption, {literal(asked.match)})")
    if asked.reject:
        add(f"caption does not match {asked.reject}", ("caption",), f"NOT regexp_matches(caption, {literal(asked.reject)})")
    for name in removal:
        rules.append(Rule(f"{name} on a removal list", f"COALESCE({name} IN (SELECT value FROM removed_{name}), false)"))
    return rules


@dataclass(frozen=True)
class Curation:
    """What is asked of the rows; a row that does not tell what a rule asks is removed by it."""

    min_side: int = 0  # px, the shorter side is at least so long
    min_pixels: int = 0  # width times height is at least so much
    max_aspect: float = 0.0  # longer over shorter side is at most so much; 0: any
    min_aesthetic: float | None = None  # the score is above this
    max_watermark: float | None = None  # the probability is below this
    max_unsafe: float | None = None  # the probability is below this
    min_similarity: float | None = None  # of picture and caption, above this
    languages: tuple[str, ...] = ()  # one of these
    min_caption: int = 0  # characters
    max_caption: int = 0  # characters; 0: any
    match: str = ""  # a regular expression (RE2) that captions must contain
    reject: str = ""  # one that they must not contain
    remove: tuple[Path, ...] = ()  # removal lists: text files of a value per line, parquet or csv of columns
    unique: tuple[str, ...] = ()  # rows with an equal url, caption, hash, sha256, key or phash stay once
    near: int = -1  # perceptual hashes that differ in at most so many of 64 bits are one picture; -1: off
    val_share: float = 0.0  # share that goes to val.parquet, by a hash of the link
    seed: int = 0  # of that split
