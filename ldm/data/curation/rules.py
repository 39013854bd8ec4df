"""Curation rules as SQL predicates: what each removes, and which of that for missing values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.config.options import option

UNIQUE = ("url", "caption", "hash", "sha256", "key", "phash")  # columns by which rows are equal


class RuleError(ValueError):
    """A rule that cannot be applied; one line for the user."""


@dataclass(frozen=True)
class Rule:
    """Filter rule: a predicate over the columns of `typed` that removes a row; never NULL."""

    name: str
    removes: str
    unknown: str = "false"  # removed since the row does not tell


def literal(text: str) -> str:
    """SQL string literal."""
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
    """Filters: what is asked of the rows; a row that does not tell what a rule asks is removed by it."""

    min_side: int = option(0, "px of the shorter side.", low=0)
    min_pixels: int = option(0, "Width times height.", low=0)
    max_aspect: float = option(0.0, "Longer over shorter side; 0: any.", low=0)
    min_aesthetic: float | None = option(None, "Scores above this.")
    max_watermark: float | None = option(None, "Probabilities below this.")
    max_unsafe: float | None = option(None, "Probabilities below this.")
    min_similarity: float | None = option(None, "Of picture and caption, above this.")
    languages: tuple[str, ...] = option((), "One of these; may be given several times.", name="--language")
    min_caption: int = option(0, "Characters.", low=0)
    max_caption: int = option(0, "Characters; 0: any.", low=0)
    match: str = option("", "A regular expression (RE2) that captions contain.")
    reject: str = option("", "A regular expression that captions do not contain.")
    remove: tuple[Path, ...] = option((), "A removal list of links, hashes or keys: text, csv or parquet.")
    unique: tuple[str, ...] = option((), f"{', '.join(UNIQUE)}: of equal rows one stays.")
    near: int = option(-1, "Perceptual hashes within so many of 64 bits are one picture; -1: off.", low=-1, high=16)
    val_share: float = option(0.0, "Share that goes to val.parquet, by a hash of the link.", low=0, high=0.9)
    seed: int = option(0, "Of that split.", needs="val_share")
