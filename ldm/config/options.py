"""Command line options as fields of frozen dataclasses: default, bounds and help stand beside the field's type."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
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
    """

    help: str
    low: float | None = None
    high: float | None = None
    name: str = ""
    variable: str = ""
    argument: bool = False


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    name: str = "",
    variable: str = "",
    argument: bool = False,
) -> Any:
    """A dataclass's field that is an option of the verbs that take the dataclass; without a default (`MISSING`) it is required."""
    return field(default=default, metadata={OPTION: Option(help, low, high, name, variable, argument)})


REQUIRED = MISSING
