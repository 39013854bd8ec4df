"""Configuration: YAML and key=value overrides to a validated, frozen dataclass tree, and back."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
import os
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, dataclass_transform

import pydantic
import yaml
from pydantic_core import PydanticCustomError, PydanticKnownError

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.introspection import (
    CONFIGS,
    PRESET,
    chosen_preset,
    default_of,
    hints_of,
    members_of,
    named,
    without_annotation,
    without_null,
)
from ldm.config.messages import explain
from ldm.config.terminal import is_text
from ldm.config.yaml_reader import DEEPEST, LARGEST, Flag, Text, Written, parse, sourced, spoken

__all__ = [
    "BY_KIND",
    "Codes",
    "Count",
    "Decay",
    "Depth",
    "Finite",
    "Fraction",
    "NonNegative",
    "PathGiven",
    "PathText",
    "Pixels",
    "Positive",
    "PositiveFloat",
    "Share",
    "Side",
    "Steps",
    "Width",
    "adapter",
    "build",
    "config",
    "dump",
    "load",
    "merge",
    "named",
    "plain",
    "read",
    "resolved",
]

T = TypeVar("T")

_KINDS: ContextVar[frozenset[str] | None] = ContextVar("kinds", default=None)  # that a validator is made for; None: every one


class _ByKind:
    """Tells the members of a union apart by `kind`. A validator for some kinds alone knows no other member: most are never chosen."""

    def __get_pydantic_core_schema__(self, source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        kinds, members = _KINDS.get(), members_of(source)
        if kinds is not None and members:
            found = [cls for kind, cls in members.items() if kind in kinds]
            if not found:
                return {"type": "function-plain", "function": {"type": "no-info", "function": _not_chosen}}
            source = functools.reduce(operator.or_, [*found, *([None] if type(None) in typing.get_args(source) else [])])
        return handler(Annotated[source, pydantic.Field(discriminator="kind")])


def _not_chosen(value: Any) -> Any:
    """Refuse as pydantic's union does a value that chooses no member."""
    if not isinstance(value, Mapping | Written):  # one that keeps its text has attributes, among which pydantic looks for a kind
        raise PydanticKnownError("model_attributes_type")
    raise PydanticCustomError(
        "union_tag_invalid" if isinstance(value, Mapping) and "kind" in value else "union_tag_not_found", "Input should be of another kind"
    )


BY_KIND = _ByKind()
Positive = Annotated[int, pydantic.Field(gt=0)]
Width = Annotated[int, pydantic.Field(gt=0, le=2**16)]  # channels of a layer, or its groups and heads
Depth = Annotated[int, pydantic.Field(gt=0, le=2**8)]  # how often a block is repeated
Codes = Annotated[int, pydantic.Field(gt=0, le=2**24)]  # entries of a table: of words, places or a codebook
Steps = Annotated[int, pydantic.Field(gt=0, le=100_000)]  # noise levels of a table
Side = Annotated[int, pydantic.Field(gt=0, le=2**10)]  # latents or patches along a side
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Count = Annotated[int, pydantic.Field(ge=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
Share = Annotated[float, pydantic.Field(gt=0, lt=1)]  # neither nothing nor all
Decay = Annotated[float, pydantic.Field(ge=0, lt=1)]  # of a running mean: with 1 it would never take anything in
Pixels = Annotated[int, pydantic.Field(gt=0, le=2**16)]  # along a side of a picture
PathText = Annotated[str, pydantic.AfterValidator(os.path.expanduser)]  # a file, folder or pattern, ~ for the home folder; or none
PathGiven = Annotated[str, pydantic.Field(min_length=1), pydantic.AfterValidator(os.path.expanduser)]  # the same; an empty word is none


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Decorator of configuration classes: a frozen, slotted, keyword-only dataclass that forbids unknown fields."""
    made: Any = dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)
    made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return made


# Reading

MOST_BASES = 20  # files that stand on each other


def load(path: Path, words: Sequence[str], kind: type[T]) -> T:
    """The validated tree of a YAML file with overrides such as `optim.lr=3e-4`.

    The file may name one `base:` file, beside which it is laid; mappings are merged, all else is replaced, null removes an
    entry. Where `kind` changes, the new kind takes over the fields that both have, and the others are dropped. The order
    of words matters only where two set the same field: the later one holds.

    Raises:
        UserError: telling every mistake at once, each with its path, its value and what is allowed.
    """
    return build(read(path, words), kind, str(path))


def configuration(name: str | Path) -> Path:
    """The YAML file that a word names: itself, the one of a run folder, or one that comes with the package (configs/...).

    Raises:
        UserError: for a folder without one.
    """
    path = at_home(name)
    if path.is_dir():
        if (path / "config.yaml").is_file():
            return path / "config.yaml"
        raise UserError(f"{path}: a folder, and no run; name a YAML file, such as configs/quickstart.yaml (pictures: data.path={path})")
    if CONFIGS is not None and path.parts[:1] == (CONFIGS.name,) and not path.exists():
        kept = CONFIGS.joinpath(*path.parts[1:])
        return kept if kept.is_file() else path
    return path


def read(path: Path, words: Sequence[str]) -> dict[str, Any]:
    """The unvalidated values of a YAML file merged with its bases and overrides.

    Raises:
        UserError: for files and words that cannot be read, all such words at once.
    """
    above: Any = {}
    problems = []
    for word in words:
        name, sign, text = word.partition("=")
        parts = name.split(".")
        if not sign or not all(parts) or len(parts) > DEEPEST:
            problems.append(f"{word if len(word) <= 80 else f'{word[:77]}...'}: a word is written PATH=VALUE, such as seed=1")
            continue
        if not is_text(word):
            problems.append(f"{name}: {text[:80]} is not UTF-8, which a configuration is written in (half a character?)")
            continue
        value = spoken(text)
        for part in reversed(parts):
            value = {part: value}
        above = _together(above, value)
    if problems:
        raise UserError("\n".join(problems))
    return merge(_read(path, ()), above)


def said_twice(words: Sequence[str]) -> list[str]:
    """What to say of words that set a field which an earlier word has set to something else."""
    said: dict[str, str] = {}
    found = []
    for word in words:
        name, _, text = word.partition("=")
        if said.get(name, text) != text:
            found.append(f"{name}: said twice, as {said[name]} and as {text}; the later holds")
        said[name] = text
    return found


def _together(first: Any, second: Any) -> Any:
    """The words so far with one more: no kind gives way yet, no null has anything to remove."""
    if _numbered(first, second):
        return merge(first, second)
    first = _spelt_out(first, second)
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    return _as(second, first | {name: _together(first[name], value) if name in first else value for name, value in second.items()})


def _as(word: Any, value: Any) -> Any:
    """What became of a word, with its text: for a text field that is what counts, whatever it means as YAML."""
    return sourced(value, word.text) if isinstance(word, Written) else value


def build(data: Mapping[str, Any], kind: type[T], where: str) -> T:
    """Validation: the typed tree of plain values.

    Raises:
        UserError: telling every mistake at once, each line beginning with `where`.
    """
    data = resolved(data, kind)
    try:
        return adapter(cast("type", kind), frozenset(_kinds_in(data))).validate_python(data)
    except pydantic.ValidationError as error:
        lines = [explain(problem, data, kind) for problem in error.errors()]
        raise UserError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def _kinds_in(data: Any) -> Iterator[str]:
    """Every kind that is named anywhere in the data."""
    if isinstance(data, Mapping):
        if isinstance(kind := data.get("kind"), str):
            yield str(kind)
        data = list(data.values())
    for value in data if isinstance(data, list | tuple) else ():
        yield from _kinds_in(value)


@cache
def adapter(kind: type, kinds: frozenset[str] | None = None) -> pydantic.TypeAdapter[Any]:
    """Pydantic's validator of a type; of `kinds` alone in its unions, where given."""
    before = _KINDS.set(kinds)
    try:
        return pydantic.TypeAdapter(kind)
    finally:
        _KINDS.reset(before)


def merge(below: Any, above: Any) -> Any:
    """Deep merge of `above` over `below`: mappings field by field, lists by the number of an entry, null removes, all else replaces."""
    if _numbered(below, above):
        return _as(above, [merge(value, above[str(n)]) if str(n) in above else value for n, value in enumerate(below)])
    below = _spelt_out(below, above)
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if above.get("kind") is not None and above["kind"] != below.get("kind"):
        return _as(above, {**above, "kind": _Switched(above["kind"], below)})
    merged = dict(below)
    for name, value in above.items():
        if value is None and below.get(name) is not None:
            del merged[name]
        else:
            merged[name] = merge(merged[name], value) if name in merged else value
    return _as(above, merged)


def _spelt_out(below: Any, above: Any) -> Any:
    """A word below a mapping names a preset beside whose fields the mapping's are written."""
    named = isinstance(below, str) and not isinstance(below, _Switched) and isinstance(above, dict)
    return {PRESET: below} if named else below


def _numbered(below: Any, above: Any) -> bool:
    """Whether `above` is a mapping of changes to numbered entries of a list."""
    return isinstance(below, list) and isinstance(above, dict) and set(above) <= {str(n) for n in range(len(below))} and bool(above)


class _Switched(str):
    """A kind that was changed, with the fields of the former kind: the new one takes over those that it has, too."""

    below: dict[str, Any]

    def __new__(cls, kind: Any, below: dict[str, Any]) -> _Switched:
        made = super().__new__(cls, kind)
        made.below = below
        return made


def resolved(data: Any, kind: Any, default: Any = dataclasses.MISSING) -> Any:
    """The data with every preset spelt out and the kind of every union named, with what a changed kind takes over."""
    kind = without_null(kind)
    if isinstance(data, Written) and kind is str:
        return data.text
    if (found := chosen_preset(kind, data)) is not None:
        file, beside = found
        # The preset's values are of the kind beside them: no kind changes here.
        same = {name: beside[name] for name in ("kind",) if name in beside}
        data = merge({name: value for name, value in _read(file, ()).items() if name != "of"} | same, beside)
    members = members_of(kind)
    if isinstance(data, str) and (data in members or data == _only_kind(kind)):  # a kind's name alone: all its fields as usual
        data = {"kind": str(data)}
    if members and isinstance(data, Mapping):
        usual = getattr(default, "kind", None)
        chosen = data.get("kind", usual)
        kind = members.get(str(chosen))
        data = {**data, "kind": str(chosen)} if chosen is not None else data
        if isinstance(chosen, _Switched) and kind is not None:
            former = members.get(str(chosen.below.get("kind", usual)))
            own = {name: value for name, value in data.items() if name != "kind"}
            data = {"kind": str(chosen), **merge(_shared(chosen.below, former, kind), own)}
    if dataclasses.is_dataclass(kind) and isinstance(data, Mapping):
        hints = hints_of(kind)
        given = {n: v for n, v in data.items() if v is not None or n not in hints}  # null: as if it were not there
        return {n: resolved(v, hints[n], default_of(kind, n)) if n in hints else v for n, v in given.items()}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(data, Mapping):
        entries = _flat(data) if without_annotation(arguments[1]) in (int, float, str, bool) else data
        return {name: resolved(value, arguments[1]) for name, value in entries.items()}
    if origin is tuple and isinstance(data, list | tuple) and len(arguments) == 2 and arguments[1] is ...:
        return [resolved(value, arguments[0]) for value in data]
    if isinstance(data, Flag):
        return bool(data)
    return str(data) if isinstance(data, Text) and not data.problem else data


def _only_kind(kind: Any) -> Any:
    """The kind of a configuration class that has one; None: it has none."""
    return default_of(kind, "kind") if dataclasses.is_dataclass(kind) and "kind" in hints_of(kind) else None


def _flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The leaves of mappings inside each other under dotted names: a word cannot say that a name has dots in it."""
    leaves: list[tuple[str, Any]] = []
    for name, value in data.items():
        leaves += _flat(value, f"{path}{name}.").items() if isinstance(value, Mapping) else [(f"{path}{name}", value)]
    found: dict[str, Any] = {}
    for name, value in leaves:
        if value is None and name in found:
            del found[name]
        else:
            found[name] = value
    return found


def _shared(data: Any, former: Any, kind: Any) -> dict[str, Any]:
    """The fields that a former kind and another one have with the same type."""
    if not (dataclasses.is_dataclass(former) and dataclasses.is_dataclass(kind) and isinstance(data, Mapping)):
        return {}
    old, new = hints_of(former), hints_of(kind)
    found: dict[str, Any] = {}
    for name in (n for n in data if n != "kind" and n in old and n in new):
        if old[name] == new[name]:
            found[name] = data[name]
        elif inner := _shared(data[name], without_annotation(old[name]), without_annotation(new[name])):
            found[name] = inner
    return found


# YAML


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path in below:
        raise UserError(f"{path}: base leads back to this file")
    if len(below) > MOST_BASES:
        raise UserError(f"{below[0]}: more than {MOST_BASES} files, each the base of the next; lay them together")
    try:
        if below and path.exists() and not path.is_file():  # a device or a pipe may never end; what the user names himself may be one
            raise UserError(f"{below[-1]}: base: {path} is no file")
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except ValueError as error:
        said = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise (error if isinstance(error, UserError) else UserError(f"{path}: {said}")) from None
    except OSError as error:
        beside = {one.stem: one for one in path.parent.glob("*.yaml")} if path.parent.is_dir() else {}
        near = [beside[name] for name in difflib.get_close_matches(path.stem, beside, 1)]
        if below and CONFIGS is not None and (CONFIGS / path.name).is_file():
            near = [Path(os.path.relpath(CONFIGS / path.name, below[-1].parent))]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{f'{below[-1]}: base: ' if below else ''}{path}: {error.strerror or error}{hint}") from None
    data = parse(text, str(path))
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"{path}: a mapping of fields was expected, got {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: base: names one file, got {base!r}")
    return merge(_read(path.parent / os.path.expanduser(base), (*below, path)), data)


# Writing


def refuse_unread(tree: Any, names: Iterable[str], why: str) -> None:
    """Refuse fields that say something although nothing reads them; those that say the default are nobody's wish.

    Raises:
        UserError: naming the field, what it says and why that has no effect.
    """
    for name in names:
        if (value := getattr(tree, name)) != tree.__dataclass_fields__[name].default:
            said = plain(value)
            raise UserError(f"{name}: {said!r} has no effect {why}")


def plain(tree: Any) -> Any:
    """Plain values of the tree: mappings, lists and scalars, in the order of its fields."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {f.name: plain(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    if isinstance(tree, Mapping):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return tree


def dump(tree: Any) -> str:
    """YAML text of the tree, which `load` reads back equal."""
    return yaml.dump(plain(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def represent_str(self, data: str) -> yaml.ScalarNode:
        # The other styles fold the line breaks that only Unicode knows.
        style = '"' if set(data) & set("\x85\u2028\u2029\r\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
