"""Command line options as fields of frozen dataclasses: default, bounds and help stand beside the field's type."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

OPTION = "option"  # the key of a field's metadata


class Given(Enum):
    """What a word names that must be there before a verb begins: it is looked for before torch is loaded (`ldm.cli.given`)."""

    MODEL = "model"
    DATA = "data"
    CACHE = "cache"
    CLIP = "clip"
    LORA = "lora"
    EMBEDDING = "embedding"
    FILE = "file"
    PICTURE = "picture"
    PICTURES = "pictures"
    DEVICE = "device"


@dataclass(frozen=True)
class Option:
    """How a field stands on a command line.

    Args:
        help: what it means, in a line.
        low, high: bounds of a number, both allowed.
        name: with its dashes, where it is not the field's own.
        variable: of the environment, that counts where it is not given.
        argument: whether it is a word of its own, without a name.
        needs: the field without which it changes nothing, so that it is refused then; empty: none.
        given: what it names that must be there; None: nothing.
    """

    help: str
    low: float | None = None
    high: float | None = None
    name: str = ""
    variable: str = ""
    argument: bool = False
    needs: str = ""
    given: Given | None = None


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    name: str = "",
    variable: str = "",
    argument: bool = False,
    needs: str = "",
    given: Given | None = None,
) -> Any:
    """A dataclass's field that is an option of the verbs that take the dataclass; `dataclasses.MISSING` as default: it is required."""
    return field(default=default, metadata={OPTION: Option(help, low, high, name, variable, argument, needs, given)})


def bounds(*classes: type) -> dict[str, tuple[float, float]]:
    """The bounds of the numbers of dataclasses, by field."""
    found = {}
    for one in classes:
        for name, told in options_of(one).items():
            if told.low is not None and told.high is not None:
                found[name] = (told.low, told.high)
    return found


def options_of(kind: type) -> dict[str, Option]:
    """The options among a dataclass's fields."""
    return {f.name: f.metadata[OPTION] for f in fields(kind) if OPTION in f.metadata}
