"""Prompt files: a prompt a line, with kohya's flags behind it, or as JSON objects."""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ldm.config.errors import UserError

FLAG = re.compile(r"(?:^|\s)--([A-Za-z]+)(?=\s|$)")
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
}
WHOLE = ("width", "height", "seed", "steps")


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


def read_prompts(text: str, source: str) -> list[Asked]:
    """The prompts in a file's text: a JSON object where a line begins with {, else words and kohya's flags.

    Blank lines and lines that begin with # are left out. Flags: --n negative, --w width, --h height, --d seed, --l guidance,
    --s steps.

    Raises:
        UserError: naming the line, what stands there and what is allowed; or if there is no prompt at all.
    """
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip().removeprefix("\ufeff")
        if line and not line.startswith("#"):
            where = f"{source}, line {number}"
            found.append(_object(line, where) if line.startswith("{") else _flagged(line, where))
    if not found:
        raise UserError(f'{source}: no prompts in it; write one per line, or give them as words: ldm sample "a green ring"')
    return found


def _flagged(line: str, where: str) -> Asked:
    flags = list(FLAG.finditer(line))
    values: dict[str, Any] = {"prompt": line[: flags[0].start()].strip() if flags else line}
    ends = [*(flag.start() for flag in flags[1:]), len(line)]
    for flag, end in zip(flags, ends, strict=bool(flags)):
        value = line[flag.end() : end].strip()
        if flag[1] not in FLAGS:
            allowed = ", ".join(f"--{name} {meaning}" for name, meaning in FLAGS.items())
            raise UserError(f"{where}: --{flag[1]} is no flag; there are {allowed}")
        name = FLAGS[flag[1]]
        values[name] = value if name == "negative" else _number(value, name, f"{where}: --{flag[1]}")
    return Asked(**values)


def _object(line: str, where: str) -> Asked:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); a prompt that begins with {{ cannot stand alone here") from None
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in NAMES:
            near = difflib.get_close_matches(key, NAMES, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(set(NAMES.values())))}"
            raise UserError(f"{where}: {key!r} is not known; {hint}")
        name = NAMES[key]
        if name in values:
            raise UserError(f"{where}: {name} stands there twice; keep one")
        if name in ("prompt", "negative"):
            if not isinstance(value, str):
                raise UserError(f"{where}: {key} is {value!r}; a text is needed")
            values[name] = value
        else:
            values[name] = _number(value, name, f"{where}: {key}")
    if "prompt" not in values:
        raise UserError(f'{where}: no prompt; write {{"prompt": "a green ring"}}')
    return Asked(**values)


def _number(value: Any, name: str, where: str) -> int | float:
    least = {"seed": 0, "guidance": 0}.get(name, 1)
    try:
        number = int(value) if name in WHOLE and not isinstance(value, float) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < least or isinstance(value, bool) or (name in WHOLE and number != int(number)):
        kind = "whole number" if name in WHOLE else "number"
        raise UserError(f"{where} is {value!r}; {name} needs a {kind} of at least {least}")
    return int(number) if name in WHOLE else float(number)
