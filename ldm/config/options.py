"""Command line options as fields of frozen dataclasses: default, bounds and help stand beside the field's type."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

OPTION = "option"  # the key of a field's metadata


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
    """

    help: str
    low: float | None = None
    high: float | None = None
    name: str = ""
    variable: str = ""
    argument: bool = False
    needs: str = ""


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
) -> Any:
    """A dataclass's field that is an option of the verbs that take the dataclass; `dataclasses.MISSING` as default: it is required."""
    return field(default=default, metadata={OPTION: Option(help, low, high, name, variable, argument, needs)})


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
