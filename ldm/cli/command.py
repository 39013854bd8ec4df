"""How a verb's function becomes a command line: typer reads its signature."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ldm.config.errors import UserError


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
    # typer has its own copy of click in some versions, and click itself in others.
    mistake: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        # Not command.main(), which would turn an interrupt and the end of a pipe into its own exceptions.
        with command.make_context(name, list(words)) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as ending:
        return int(ending.exit_code)
    except mistake as error:
        raise UserError(f"{error.format_message()} (`{name} --help` lists all options)") from None


def size_of(text: str) -> tuple[int, int]:
    """(height, width) px of WIDTHxHEIGHT or of one number for a square.

    Raises:
        UserError: for anything else.
    """
    words = text.lower().split("x")
    if len(words) > 2 or not all(re.fullmatch("0*[1-9][0-9]{0,5}", word) for word in words):
        raise UserError(f"size: got {text!r}; write WIDTHxHEIGHT in px, such as 512x512")
    return int(words[-1]), int(words[0])
