"""Safe YAML 1.2 parser: `3e-4` is a number, `no` is a text, duplicate keys are errors, and no tag calls anything."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

from ldm.config.errors import UserError

LARGEST = 1_000_000  # characters of a file
DEEPEST = 40  # mappings and lists inside each other
MOST_NODES = 100_000  # with every alias counted as what it stands for: nine aliases of nine aliases of ... end here

_RULES = (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", "[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789."),
    ("null", "~|null|Null|NULL", "~nN"),
    ("null", "", ""),
)


class Written:
    """Written text of a value, so that `name: 007` may be a text, and a word of the command line stands as it is written."""

    text: str


class Integer(int, Written):
    """Integer that keeps its source text."""


class Real(float, Written):
    """Float that keeps its source text."""


class Flag(int, Written):
    """Truth value of a word; a bool cannot keep its source text."""


class Text(str, Written):
    """Text of a word."""

    problem: str  # what YAML has against the source text, which is then good for a text field alone; empty: nothing


class Fields(dict[str, Any], Written):
    """Mapping of a word."""


class Entries(list[Any], Written):
    """List of a word."""


def spoken(text: str) -> Any:
    """The value of a word, with the text as it stands; null is `null` alone, since `~` is a folder."""
    problem = ""
    try:
        value = parse(text, "") if text.strip() else text
    except UserError as error:
        value, problem = text, str(error).removeprefix(": ")
    if value is None:
        return None if text == "null" else sourced(text, text)
    value = sourced(value, text)
    if isinstance(value, Text):
        value.problem = problem
    return value


def sourced(value: Any, text: str) -> Any:
    """A plain value that keeps its source text."""
    kinds: tuple[tuple[type, Any], ...] = ((Written, None), (bool, Flag), (str, Text), (dict, Fields), (list, Entries))
    kept = next((kept for kind, kept in kinds if isinstance(value, kind)), None)
    made = value if kept is None else kept(value)
    if isinstance(made, Written):
        made.text = text
    if isinstance(made, Text):
        made.problem = ""
    return made


class Loader(yaml.SafeLoader):
    """YAML loader of the 1.2 core schema, plain data alone, of bounded size."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012
    yaml_constructors: ClassVar[dict[Any, Any]] = {  # no dates, sets, bytes or what else tags may ask for
        f"tag:yaml.org,2002:{name}": getattr(yaml.SafeLoader, f"construct_yaml_{name}") for name in ("seq", "null")
    } | {None: yaml.SafeLoader.construct_undefined}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth, self.nodes = 0, 0
        self.sizes: dict[int, int] = {}  # nodes below each node, aliases followed

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, counted."""
        alias = self.check_event(yaml.AliasEvent)
        before = self.nodes
        self.depth += 1
        mark = self.peek_event().start_mark
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels inside each other", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if alias and id(node) not in self.sizes:
            raise yaml.composer.ComposerError(None, None, "an alias inside what it stands for", mark)
        self.nodes += self.sizes[id(node)] if alias else 1
        self.sizes.setdefault(id(node), self.nodes - before)
        if self.nodes > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES:,} entries", mark)
        return node


def _mapping(loader: Loader, node: Any) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "a mapping was expected", node.start_mark)
    found: dict[str, Any] = {}
    for key, value in node.value:
        name = loader.construct_object(key, deep=True)
        if isinstance(name, Written):
            name = name.text
        if not isinstance(name, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is not a word", key.start_mark)
        if name == "<<":
            said = "<< takes over no fields here; write them out, or put them into a file that base: names"
            raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
        if name in found:
            raise yaml.constructor.ConstructorError(None, None, f"the key {name} stands here twice", key.start_mark)
        found[name] = loader.construct_object(value, deep=True)
    return found


def _number(loader: Loader, node: Any) -> Written:
    text = loader.construct_scalar(node)
    spelled = text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
    whole = node.tag.endswith(":int")
    try:
        made = Integer(spelled) if whole else Real(spelled)
    except ValueError:
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]} is no number", node.start_mark) from None
    made.text = text
    return made


def _text(loader: Loader, node: Any) -> str:
    text = str(loader.construct_scalar(node))
    if half := re.search("[\ud800-\udc7f\udd00-\udfff]", text):  # the others stand for bytes of file names
        raise yaml.constructor.ConstructorError(None, None, f"\\u{ord(half[0]):04x} is half a character", node.start_mark)
    return text


def _flag(loader: Loader, node: Any) -> bool:
    text = loader.construct_scalar(node)
    if text.lower() not in ("true", "false"):
        raise yaml.constructor.ConstructorError(None, None, f"{text[:40]} is neither true nor false", node.start_mark)
    return bool(text.lower() == "true")


for _tag, _pattern, _first in _RULES:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first) or [""])
Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
Loader.add_constructor("tag:yaml.org,2002:bool", _flag)
Loader.add_constructor("tag:yaml.org,2002:str", _text)
Loader.add_constructor("tag:yaml.org,2002:float", _number)
Loader.add_constructor("tag:yaml.org,2002:int", _number)


def parse(text: str, where: str) -> Any:
    """Parse a YAML text of one document to plain values.

    Raises:
        UserError: naming `where` and the line.
    """
    if len(text) > LARGEST:
        raise UserError(f"{where}: too long; a configuration has at most {LARGEST:,} characters")
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and "\n" in text.strip() else ""
        said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        if "'\\t' that cannot start" in said:
            said = "begins with a tab; YAML is indented with blanks"
        raise UserError(f"{where}{line}: {said}") from None
