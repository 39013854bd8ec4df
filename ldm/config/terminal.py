"""What is printed: control codes of files are shown and not obeyed, nothing secret is told, and every character can be written."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO, cast

from ldm.config.secrets import redacted

# What moves the cursor, colours, rings, turns the direction of writing, or is half a character; tabs and ends of lines are not among it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """A text with its control codes spelt out, as JSON does: \\u001b."""
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def is_text(text: str) -> bool:
    """Whether a word is Unicode, and not bytes of another encoding, which Python keeps as halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def raw(stream: TextIO) -> TextIO:
    """The stream behind what `guarded` has put before it: for whoever draws on the terminal, such as a progress bar."""
    return cast("TextIO", getattr(stream, "rich_proxied_file", stream))


class Guarded:
    """A text stream that shows control codes and redacts secrets; rich, which draws bars and help, goes past it by its attribute."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """As a stream does. What begins with a return is a progress bar of a library, which stays in its line."""
        bar = "\r" if text.startswith("\r") else ""
        return self.rich_proxied_file.write(bar + shown(redacted(text[len(bar) :])))

    def writelines(self, lines: Any) -> None:
        """As a stream does."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def guarded() -> Iterator[None]:
    """Everything printed meanwhile goes through `Guarded`."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None or isinstance(stream, Guarded):
            continue
        if "reconfigure" in dir(stream):
            stream.reconfigure(errors="backslashreplace")  # where a terminal lacks a character
        setattr(sys, name, Guarded(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook that redacts secrets in uncaught errors: libraries put addresses and headers into their errors."""
    print(shown(redacted("".join(traceback.format_exception(kind, error, trace)))), end="", file=sys.stderr)
