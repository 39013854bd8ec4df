"""Configuration classes read by their types: members of a union, the type and default of each field."""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Annotated, Any, Union


def without_annotation(kind: Any) -> Any:
    """The type inside Annotated."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def members_of(kind: Any) -> dict[str, Any]:
    """The dataclasses of a union by their `kind`, or nothing."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return {}
    classes = [c for c in map(without_annotation, typing.get_args(kind)) if dataclasses.is_dataclass(c)]
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
