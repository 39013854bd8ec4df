"""Error messages of a configuration: each validation error in one line, with its path, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from ldm.config.introspection import PRESET, branches_of, hints_of, members_of, preset_names, without_annotation, without_null
from ldm.config.manual import paths_of
from ldm.config.synonyms import COUNTED, FIELDS, field_meant

_WANTED = {
    "string_too_short": "a text that is not empty",
    "string_type": "a text, in quotes where it looks like something else",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
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


def _joined_by_colon(here: Any, above: Any, path: str) -> str:
    """What is wrong with `{kind:folder}`, which YAML reads as a name without a value."""
    for one in (here, above):
        for name, value in one.items() if isinstance(one, Mapping) else ():
            first, colon, rest = str(name).partition(":")
            if value is None and colon and rest and first.isidentifier():
                at = path.removesuffix(f".{name}")
                return f"{at}: {name} is one name to YAML; put a blank after the colon, as in {{{first}: {rest}}}"
    return ""


def explain(problem: Mapping[str, Any], data: Any, kind: Any) -> str:
    """A pydantic validation error as one line: path, value, what is allowed."""
    steps, tag, owner, root = [], problem["type"], kind, kind
    here: Any = data
    above: Any = None
    members: dict[str, Any] = {}
    for step in problem["loc"]:
        if isinstance(here, Mapping) and step not in here and step == here.get("kind"):
            continue  # pydantic's name for the member of a union
        if len(branches_of(kind)) > 1 and not members_of(kind):
            kind = next((one for one in branches_of(kind) if typing.get_origin(one) is tuple), None)
            continue  # pydantic's name for a type of a union
        owner, above, members = _chosen(kind, here), here, members_of(kind)
        kind = _inside(owner, step)
        known = (isinstance(here, Mapping) and step in here) or (isinstance(here, list) and isinstance(step, int) and step < len(here))
        here = here[step] if known else None
        steps.append(str(step))
    path, allowed = ".".join(steps), list(members_of(without_annotation(kind)))
    if said := _no_preset(problem, kind, owner, path) or _joined_by_colon(here, above, path):
        return said
    # The entries of a mapping of which one may be meant where a name is not known.
    entries = [n for n in above if n != steps[-1]] if typing.get_origin(owner) is dict and isinstance(above, Mapping) else []
    if tag in ("unexpected_keyword_argument", "extra_forbidden"):
        names = list(hints_of(owner)) if dataclasses.is_dataclass(owner) else []
        own = FIELDS.get(steps[-1], "")
        if of_others := [word for word, member in members.items() if steps[-1] in hints_of(member)]:
            own_fields = _nearest(steps[-1], names, "known are")
            return f"{path}: unknown field of kind {above.get('kind')}{own_fields}; {' or '.join(of_others)} has it"
        elsewhere = "" if own in names else field_meant(steps[-1], [at for at in paths_of(root) if at.count(".") + 1 != len(steps)])
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
    inside = _with_path(kind, path, problem["input"])
    return f"{path or 'configuration'}: got {_short(problem['input'])}; it should {wanted(problem)}{inside}"


def wanted(problem: Mapping[str, Any]) -> str:
    """What a value should be, of a pydantic validation error."""
    if problem["type"] in ("tuple_type", "list_type") and isinstance(problem.get("input"), str):
        return f"be a list, such as [{problem['input']}]"
    message = problem["msg"].removeprefix("Input should ").removeprefix("Value should ")
    return f"be {_WANTED[problem['type']]}" if problem["type"] in _WANTED else message[0].lower() + message[1:]


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
    names = [name for name in names if name]  # an empty one is what counts where nothing is said
    if not names:
        return ""
    begun = [name for name in names if name.startswith(f"{given}_")]  # prior: prior_preservation
    near = begun if len(begun) == 1 else difflib.get_close_matches(str(given), names, 1, 0.5)
    found = f"; did you mean {near[0]}?" if near else ""
    return f"{found} ({otherwise} {', '.join(names)})" if found else f"; {otherwise} {', '.join(names)}"


def _with_path(kind: Any, place: str, given: Any) -> str:
    """What is meant by a path that was written in the place of a mapping which may have one: the word, in quotation marks."""
    words = [word for word, member in members_of(without_annotation(kind)).items() if "path" in hints_of(member)]
    return f', such as "{place}={{kind: {words[0]}, path: {given}}}"' if words and isinstance(given, str) else ""


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
