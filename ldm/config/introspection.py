"""Configuration classes by their types: members of a union, fields, defaults, and named presets (YAML files)."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from ldm.config.errors import UserError
from ldm.config.yaml_reader import parse


def without_annotation(kind: Any) -> Any:
    """The type inside Annotated."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def branches_of(kind: Any) -> tuple[Any, ...]:
    """The types of a union, null left out, unions within it spelt out; of any other type itself."""
    kind = without_annotation(kind)
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return (kind,) if kind is not types.NoneType else ()
    return tuple(branch for one in typing.get_args(kind) for branch in branches_of(one))


def without_null(kind: Any) -> Any:
    """The type inside Annotated and beside null; a union stays one."""
    branches = branches_of(kind)
    return branches[0] if len(branches) == 1 else without_annotation(kind)


def members_of(kind: Any) -> dict[str, Any]:
    """The dataclasses of a union by their `kind`, or nothing."""
    branches = branches_of(kind)
    classes = [branch for branch in branches if dataclasses.is_dataclass(branch)] if len(branches) > 1 else []
    return {str(c.__dataclass_fields__["kind"].default): c for c in classes if "kind" in c.__dataclass_fields__}


@cache
def _hints_of(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def hints_of(kind: Any) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return _hints_of(kind)


def default_of(kind: Any, name: str) -> Any:
    """The default of a dataclass's field, or dataclasses.MISSING."""
    field = kind.__dataclass_fields__[name]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


T = TypeVar("T", bound=type)

PRESET = "preset"  # the field that names a preset where others stand beside it
PACKAGE = Path(__file__).parents[1]
CONFIGS = next((folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()), None)  # in a wheel, in a clone


def named(word: str) -> Callable[[T], T]:
    """Decorator: files in configs/models that say `of: word` are presets of the decorated class."""

    def mark(cls: T) -> T:
        cls.__presets__ = word  # type: ignore[attr-defined]
        return cls

    return mark


def preset_names(kind: Any) -> dict[str, Path]:
    """The presets of a configuration class, or of a union's members, and their files."""
    return {name: file for name, file in _files().items() if _of(file) in _owners(kind)} if _owners(kind) else {}


def chosen_preset(kind: Any, data: Any) -> tuple[Path, dict[str, Any]] | None:
    """The file of the preset that a value names, and the fields beside it; None where it names none of this kind."""
    if isinstance(data, Mapping):
        word, beside = data.get(PRESET), {name: value for name, value in data.items() if name != PRESET}
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
    return {} if CONFIGS is None else {file.stem: file for file in sorted((CONFIGS / "models").glob("*.yaml"))}


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
