"""YAML and key=value words become a frozen typed tree, and back."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic

from ldm.config_text import default_of, explain, hints_of, members_of, without_annotation
from ldm.errors import UserError

T = TypeVar("T")

BY_KIND = pydantic.Discriminator("kind")
Positive = Annotated[int, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """A frozen, slotted, keyword-only dataclass that forbids unknown fields."""
    made: Any = dataclasses.dataclass(frozen=True, slots=True, kw_only=True)(cls)
    made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")
    return made


# Reading


def load(path: Path, words: Sequence[str], kind: type[T]) -> T:
    """The tree of a YAML file with words such as `optim.lr=3e-4` laid over it.

    The file may name one `base:` file, beside which it is laid; mappings are merged, all else is replaced, null removes an
    entry. Where `kind` changes, the new kind takes over the fields that both have, and the others are dropped.

    Raises:
        UserError: telling every mistake at once, each with its path, its value and what is allowed.
    """
    data = _read(path, ())
    for word in words:
        name, _, text = word.partition("=")
        if "=" not in word or not all(name.split(".")):
            raise UserError(f"{word}: a word is written PATH=VALUE, such as seed=1")
        value = _scalar(text, word)
        for part in reversed(name.split(".")):
            value = {part: value}
        data = merge(data, value)
    return build(data, kind, str(path))


def build(data: Mapping[str, Any], kind: type[T], where: str) -> T:
    """The typed tree of plain values.

    Raises:
        UserError: telling every mistake at once, each line beginning with `where`.
    """
    data = _resolve(data, kind)
    try:
        return pydantic.TypeAdapter(kind).validate_python(data)
    except pydantic.ValidationError as error:
        lines = [explain(problem, data, kind) for problem in error.errors()]
        raise UserError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def merge(below: Any, above: Any) -> Any:
    """`above` laid over `below`: mappings field by field, null removes, all else replaces."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "kind" in above and above["kind"] != below.get("kind"):
        return {**_without_nulls(above), "kind": _Switched(above["kind"], below)}
    merged = dict(below)
    for name, value in above.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge(merged[name], value) if name in merged else _without_nulls(value)
    return merged


class _Switched(str):
    """A kind that was changed, with the fields of the former kind: the new one takes over those that it has, too."""

    below: dict[str, Any]

    def __new__(cls, kind: Any, below: dict[str, Any]) -> _Switched:
        made = super().__new__(cls, kind)
        made.below = below
        return made


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


def _resolve(data: Any, kind: Any, default: Any = dataclasses.MISSING) -> Any:
    """The data with the kind of every union named, and with what a changed kind takes over from the former one."""
    kind = without_annotation(kind)
    members = members_of(kind)
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
        return {n: _resolve(v, hints[n], default_of(kind, n)) if n in hints else v for n, v in data.items()}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(data, Mapping):
        return {name: _resolve(value, arguments[1]) for name, value in data.items()}
    if origin is tuple and isinstance(data, list | tuple) and len(arguments) == 2 and arguments[1] is ...:
        return [_resolve(value, arguments[0]) for value in data]
    return data


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
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: {error.strerror or error}{hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a mapping of fields was expected, got {type(data).__name__}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: base: names one file, got {base!r}")
    return merge(_read(path.parent / base, (*below, path)), data)


def _scalar(text: str, word: str) -> Any:
    return _parse(text, word) if text.strip() else ""


def _parse(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {getattr(error, 'problem', None) or error}") from None


def _loader() -> Any:
    """A YAML loader by the core schema of YAML 1.2: 3e-4 is a number, `no` is a word; repeated keys are errors."""
    import re

    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def rule(tag: str, pattern: str, first: str) -> None:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first) if first else None)

    rule("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
    rule("int", "[-+]?[0-9][0-9_]*", "-+0123456789")
    rule("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)", "-+0123456789.")
    rule("null", "~|null|Null|NULL|", "~nN")
    Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])

    def mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = loader.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is not a word", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands here twice", key.start_mark)
            seen.add(name)
        return yaml.SafeLoader.construct_mapping(loader, node, deep=True)

    def number(loader: Any, node: Any) -> float:
        text = node.value.replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_constructor("tag:yaml.org,2002:float", number)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))
    return Loader


# Writing


def plain(tree: Any) -> Any:
    """The tree as mappings, lists and scalars, in the order of its fields."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {f.name: plain(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    if isinstance(tree, Mapping):
        return {name: plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return tree


def dump(tree: Any) -> str:
    """The tree as YAML that `load` reads back equal; what is None is left out."""
    import yaml

    return yaml.safe_dump(_without_nulls(plain(tree)), sort_keys=False, allow_unicode=True, width=120)
