"""Axes of a grid (X/Y/Z plot): which settings change from cell to cell."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ldm.config.errors import UserError
from ldm.sampling.adapters import scaled
from ldm.sampling.recipe import Recipe
from ldm.sampling.recipe_values import LIMITS, NAMES, SPACINGS

KINDS: dict[str, type] = {
    "guidance": float,
    "steps": int,
    "seed": int,
    "sampler": str,
    "spacing": str,
    "strength": float,
    "rescale": float,
    "eta": float,
    "temperature": float,
    "truncation": float,
    "negative": str,
    "prompt": str,
    "variation": float,
    "hires_strength": float,
    "cross_replace": float,
    "self_replace": float,
    "lora": float,
}
SHORT = {"cfg": "guidance", "seeds": "seed", "samplers": "sampler"}
BOUNDS = LIMITS | {"lora": (-10, 10)}
MOST = 400  # cells
FIELD = re.compile(r'\s*(")((?:[^"]|"")*)"\s*,|((?:\\,|[^,])*),')  # of a list as CSV has it


@dataclass(frozen=True)
class Axis:
    """A setting and its values, in order.

    Of `prompt` the first value is what stands in the prompt, and every one takes its place; those of `lora` multiply all LoRAs' weights.
    """

    name: str
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        """What stands beside the cells of a value."""
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        return shown if self.name == "prompt" else f"{self.name} {shown}"


def read_axis(text: str, option: str = "x") -> Axis:
    """An axis from `name=value,value`; a value with commas stands in quotation marks, as in CSV, or has `\\,` for them.

    Raises:
        UserError: naming what is wrong and what is possible.
    """
    name, equals, rest = text.partition("=")
    name = SHORT.get(name.strip(), name.strip())
    if not equals or name not in KINDS:
        raise UserError(f"{option}: got {text!r}; write NAME=VALUE,VALUE with one of {', '.join(KINDS)}")
    words = [quoted.replace('""', '"') if mark else word.replace("\\,", ",").strip() for mark, quoted, word in FIELD.findall(f"{rest},")]
    values = tuple(_value(name, word, option) for word in words)
    if len(set(values)) < len(values):
        raise UserError(f"{option}: got {text!r}; each value once")
    return Axis(name, values)


def _value(name: str, word: str, option: str) -> Any:
    names = {"sampler": tuple(NAMES), "spacing": SPACINGS}.get(name)
    if names is not None and word not in names:
        raise UserError(f"{option}: {name} is {word!r}; choose from {', '.join(names)}")
    try:
        value = KINDS[name](word)
    except ValueError:
        raise UserError(f"{option}: {name} is {word!r}; a {'whole ' if KINDS[name] is int else ''}number is needed") from None
    low, high = BOUNDS.get(name, (0, 0))
    if name in BOUNDS and not low <= value <= high:
        raise UserError(f"{option}: {name} is {word!r}; a number from {low:g} to {high:g} is needed")
    return value


def cells(base: Recipe, axes: Sequence[Axis], spacing_of: Callable[[str], str]) -> list[Recipe]:
    """A recipe for every combination of the axes' values; the last axis changes fastest.

    Args:
        spacing_of: a sampler's own spacing, which it gets unless an axis says otherwise.

    Raises:
        UserError: for axes of the same setting, a word that is not in the prompt, or weights of LoRAs where there are none.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise UserError(f"x, y, z: each its own setting; got {', '.join(names)}")
    many = 1
    for axis in axes:
        many *= len(axis.values)
    if many > MOST:
        raise UserError(f"x, y, z: {many} pictures; at most {MOST}")
    found = []
    for values in product(*(axis.values for axis in axes)):
        recipe = base
        for axis, value in zip(axes, values, strict=True):
            if axis.name == "prompt":
                if axis.values[0] not in base.prompt:
                    raise UserError(f"prompt: {axis.values[0]!r} is not in {base.prompt!r}; the first value is what the others replace")
                recipe = replace(recipe, prompt=recipe.prompt.replace(axis.values[0], value))
            elif axis.name == "lora":
                if not base.loras:
                    raise UserError("lora: changes nothing without a LoRA; give one by --lora FILE")
                recipe = replace(recipe, loras=scaled(base.loras, value))
            else:
                recipe = replace(recipe, **{axis.name: value})
            if axis.name == "sampler" and "spacing" not in names:
                recipe = replace(recipe, spacing=spacing_of(value))
            if axis.name == "variation":
                recipe = replace(recipe, variation_seed=recipe.seed + 1)
        found.append(recipe)
    return found
