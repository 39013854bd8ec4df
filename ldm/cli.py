"""How a verb's function becomes a command line: typer reads its signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ldm.errors import UserError


def call(function: Callable[..., int], words: Sequence[str], name: str) -> int:
    """Parse `words` by the function's signature, call it, and return its exit code.

    Raises:
        UserError: for words that do not fit the signature.
    """
    import typer
    from typer.main import get_command

    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    app.command()(function)
    command: Any = get_command(app)
    problems = type(_problem(command))
    try:
        return int(command.main(args=list(words), prog_name=name, standalone_mode=False) or 0)
    except problems as error:
        raise UserError(f"{error.format_message()} (`{name} --help` lists all options)") from None


def _problem(command: Any) -> Any:
    """An instance of typer's own class of mistakes on the command line, wherever this version keeps it."""
    try:
        command.main(args=["--no-such-option"], prog_name="", standalone_mode=False)
    except Exception as error:
        return type(error).__mro__[-4](str(error)) if len(type(error).__mro__) > 4 else error
    return ValueError()


def size_of(text: str) -> tuple[int, int]:
    """(height, width) px of WIDTHxHEIGHT or of one number for a square.

    Raises:
        UserError: for anything else.
    """
    words = text.lower().split("x")
    if len(words) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", word) for word in words):
        raise UserError(f"size: got {text!r}; write WIDTHxHEIGHT in px, such as 512x512")
    return int(words[-1]), int(words[0])
