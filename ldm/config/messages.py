"""Error messages and help of a configuration: each validation error in one line, every field with its meaning."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from io import StringIO
from typing import Any, Literal, Union

from ldm.config.introspection import PRESET, branches_of, default_of, hints_of, members_of, preset_names, without_annotation, without_null
from ldm.config.synonyms import COUNTED, FIELDS, field_meant

_WANTED = {
    "string_type": "a text, in quotes where it looks like something else",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list, such as [1, 2]",
    "list_type": "a list, such as [1, 2]",
    "dict_type": "a mapping, such as {name: value}",
    "dataclass_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "mapping_type": "a mapping of fields",
}


def explain(problem: Mapping[str, Any], data: Any, kind: Any) -> str:
    """A pydantic validation error as one line: path, value, what is allowed."""
    steps, tag, owner, root = [], problem["type"], kind, kind
    here: Any = data
    above: Any = None
    for step in problem["loc"]:
        if isinstance(here, Mapping) and step not in here and step == here.get("kind"):
            continue  # pydantic's name for the member of a union
        if len(branches_of(kind)) > 1 and not members_of(kind):
            kind = next((one for one in branches_of(kind) if typing.get_origin(one) is tuple), None)
            continue  # pydantic's name for a type of a union
        owner, above = _chosen(kind, here), here
        kind = _inside(owner, step)
        known = (isinstance(here, Mapping) and step in here) or (isinstance(here, list) and isinstance(step, int) and step < len(here))
        here = here[step] if known else None
        steps.append(str(step))
    path, allowed = ".".join(steps), list(members_of(without_annotation(kind)))
    if said := _no_preset(problem, kind, owner, path):
        return said
    # The entries of a mapping of which one may be meant where a name is not known.
    entries = [n for n in above if n != steps[-1]] if typing.get_origin(owner) is dict and isinstance(above, Mapping) else []
    if tag in ("unexpected_keyword_argument", "extra_forbidden"):
        names = list(hints_of(owner)) if dataclasses.is_dataclass(owner) else []
        own = FIELDS.get(steps[-1], "")
        elsewhere = "" if own in names else field_meant(steps[-1], [at for at in _paths(root) if at.count(".") + 1 != len(steps)])
        here_too = f"; that is {own}{COUNTED.get(own, '')}" if own in names else _nearest(steps[-1], names, "known are")
        return f"{path}: unknown field{elsewhere or here_too}"
    if said := getattr(problem["input"], "problem", ""):
        return f"{path}: got {_short(problem['input'])}: {said}"
    if entries and here is None:
        return f"{path}: null removes an entry, but there is none of this name{_nearest(steps[-1], entries, 'there are')}"
    if tag.startswith("missing"):
        return f"{path}: required, but not given"
    if tag == "union_tag_invalid":
        given = here.get("kind") if isinstance(here, Mapping) else here
        return f"{path}.kind: got {given!r}{_nearest(given, allowed, 'allowed are')}"
    if tag == "union_tag_not_found" and not isinstance(here, Mapping | None):
        return f"{path}: got {_short(here)}; it should be a mapping of fields (kind: {', '.join(allowed)})"
    if tag == "union_tag_not_found":
        meant = difflib.get_close_matches(steps[-1], entries, 1, 0.7) if isinstance(here, Mapping) and steps else []
        hint = f"; did you mean {'.'.join([*steps[:-1], *meant])}?" if meant else ""
        return f"{path}.kind: required, but not given{hint} (allowed are {', '.join(allowed)})"
    if tag == "literal_error":
        names = [str(name) for name in typing.get_args(without_annotation(kind))]
        return f"{path}: got {_short(problem['input'])}{_nearest(problem['input'], names, 'allowed are')}"
    if tag == "value_error":
        text = str(problem["ctx"]["error"])
        return f"{path}: {text}" if path else text
    return f"{path or 'configuration'}: got {_short(problem['input'])}; it should {wanted(problem)}"


def wanted(problem: Mapping[str, Any]) -> str:
    """What a value should be, of a pydantic validation error."""
    message = problem["msg"].removeprefix("Input should ").removeprefix("Value should ")
    return f"be {_WANTED[problem['type']]}" if problem["type"] in _WANTED else message[0].lower() + message[1:]


def _paths(kind: Any) -> list[str]:
    """The paths of all fields below a configuration class; none of what is no class, or has no source."""
    with contextlib.suppress(OSError, TypeError):
        return [path for path, *_ in fields_of(kind)]
    return []


def _no_preset(problem: Mapping[str, Any], kind: Any, owner: Any, path: str) -> str:
    """What to say of a word that names no preset where presets have names; nothing elsewhere."""
    given = problem["input"]
    if path.rpartition(".")[2] == PRESET and dataclasses.is_dataclass(owner):
        kind = owner
    elif not isinstance(given, str):
        return ""
    known = list(preset_names(kind))
    return f"{path}: got {_short(given)}{_nearest(given, known, 'presets are')}" if known else ""


def _nearest(given: Any, names: list[str], otherwise: str) -> str:
    if not names:
        return ""
    near = difflib.get_close_matches(str(given), names, 1, 0.5)
    found = f"; did you mean {near[0]}?" if near else ""
    return f"{found} ({otherwise} {', '.join(names)})" if found else f"; {otherwise} {', '.join(names)}"


def _chosen(kind: Any, here: Any) -> Any:
    """The member of a union that the data chooses, or the type itself."""
    members = members_of(kind)
    if not members:
        return without_null(kind)
    return members.get(str(here.get("kind"))) if isinstance(here, Mapping) else None


def _inside(kind: Any, step: Any) -> Any:
    """The type of one entry of a dataclass, mapping or tuple."""
    if dataclasses.is_dataclass(kind):
        return hints_of(kind).get(step)
    arguments = typing.get_args(kind)
    return arguments[-1] if typing.get_origin(kind) is dict else arguments[0] if arguments else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Help


def describe(kind: Any) -> str:
    """Help text: every field below a configuration class, one line each: path, type, default, meaning."""
    lines = []
    for path, type_name, default, meaning in fields_of(kind):
        shown = "required" if default is dataclasses.MISSING else _literal(default)
        head = f"  {path:<44} {type_name:<26} {shown}"
        lines.append(f"{head}\n{'':<8}{meaning}" if meaning else head)
    return "\n".join(lines)


def fields_of(kind: Any, path: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(path, type, default, meaning) of every field below a configuration class, the members of unions in turn."""
    said = _comments(kind)
    for name, hint in hints_of(kind).items():
        where, default = f"{path}{name}", default_of(kind, name)
        inner = without_annotation(hint)
        if typing.get_origin(inner) in (dict, tuple):
            mapping = typing.get_origin(inner) is dict
            entry = without_annotation(typing.get_args(inner)[-1 if mapping else 0])
            if _branches(entry):
                where, inner = f"{where}.NAME" if mapping else f"{where}[]", entry
        branches = _branches(inner)
        if not branches:
            if name == "kind" and typing.get_origin(inner) is Literal and len(typing.get_args(inner)) == 1:
                continue  # says which class this is; a choice only where a union names several
            yield where, type_name(inner), default, said.get(name, "")
        elif "" in branches:
            usual = "null" if default is None else default if default is dataclasses.MISSING else ""
            yield where, "", usual, said.get(name, "")
            yield from fields_of(branches[""], f"{where}.")
        else:
            yield f"{where}.kind", " | ".join(branches), getattr(default, "kind", ""), said.get(name, "")
            for word, member in branches.items():
                for at, type_said, usual, meaning in fields_of(member, f"{where}."):
                    yield at, type_said, usual, f"[{word}] {meaning}"


def _branches(kind: Any) -> dict[str, Any]:
    kind = without_null(kind)
    return {"": kind} if dataclasses.is_dataclass(kind) else members_of(kind)


def type_name(kind: Any) -> str:
    """A type's name in YAML's terms."""
    kind = without_annotation(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    if origin is tuple:
        inner = [type_name(a) for a in arguments if a is not ...]
        return f"[{inner[0]}, ...]" if ... in arguments else f"[{', '.join(inner)}]"
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    plain = {"str": "text", "NoneType": "null", "int": "integer", "float": "number", "bool": "true | false"}
    return plain.get(kind.__name__, kind.__name__)


def _literal(value: Any) -> str:
    if value == "":
        return '""' if isinstance(value, str) else ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


@cache
def _comments(kind: Any) -> dict[str, str]:
    """The comment behind each field's definition in the source of its class."""
    above: list[Any] = [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)]
    source = textwrap.dedent(inspect.getsource(kind))
    by_line = {
        token.start[0]: token.string.lstrip("# ").split("  # ")[0]
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, str] = {name: said for base in reversed(above) for name, said in _comments(base).items()}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in by_line:
            found[node.target.id] = by_line[node.end_lineno]
    return found
