"""Records: JSON that a run keeps of itself, read as plain values of bounded depth, and checked by a dataclass."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ldm.config.errors import UserError, first_line
from ldm.config.schema import build

T = TypeVar("T")
DEEPEST = 64  # objects and lists inside each other
DEEP = f"more than {DEEPEST} levels inside each other"
LARGEST = 1e300  # what no count, time or loss of a run exceeds


class Damaged(ValueError):
    """Integrity error: a file or folder is incomplete, changed, or not what it was written as."""


def parse(raw: bytes) -> Any:
    """The value of a JSON text; halves of characters (lone surrogates), which no file can be written with, become question marks.

    Raises:
        ValueError: for anything else, whatever the bytes are.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError(DEEP) from None
    # Each level has its bracket: most texts need no walk.
    if raw.count(b"{") + raw.count(b"[") > DEEPEST and _deep(value):
        raise ValueError(DEEP)
    return _whole(value) if b"\\u" in raw else value


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [entry for one in level for entry in _entries(one)]
    return bool(level)


def _entries(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_whole(name): _whole(entry) for name, entry in value.items()}
    return [_whole(entry) for entry in value] if isinstance(value, list) else value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        Damaged: naming the file, for anything else.
    """
    try:
        value = parse(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise Damaged(f"{path}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path}: a JSON object was expected, got {type(value).__name__}")
    return value


def read_as(path: Path, kind: type[T]) -> T:
    """The object in a JSON file as a configuration class, each field of its type and within its bounds.

    Raises:
        FileNotFoundError, Damaged: as `read_object`, and naming the first field that is wrong.
    """
    try:
        return build(read_object(path), kind, str(path))
    except UserError as error:
        raise Damaged(first_line(error, 1000)) from None


def number(value: Any) -> float | None:
    """A finite number as it is, None for anything else."""
    if type(value) is float and -LARGEST < value < LARGEST:  # as most are, and a log has millions
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping with texts as keys; an empty one for anything else."""
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping."""
    return {name: found for name, each in mapping(value).items() if (found := number(each)) is not None}
