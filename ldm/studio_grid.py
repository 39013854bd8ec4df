"""One form drawn in many ways: two axes of settings, and the sheet with their labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ldm.errors import UserError
from ldm.studio_orders import MAX_PICTURES, Form

VARIED = ("seed", "steps", "guidance", "sampler", "spacing", "eta", "rescale", "strength", "prompt")
MOST = 16  # values of an axis
GAP, MARGIN = 4, 6  # px


@dataclass(frozen=True)
class Axis:
    """Settings beside each other."""

    labels: tuple[str, ...]
    forms: tuple[Form, ...]


def along(form: Form, name: str, text: str) -> Axis:
    """A form once for each value.

    Args:
        name: one of VARIED, or empty: the form alone.
        text: values with commas between; whole numbers also as 1-4. For `prompt` words, of which the first is replaced in the
            prompt by each.

    Raises:
        UserError: naming what cannot be varied so.
    """
    if not name:
        return Axis(("",), (form,))
    if name not in VARIED:
        raise UserError(f"grid: got {name[:40]!r}; choose one of {', '.join(VARIED)}")
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UserError(f"grid: {name} has no values; write them with commas, such as {'1-4' if name == 'seed' else '1,3,7'}")
    if name == "prompt":
        if words[0] not in form.prompt:
            raise UserError(f"grid: the prompt does not say {words[0]!r}, the first of the words that are put in its place")
        found = [(word, form.prompt.replace(words[0], word)) for word in words]
    else:
        kind = {"int": int, "float": float, "str": str}[next(str(f.type) for f in fields(Form) if f.name == name)]
        found = [
            (f"{name} {value:g}" if kind is float else f"{name} {value}", value) for word in words for value in _values(name, word, kind)
        ]
    if len(found) > MOST:
        raise UserError(f"grid: {len(found)} values of {name}; at most {MOST}")
    values: list[tuple[str, Any]] = list(dict.fromkeys(found))
    return Axis(tuple(label for label, _ in values), tuple(replace(form, **{name: value}) for _, value in values))


def _values(name: str, word: str, kind: type) -> list[Any]:
    if kind is int and (span := re.fullmatch(r"(\d{1,16})-(\d{1,16})", word)):
        first, last = int(span[1]), int(span[2])
        return list(range(first, min(last, first + MOST) + 1))
    try:
        return [kind(word)]
    except ValueError:
        raise UserError(f"grid: {name}: got {word[:40]!r}; {'whole numbers' if kind is int else 'numbers'} are needed") from None


def cells(form: Form, x: tuple[str, str], y: tuple[str, str]) -> tuple[Axis, Axis, list[Form]]:
    """Both axes, each given by name and values, and the form of every cell, row after row.

    Raises:
        UserError: as `along`, and where there are too many cells.
    """
    across, down = along(replace(form, pictures=1), *x), along(form, *y)
    if x[0] and x[0] == y[0] != "prompt":
        raise UserError(f"grid: both axes are {x[0]}; choose another for one")
    found = [along(replace(row, pictures=1), *x).forms for row in down.forms]
    if len(across.labels) * len(down.labels) > MAX_PICTURES:
        raise UserError(f"grid: {len(across.labels)} x {len(down.labels)} pictures; at most {MAX_PICTURES}")
    return across, down, [one for row in found for one in row]


def sheet(pictures: Sequence[Any], across: Sequence[str], down: Sequence[str]) -> Any:
    """One picture (H,W,3) uint8 of all, row after row, with labels above and at the left where there are any."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    size = max(11, min(28, width // 12))
    font: Any = ImageFont.load_default(size)
    least = max((font.getlength(label) for label in across), default=0) + 2 * MARGIN
    column = max(width, int(least)) + GAP
    left = int(max(font.getlength(label) for label in down)) + 2 * MARGIN if any(down) else 0
    top = size + 2 * MARGIN if any(across) else 0
    made = Image.new("RGB", (left + column * len(across), top + (height + GAP) * len(down)), "white")
    pen = ImageDraw.Draw(made)
    for i, label in enumerate(across):
        pen.text((left + i * column + (column - GAP) / 2, top / 2), label, fill="black", font=font, anchor="mm")
    for j, label in enumerate(down):
        pen.text((left - MARGIN, top + j * (height + GAP) + height / 2), label, fill="black", font=font, anchor="rm")
    for place, picture in enumerate(pictures):
        i, j = place % len(across), place // len(across)
        at = (left + i * column + (column - GAP - picture.shape[1]) // 2, top + j * (height + GAP))
        made.paste(Image.fromarray(np.asarray(picture)), at)
    return np.asarray(made)
