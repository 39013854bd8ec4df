"""Values from other programs' files, checked before anything is built of them: each error in one line under the file's own names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import pydantic

from ldm.config.errors import UserError
from ldm.config.messages import wanted
from ldm.config.schema import adapter

T = TypeVar("T")


def typed(values: Mapping[str, Any], kind: type[T], where: str, names: Mapping[str, str] | None = None) -> T:
    """A configuration class of plain values.

    Args:
        values: by the names of the class' fields.
        kind: the class.
        where: the file they are from.
        names: the file's names of fields, where they are others.

    Raises:
        UserError: naming the file, the field, its value and what is allowed.
    """
    names = names or {}
    try:
        return adapter(cast("type", kind)).validate_python(dict(values))
    except pydantic.ValidationError as error:
        problems = error.errors()
        own = str(problems[0]["loc"][0]) if problems[0]["loc"] else ""
        if not own or problems[0]["type"] == "value_error":  # of several fields together
            said = str(problems[0].get("ctx", {}).get("error", problems[0]["msg"]))
            for ours, theirs in names.items():
                said = re.sub(rf"\b{ours}\b", theirs, said)
            raise UserError(f"{where}: {said}") from None
        allowed = dict.fromkeys(wanted(problem) for problem in problems if str(problem["loc"][0]) == own)
        given = problems[0]["input"] if isinstance(problems[0]["loc"][-1], int) else values.get(own)
        raise UserError(f"{where}: {names.get(own, own)} is {short(given)}; it should {', or '.join(allowed)}") from None


def short(value: Any) -> str:
    """A value in at most 80 characters that any terminal can show."""
    text = ascii(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
