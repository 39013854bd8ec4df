"""Redaction of secrets: values of environment variables with secret names, and passwords in URLs."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

NAMES = re.compile(r"(?i)(^|_)(api_?key|access_?key|key|token|secret|password|passwd|pwd|credentials?|auth)(_|$)")
ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@:'\"]*:[^/\s@'\"]+@")
SIGNED = re.compile(r"(?i)([?&](?:[\w-]*(?:signature|token|password|secret|credential|api_?key)|sig)=)[^&\s'\"#]+")
HIDDEN = "***"
SHORTEST = 8  # characters of a value that is looked for; shorter ones would hide half of every text


def secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of environment variables whose names say that they are secret, longest first."""
    given = os.environ if environment is None else environment
    found = {value.strip() for name, value in given.items() if NAMES.search(name) and len(value.strip()) >= SHORTEST}
    return sorted((value for value in found if not os.path.exists(value)), key=len, reverse=True)


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with everything secret replaced by ***."""
    for value in secrets(environment):
        text = text.replace(value, HIDDEN)
    return SIGNED.sub(rf"\1{HIDDEN}", ADDRESS.sub(rf"\1{HIDDEN}@", text))


def cleaned(value: Any) -> Any:
    """A tree of mappings and sequences with every text in it redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {name: cleaned(entry) for name, entry in value.items()}
    return [cleaned(entry) for entry in value] if isinstance(value, list | tuple) else value


def exposed(values: Any, path: str = "") -> Iterator[str]:
    """The paths of the texts in a tree of mappings and sequences that hold something secret."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from exposed(value, f"{path}.{name}" if path else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(values):
            yield from exposed(value, f"{path}[{number}]")
    elif isinstance(values, str) and redacted(values) != values:
        yield path


def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook that redacts secrets in uncaught errors: libraries put addresses and headers into their errors."""
    print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
