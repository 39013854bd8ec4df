"""Prompt files: a prompt a line, with kohya's flags behind it, or as JSON objects."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.config.errors import UserError
from ldm.sampling.recipe_values import LIMITS

# A word that begins with -- is a flag: its name, and its value if that stands in quotation marks.
FLAG = re.compile(r"""(?:^|(?<=\s))--(?P<name>[^\W_][\w-]*)(?:=|(?=\s|$))(?:\s*(?P<quoted>"(?:[^"\\]|\\.)*"|'[^']*')(?=\s|$))?""")
LINE = re.compile(r"\r\n|\n|\r")  # str.splitlines also takes U+2028 and others, which are parts of a text
OPENS = re.compile(r"[\ufeff\s]*\[\s*[{\"]")  # a list of objects or texts
DASHED = re.compile(r"(?:^|(?<=\s))[\u2010-\u2015\u2212]{1,2}(?P<name>[A-Za-z][\w-]*)(?=\s*=|\s+(?P<value>\S+))")  # of editors, for --
MARKED = re.compile(r"(?:[-*+\u2022]|(?P<number>\d{1,6})[.)])\s+\S")  # an entry of a list of Markdown or YAML
SECTION = re.compile(r"\[\[?[A-Za-z][\w.]*\]\]?")  # of TOML, as kohya's scripts read it
SETTING = re.compile(r"[A-Za-z]\w*\s*=\s*\S")
COLUMNS = re.compile(r"\s*[,;\t|]\s*")  # between the names of a table's columns
LISTS = ("given",)  # fields that are lists of words; flags may be repeated
FLAGS = {"n": "negative", "w": "width", "h": "height", "d": "seed", "l": "guidance", "s": "steps"}
NAMES = {
    "prompt": "prompt",
    "text": "prompt",
    "caption": "prompt",
    "negative": "negative",
    "negative_prompt": "negative",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "steps": "steps",
    "num_inference_steps": "steps",
    "guidance": "guidance",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "scale": "guidance",
    "given": "given",
}
WHOLE = ("width", "height", "seed", "steps")


class Pairs(list[tuple[str, Any]]):
    """A JSON object's names and values, in which a name may stand twice."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt with what its line says besides; None where it does not say."""

    prompt: str
    negative: str | None = None
    width: int | None = None  # px
    height: int | None = None  # px
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None
    given: tuple[str, ...] = ()  # VIEW=FILE[@WEIGHT]
    loras: tuple[str, ...] = ()  # FILE:WEIGHT of each LoRA that its tags name


def read_prompts(text: str, source: str) -> list[Asked]:
    """The prompts in a file's text: a JSON object where a line begins with {, else words and flags; or one JSON list.

    Blank lines and lines that begin with # are left out. Flags are kohya's (--n negative, --w width, --h height, --d seed,
    --l guidance, --s steps) and, under the names that JSON objects have, the web UI's (--negative_prompt, --cfg_scale, ...).

    Raises:
        UserError: naming the line, what stands there and what is allowed; or if there is no prompt at all.
    """
    found = []
    for where, line in _entries(text, source):
        if isinstance(line, str):
            found.append(_object(line, where) if line.startswith("{") else _flagged(line, where))
        else:
            found.append(_asked(line, where))
    if not found:
        raise UserError(f'{source}: no prompts in it; write one per line, or give them as words: ldm sample "a green ring"')
    return found


def _entries(text: str, source: str) -> Iterator[tuple[str, str | Pairs]]:
    """Where each prompt stands, and its line, or its fields as pairs."""
    listed: Any = None
    if text.lstrip("\ufeff \t\r\n").startswith("["):
        try:
            listed = json.loads(text.lstrip("\ufeff"), object_pairs_hook=Pairs)
        except (ValueError, RecursionError) as error:
            if OPENS.match(text):  # else a prompt that begins with a bracket
                raise UserError(f"{source}: a JSON list that is torn or mistyped ({error}); write it again") from None
    if listed is not None:
        if not all(isinstance(one, str | Pairs) for one in listed):
            raise UserError(f'{source}: a list of texts and of objects is needed, such as [{{"prompt": "a green ring"}}]')
        for number, one in enumerate(listed, 1):
            yield f"{source}, entry {number}", Pairs([("prompt", one)]) if isinstance(one, str) else one
        return
    lines = {number: line.strip().removeprefix("\ufeff") for number, line in enumerate(LINE.split(text), 1)}
    lines = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    _refuse_other_forms(lines, source)
    for number, line in lines.items():
        yield f"{source}, line {number}", line


def _refuse_other_forms(lines: Mapping[int, str], source: str) -> None:
    """Refuse a table, a marked list, Markdown or TOML, of which every line would be drawn as it stands.

    Raises:
        UserError: naming the line, and what it looks like.
    """
    instead = "; give a prompt a line, with flags or as JSON"
    for number, line in lines.items():
        if line.startswith("```"):
            raise UserError(f"{source}, line {number}: a fence of Markdown, no prompt; leave it out")
    number, first = next(iter(lines.items()), (1, ""))
    columns = [name.strip().strip('"').lower() for name in COLUMNS.split(first)]
    if len(columns) > 1 and any(NAMES.get(name) == "prompt" for name in columns) and all(re.fullmatch(r"\w+", name) for name in columns):
        raise UserError(f"{source}, line {number}: {first[:60]!r} are the columns of a table, which is not read{instead}")
    if SECTION.fullmatch(first) and any(SETTING.match(line) for line in lines.values()):
        raise UserError(f"{source}, line {number}: {first[:60]!r} begins a section of TOML, which is not read{instead}")
    entries = list(lines.values())[1 if re.fullmatch(r"\w+:", first) else 0 :]
    marks = [MARKED.match(line) for line in entries]
    numbers = [int(mark["number"]) for mark in marks if mark and mark["number"]]
    if len(marks) > 1 and all(marks) and (not numbers or numbers == list(range(numbers[0], numbers[0] + len(marks)))):
        raise UserError(
            f"{source}, line {number}: every line begins as an entry of a list ({entries[0][:20]!r}); take the marks away{instead}"
        )


def _flagged(line: str, where: str) -> Asked:
    for dashed in DASHED.finditer(line):
        letter = len(dashed["name"]) == 1 and not re.fullmatch(r"[\d.]+", dashed["value"] or "")  # of a sentence
        if not letter and _meant(f"--{dashed['name']}"):
            raise UserError(f"{where}: {dashed.group()} begins with a dash that an editor made of two; write --{dashed['name']}")
    flags = list(FLAG.finditer(line))
    words = line[: flags[0].start()].strip() if flags else line
    given = [("prompt", words)] if words or not flags else []
    ends = [*(flag.start() for flag in flags[1:]), len(line)]
    for flag, end in zip(flags, ends, strict=bool(flags)):
        if not _meant(f"--{flag['name']}"):
            allowed = ", ".join([*(f"--{name} {meaning}" for name, meaning in FLAGS.items()), *(f"--{name}" for name in NAMES)])
            raise UserError(f"{where}: --{flag['name']} is no flag; there are {allowed}")
        value = line[flag.end() : end].strip()
        if quoted := flag["quoted"] or "":
            if flag["name"] not in FLAGS:  # kohya's values stand as they are
                quoted = re.sub(r"\\(.)", r"\1", quoted[1:-1]) if quoted.startswith('"') else quoted[1:-1]
            value = f"{quoted} {value}".strip()
        given.append((f"--{flag['name']}", value))
    return _asked(given, where)


def _meant(key: str) -> str:
    """The field of a prompt that a name or a flag means; empty: none."""
    return NAMES.get(key, "") if not key.startswith("--") else FLAGS.get(key[2:]) or NAMES.get(key[2:].replace("-", "_"), "")


def _object(line: str, where: str) -> Asked:
    try:
        given = json.loads(line, object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); a prompt that begins with {{ cannot stand alone here") from None
    return _asked(given, where)


def _asked(given: Sequence[tuple[str, Any]], where: str) -> Asked:
    """A prompt of (name, value) pairs."""
    values: dict[str, Any] = {}
    for key, value in given:
        name = _meant(key)
        if not name:
            near = difflib.get_close_matches(key, NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(set(NAMES.values())))}"
            raise UserError(f"{where}: {key!r} is not known; {hint}")
        if name in LISTS:
            values[name] = (*values.get(name, ()), *_words(value, f"{where}: {key}"))
            continue
        if name in values:
            raise UserError(f"{where}: {key} says {name}, which stands there twice; keep one")
        if name in ("prompt", "negative"):
            if not isinstance(value, str):
                raise UserError(f"{where}: {key} is {value!r}; a text is needed")
            values[name] = value
        else:
            values[name] = _number(value, name, f"{where}: {key}")
    if "prompt" not in values:
        raise UserError(f'{where}: no prompt; write {{"prompt": "a green ring"}}, or words before the flags')
    return Asked(**values)


def _words(value: Any, where: str) -> list[str]:
    """Words of a list: one, several, or an object's names and values as NAME=VALUE."""
    if isinstance(value, Pairs) and all(isinstance(one, str) for _, one in value):
        return [f"{name}={one}" for name, one in value]
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(f"{where} is {str(value)[:40]!r}; VIEW=FILE is needed, or a list of these")
    return found


def _number(value: Any, name: str, where: str) -> int | float:
    least, most = LIMITS[name]
    try:
        number = int(value) if name in WHOLE and not isinstance(value, float) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most or isinstance(value, bool) or (name in WHOLE and number != int(number)):
        kind = "whole number" if name in WHOLE else "number"
        raise UserError(f"{where} is {str(value)[:40]!r}; {name} needs a {kind} from {least} to {most}")
    return int(number) if name in WHOLE else float(number)
