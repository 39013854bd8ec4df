"""Redaction: values of environment variables with secret names, passwords in URLs, and, of what is kept, where it was made."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

# Words of a name, between underscores, and what its last word ends with.
NAMES = re.compile(
    r"(?i)(?:^|_)(?:api_?keys?|access_?keys?|key|pat|pass|pwd|credentials?|auth|dsn|jwt|sas|cookie|webhook|connection_string)(?:_|$)"
    r"|(?:token|secret|password|passwd|passphrase|webhook|apikey|authtoken)s?(?:_|$)"
)
ADDRESS = re.compile(r"(?<![a-zA-Z0-9+.-])([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@:'\"]*:[^/\s@'\"]+@")
SIGNED = re.compile(r"(?i)([?&](?:[\w-]*(?:signature|token|password|secret|credential|api_?key)|sig)=)[^&\s'\"#]+")
ABSOLUTE = re.compile(r"(?<![\w/\\.~:…])(?:[A-Za-z]:[\\/]|/)(?:[^\s/\\'\",;:()<>|*?\[\]{}]+[/\\])+(?=[^\s/\\'\",;:()<>|*?\[\]{}])")
HIDDEN = "***"
SHORTEST = 8  # characters of a value that is looked for; shorter ones would hide half of every text


def secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values of environment variables whose names say that they are secret, and passwords in addresses of any, longest first."""
    given = os.environ if environment is None else environment
    found = {value.strip() for name, value in given.items() if NAMES.search(name)}
    found = {value for value in found if len(value) >= SHORTEST and not os.path.exists(value)}
    for value in given.values():
        if "://" in value and (address := ADDRESS.search(value)):
            password = address[0][len(address[1]) : -1].partition(":")[2]
            found |= {password} if len(password) >= SHORTEST else set()
    return sorted(found, key=len, reverse=True)


@cache
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    """Finds values as they stand, and quoted as in URLs, in JSON and in Python's texts, in whole or in part."""
    return re.compile("|".join("".join(map(_spellings, value)) for value in values) or "(?!)")


@cache
def _spellings(character: str) -> str:
    """A regular expression of the ways in which a character is written."""
    if character.isascii() and character.isalnum():
        return character
    quoted = "".join(f"%{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
    ways = [re.escape(character), f"(?i:{quoted})", rf"\\+{re.escape(character)}", rf"(?i:\\u{ord(character):04x})"]
    return f"(?:{'|'.join([*ways, *([re.escape('+')] if character == ' ' else [])])})"


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with everything secret replaced by ***."""
    text = _pattern(tuple(secrets(environment))).sub(HIDDEN, text)
    return SIGNED.sub(rf"\1{HIDDEN}", ADDRESS.sub(rf"\1{HIDDEN}@", text))


def unplaced(text: str) -> str:
    """The text without where it was made: of absolute paths the last part stays, and this machine has no name."""
    for folder, instead in ((os.getcwd(), ""), (os.path.expanduser("~"), "~/")):
        if len(folder) > 1:
            text = text.replace(f"{folder}{os.sep}", instead)
    host = socket.gethostname()
    if len(host) > 3 and host != "localhost":
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", HIDDEN, text)
    return ABSOLUTE.sub("…/", text)


def cleaned(value: Any) -> Any:
    """A tree of mappings and sequences with every text in it redacted, and without where it was made."""
    if isinstance(value, str):
        return unplaced(redacted(value))
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
