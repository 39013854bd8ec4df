"""What of a request is likely a mistake, though it can be drawn: a line each for whoever asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.families.draws import Draws
from ldm.sampling.recipe import Recipe
from ldm.text.prompt_syntax import changes, read

# Notation of other programs: a choice, a wildcard, a tag (those of LoRAs are read), a weight with a decimal comma.
UNREAD = re.compile(r"\{[^{}|]{1,100}\|[^{}]{1,200}\}|\b__\w{1,60}__\b|<\w{1,20}:[^<>]{1,100}>|\([^():]{1,100}:\s*[-+]?\d*,\d+\s*\)")
LONG = 40  # characters of a word that a line tells
FAR = 2.0  # times the side that a model was trained at


def unquoted(prompts: Sequence[str]) -> Iterator[str]:
    """Several prompts of a word each: most likely one prompt that the shell has split."""
    if len(prompts) > 1 and all(len(one.split()) == 1 for one in prompts):
        yield f'{len(prompts)} prompts of a word each; one prompt of several words needs quotation marks: "{" ".join(prompts)}"'


def files_named(prompts: Sequence[str]) -> Iterator[str]:
    """Prompts that are names of files: most likely a list of prompts."""
    for prompt in prompts:
        if prompt.endswith((".txt", ".json", ".jsonl")) and Path(prompt).is_file():
            yield f"{prompt} is a file here, and its name is drawn; --prompts {prompt} reads the prompts in it"


def of(recipes: Sequence[Recipe], family: Draws) -> Iterator[str]:
    """Empty prompts, words that a model with a small vocabulary never learned or that are misspelt, sizes far from the trained one."""
    prompts = list(dict.fromkeys(text for one in recipes for text in (one.prompt, one.to)))
    if not family.reads_prompts:
        if any(one.strip() for one in prompts):
            yield f"prompt: this model of kind {family.kind} reads none, so its words change nothing"
        if any(one.negative.strip() for one in recipes):
            yield f"negative: this model of kind {family.kind} reads no prompts, so it changes nothing"
    else:
        if any(not one.prompt.strip() and not one.given for one in recipes):
            yield "an empty prompt: what is drawn is whatever the model likes"
        yield from _not_read(recipes, family)
    if not family.reads_seeds and len({one.seed for one in recipes}) > 1:
        yield f"seed: this model of kind {family.kind} draws one picture of each, whatever the seed, so they are alike"
    meant = {word: near for one in prompts for word, near in family.misspelt(one).items()}
    words = list(dict.fromkeys(word for one in prompts for word in family.unknown(one) if word not in meant))
    if words:
        more = f" and {len(words) - 5} more" if len(words) > 5 else ""
        said = ", ".join(word if len(word) <= LONG else f"{word[:LONG]}..." for word in words[:5])
        yield f"{said}{more}: no text that the text encoder learned from had such a word"
    for word, near in list(meant.items())[:5]:
        yield f"{word}: the text encoder has no such word and reads it in pieces; did you mean {near}?"
    height, width = family.defaults["size"]
    drawn = [] if "scene" in family.able else recipes  # marks of a scene are drawn at any size
    far = {(one.width, one.height) for one in drawn if not 1 / FAR <= (one.width * one.height / (width * height)) ** 0.5 <= FAR}
    for size in sorted(far):
        fix = (
            f"; draw near that size, and enlarge with --hires {max(2, round(max(size) / max(width, height)))}" if max(size) > width else ""
        )
        yield f"{size[0]}x{size[1]} px is far from the {width}x{height} px that the model was trained at{fix}"


def _not_read(recipes: Sequence[Recipe], family: Draws) -> Iterator[str]:
    """Notation of other programs in prompts that are not meant literally, which is read as words."""
    texts = list(dict.fromkeys(text for one in recipes if one.notation for text in (one.prompt, one.negative, one.to, one.source)))
    for mark in list(dict.fromkeys(mark for text in texts for mark in UNREAD.findall(text)))[:5]:
        fix = f"; write {mark.replace(',', '.')}" if mark[0] == "(" else ", as nothing here chooses" if mark[0] in "{_" else ""
        yield f"prompt: {mark} is read as words{fix}"
    late = {(when, one.steps): None for one in recipes if one.notation for when in changes(read(one.prompt)) if when >= max(1, one.steps)}
    for when, steps in list(late)[:5]:
        yield f"prompt: words change at step {when:g}, but {steps} steps are taken; a share such as 0.5 suits any number"
    for name in list(dict.fromkeys(name for text in texts for name in family.untaught(text)))[:5]:
        yield f"prompt: embedding:{name} is read as words, since no such word was taught; give its file by --embedding"
