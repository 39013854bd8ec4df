"""Help of a configuration: every field with its type, value, default and meaning, part by part."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import linecache
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Literal, Union

from ldm.config.errors import UserError
from ldm.config.introspection import default_of, hints_of, members_of, without_annotation, without_null
from ldm.config.synonyms import FIELDS

GENERAL = "NAME"  # stands for the name of any entry of a mapping
MISSING: Any = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Row:
    """A field: where it stands, what it may be, what it is, and the kinds that must be chosen for it to be there."""

    path: str
    type: str
    default: Any
    given: Any  # the configuration's own value; MISSING where it says none
    kinds: tuple[str, ...]
    owner: Any  # the class that has it
    name: str

    @property
    def meaning(self) -> str:
        """The comment beside it in its class."""
        return _comments(self.owner).get(self.name, "")


def describe(kind: Any, given: Any = MISSING, part: str = "") -> str:
    """Help text of a configuration class.

    Args:
        kind: the class.
        given: a configuration's plain values, with presets and kinds spelt out; without it entries of mappings are called NAME.
        part: a path whose fields alone are described, every kind of them; empty: everything, and a configuration's own parts with the
            kinds that they and what is in them are.

    Raises:
        UserError: for a part that is not there, naming the nearest ones.
    """
    sections = list(_sections(kind, given))
    if part:
        found = [row for _, rows in sections for row in rows if _within(row.path, part)]
        if not found:
            sections = list(_sections(kind, MISSING))
            found = [
                row for _, rows in sections for row in rows if _within(row.path, part if given is not MISSING else _general(part, kind))
            ]
        return _section(part, found) if found else _no_part(part, kind, given)
    own = [rows for head, rows in sections if not head]
    said = [_section("the run", [row for rows in own for row in rows])]
    said += [_section(head, _chosen(rows, given)) for head, rows in sections if head]
    return "\n\n".join(said)


def fields_of(kind: Any) -> Iterator[tuple[str, str, Any, str]]:
    """(path, type, default, meaning) of every field below a configuration class, the members of unions in turn."""
    for row in _rows(kind, "", MISSING, ()):
        yield row.path, row.type, row.default, f"{_labels(row.kinds)}{row.meaning}"


def paths_of(kind: Any) -> list[str]:
    """The paths of all fields below a configuration class; none of what is no class."""
    return [row.path for row in _rows(kind, "", MISSING, ())] if dataclasses.is_dataclass(kind) else []


def _sections(kind: Any, given: Any) -> Iterator[tuple[str, list[Row]]]:
    """The parts of a class, by path, and their rows; the plain fields under no path."""
    for name in hints_of(kind):
        for path, rows in groupby(_field(kind, name, "", given, ()), lambda row, name=name: _part(row.path, name, kind)):  # type: ignore[misc]
            yield path, list(rows)


def _chosen(rows: Sequence[Row], given: Any) -> list[Row]:
    """The rows of a part that are there with the kinds that the configuration chooses, of what is within it too; all without one.

    What is not there and may be, such as an optional block, has the fields of every kind.
    """
    if given is MISSING:
        return list(rows)
    chosen: dict[tuple[str, tuple[str, ...]], Any] = {}  # by where a kind stands and the kinds around it
    found: list[Row] = []
    for row in rows:
        around = [
            max((at for at in chosen if at[1] == row.kinds[:n] and row.path.startswith(at[0])), default=None) for n in range(len(row.kinds))
        ]
        if all(at is None or chosen[at] in ("", kind) for at, kind in zip(around, row.kinds, strict=True)):
            found.append(row)
            if row.path.endswith(".kind"):
                kind = row.default if row.given is MISSING else row.given
                chosen[row.path.removesuffix("kind"), row.kinds] = kind if isinstance(kind, str) else ""
    return found


def _part(path: str, name: str, kind: Any) -> str:
    """The part that a path belongs to: an entry of a mapping, a block, or none."""
    if path == name and not _branches(hints_of(kind)[name]):
        return ""
    return ".".join(path.split(".")[:2]) if typing.get_origin(without_annotation(hints_of(kind)[name])) is dict else name


def _rows(kind: Any, path: str, given: Any, kinds: tuple[str, ...]) -> Iterator[Row]:
    for name in hints_of(kind):
        yield from _field(kind, name, path, given, kinds)


def _field(kind: Any, name: str, path: str, given: Any, kinds: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a field, of everything within it, too."""
    inner, default = without_annotation(hints_of(kind)[name]), default_of(kind, name)
    where, value = f"{path}{name}", given.get(name, MISSING) if isinstance(given, Mapping) else MISSING
    places = [(where, value)]
    if (origin := typing.get_origin(inner)) in (dict, tuple):
        entry = without_annotation(typing.get_args(inner)[-1 if origin is dict else 0])
        if _branches(entry):
            inner, places = entry, [(f"{where}.{GENERAL}" if origin is dict else f"{where}[]", MISSING)]
            if isinstance(value, Mapping | list | tuple) and value:
                named = value.items() if isinstance(value, Mapping) else enumerate(value)
                places = [(f"{where}.{entry}", one) for entry, one in named]
    for where, value in places:
        branches = _branches(inner)
        if not branches:
            if name == "kind" and typing.get_origin(inner) is Literal and len(typing.get_args(inner)) == 1:
                continue  # says which class this is; a choice only where a union names several
            yield Row(where, type_name(inner), default, value, kinds, kind, name)
        elif "" in branches:
            usual = "null" if default is None else default if default is MISSING else ""
            yield Row(where, "", usual, MISSING, kinds, kind, name)
            yield from _rows(branches[""], f"{where}.", value, kinds)
        else:
            usual = getattr(default, "kind", "") if default else default
            chosen = value.get("kind", MISSING) if isinstance(value, Mapping) else MISSING
            yield Row(f"{where}.kind", " | ".join(branches), usual, chosen, kinds, kind, name)
            # An entry of a list is of the kind that it is; what else it might be stands where there is none.
            for word in [chosen] if origin is tuple and chosen in branches else sorted(branches, key=lambda word: word != chosen):
                yield from _rows(branches[word], f"{where}.", value if word == chosen else MISSING, (*kinds, word))


def _within(path: str, part: str) -> bool:
    return path == part or path.startswith((f"{part}.", f"{part}[]"))


def _general(part: str, kind: Any) -> str:
    """A part with NAME in place of an entry's name, where nothing says which names there are."""
    first, *rest = part.split(".")
    mapping = typing.get_origin(without_annotation(hints_of(kind).get(first))) is dict
    return ".".join([first, GENERAL, *rest[1:]]) if mapping and rest else part


def _no_part(part: str, kind: Any, given: Any) -> str:
    """Refuse a part that is not there.

    Raises:
        UserError: always, naming the nearest parts.
    """
    sections = list(_sections(kind, given))
    # What the configuration has comes before what it might have.
    rows = [row for _, rows in sections for row in _chosen(rows, given)] + [row for _, rows in sections for row in rows]
    known = list(dict.fromkeys(".".join(row.path.split(".")[:n]) for row in rows for n in range(1, row.path.count(".") + 2)))
    last = {path: path.rpartition(".")[2] for path in known}
    part_here = FIELDS.get(part, part)
    ends = difflib.get_close_matches(part.rpartition(".")[2], set(last.values()), 2, 0.75)
    near = [path for path in known if path.endswith(f".{part_here}")] or difflib.get_close_matches(part, known, 3, 0.7)
    near = near or [path for path in known if last[path] in ends]
    near = [path for n, path in enumerate(near) if not any(_within(path, one) or _within(one, path) for one in near[:n])][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"parts are {', '.join(path for path in known if '.' not in path)}"
    raise UserError(f"--help {part}: no such part; {hint}")


def _section(head: str, rows: Sequence[Row]) -> str:
    """Rows below a heading, those that only one kind has below the kind's own."""
    first, last = min(row.kinds for row in rows), max(row.kinds for row in rows)
    shared = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    lines, kind = [head], ""
    for row in rows:
        if row.kinds[shared : shared + 1] != ((kind,) if kind else ()):
            kind = row.kinds[shared] if len(row.kinds) > shared else ""
            lines += ["", f"{head} (kind {kind})" if kind else head]
        shown = _shown(row)
        line = f"  {row.path:<44} {row.type:<26}  {shown}".rstrip()
        meaning = f"{_labels(row.kinds[shared + 1 :])}{row.meaning}"
        lines += [line, *([f"{'':<8}{meaning}"] if meaning else [])]
    return "\n".join(lines)


def _labels(kinds: Sequence[str]) -> str:
    return "".join(f"[{kind}] " for kind in kinds)


def _shown(row: Row) -> str:
    """A row's value, and its default where that is another."""
    usual = "required" if row.default is MISSING else _literal(row.default)
    given = usual if row.given is MISSING else _literal(row.given)
    return given if given == usual or not usual else f"{given}   ({usual if row.default is MISSING else f'default {usual}'})"


def _branches(kind: Any) -> dict[str, Any]:
    kind = without_null(kind)
    return {"": kind} if dataclasses.is_dataclass(kind) else members_of(kind)


def type_name(kind: Any) -> str:
    """A type's name in YAML's terms."""
    kind = without_annotation(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(str(one) or '""' for one in arguments)
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
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_literal(one)}' for name, one in value.items())}}}"
    return f"[{', '.join(map(_literal, value))}]" if isinstance(value, tuple | list) else str(value)


# What is meant, from the source


@cache
def _comments(kind: Any) -> dict[str, str]:
    """The comment behind each field's definition in the source of its class and of those that it inherits fields from."""
    found: dict[str, str] = {}
    classes_of_it: list[Any] = [cls for cls in reversed(kind.__mro__) if dataclasses.is_dataclass(cls)]
    for cls in classes_of_it:
        lines, classes = _source(cls.__module__)
        for node in classes[cls.__qualname__].body if cls.__qualname__ in classes else ():
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                _, _, comment = lines[(node.end_lineno or 1) - 1][node.end_col_offset or 0 :].partition("# ")
                if comment:
                    found[node.target.id] = comment.split("  # ")[0].strip()
    return found


@cache
def _source(module: str) -> tuple[list[str], dict[str, ast.ClassDef]]:
    """The lines of a module, and its classes by qualified name."""
    lines = linecache.getlines(sys.modules[module].__file__ or "")
    found: dict[str, ast.ClassDef] = {}

    def look(node: ast.AST, path: str) -> None:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ClassDef):
                found[path + inner.name] = inner
            if isinstance(inner, ast.ClassDef | ast.FunctionDef):
                look(inner, f"{path}{inner.name}." + ("<locals>." if isinstance(inner, ast.FunctionDef) else ""))

    look(ast.parse("".join(lines)), "")
    return lines, found
