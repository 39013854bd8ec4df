"""Presets: network configurations that have a name, each a YAML file beside whose values a run may write its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ldm.config.errors import UserError
from ldm.config.introspection import members_of, without_annotation
from ldm.config.yaml_reader import parse

T = TypeVar("T", bound=type)

WORD = "preset"  # the field that names a preset where others stand beside it
HERE = Path(__file__).parent
FOLDERS = (HERE / "models", HERE.parents[1] / "configs" / "models")  # in an installed package, in a checkout


def named(word: str) -> Callable[[T], T]:
    """Files in configs/models that say `of: word` hold configurations of the decorated class."""

    def mark(cls: T) -> T:
        cls.__presets__ = word  # type: ignore[attr-defined]
        return cls

    return mark


def names(kind: Any) -> dict[str, Path]:
    """The presets of a configuration class, or of a union's members, and their files."""
    return {name: file for name, file in _files().items() if _of(file) in _owners(kind)} if _owners(kind) else {}


def chosen(kind: Any, data: Any) -> tuple[Path, dict[str, Any]] | None:
    """The file of the preset that a value names, and the fields beside it; None where it names none of this kind."""
    if isinstance(data, Mapping):
        word, beside = data.get(WORD), {name: value for name, value in data.items() if name != WORD}
    else:
        word, beside = data, {}
    file = _files().get(word) if isinstance(word, str) and _owners(kind) else None
    if file is None or _of(file) not in _owners(kind):
        return None
    member = _owners(kind)[_of(file)]
    if beside.get("kind", member) not in (member, ""):  # a word has chosen another kind of network
        return None
    return file, ({"kind": member} if member else {}) | beside


def _owners(kind: Any) -> dict[str, str]:
    """The words that preset files of a type say in `of`, and the kind of the union's member that each means."""
    kind = without_annotation(kind)
    classes = members_of(kind) or ({"": kind} if dataclasses.is_dataclass(kind) else {})
    return {cls.__presets__: member for member, cls in classes.items() if "__presets__" in vars(cls)}


@cache
def _files() -> dict[str, Path]:
    folder = next((f for f in FOLDERS if f.is_dir()), None)
    return {} if folder is None else {file.stem: file for file in sorted(folder.glob("*.yaml"))}


@cache
def _of(file: Path) -> str:
    try:
        values = parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError, UserError):
        return ""
    if not isinstance(values, dict):
        return ""
    base = values.get("base")
    return str(values["of"]) if "of" in values else _of(file.parent / base) if isinstance(base, str) else ""
