"""Command line of a verb: typer reads its function's signature, and the options of the dataclasses in it."""

from __future__ import annotations

import copy
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import Annotated, Any

from ldm.cli import examples
from ldm.config.errors import UserError
from ldm.config.introspection import default_of, hints_of, without_annotation, without_null
from ldm.config.options import Given, Option, options_of
from ldm.config.synonyms import option_meant
from ldm.config.terminal import is_text, shown

# What may open models that are named owner/name, and so takes --hub (ldm.__main__ reads the word, before any module does).
FETCHES = {"train", "plan", "sample", "demo", "grid", "animate", "classifier", "evaluate", "export", "data encode"}
TEXTS = {"negative", "to", "source", "prefix", "suffix"}  # options of which an empty text is one
HUB = "Models named owner/name may be fetched; without it no network is used."


def call(function: Callable[..., int], words: Sequence[str], name: str) -> int:
    """Parse `words` by the function's signature, call it, and return its exit code.

    Raises:
        UserError: for words that do not fit the signature.
    """
    import typer
    from typer.main import get_command

    if not {"-h", "--help"}.isdisjoint(words):
        import typer.rich_utils

        typer.rich_utils.RANGE_STRING = "{:.0}"  # nothing: bounds stand in the placeholder
    app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
    whole = expanded(function, hub=name.removeprefix("ldm ") in FETCHES)
    app.command(epilog=examples.shown(name.removeprefix("ldm ")))(whole)
    command: Any = get_command(app)
    # typer has its own copy of click in some versions, and click itself in others.
    mistake: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    try:
        # Not command.main(), which would turn an interrupt and the end of a pipe into its own exceptions.
        command.get_help_option(typer.Context(command)).metavar = ""
        for one in command.params:
            if one.param_type_name == "argument":
                _by_name(one)
        with command.make_context(name, list(words)) as context:
            _check_words([one for one in command.params if one.param_type_name == "option"], words)
            _check_texts(context.params)
            _check_needs(function, lambda field: context.get_parameter_source(field).name != "DEFAULT")
            _look(function, context.params)
            return int(command.invoke(context) or 0)
    except typer.Exit as ending:
        return int(ending.exit_code)
    except mistake as error:
        said = _told(error, words)
        unknown = "o such option" in said
        meant = option_meant(said, [known for one in command.params for known in one.opts]) if unknown else ""
        meant = meant or (_text_meant(words, name) if unknown else "")
        raise UserError(
            f"{said.partition(' (Possible')[0].rstrip('.') if meant else said}{meant} (`{name} --help` lists all options)"
        ) from None


def _by_name(argument: Any) -> None:
    """Show an argument by its name, as CONFIG, and without typer's word for its type."""
    several = argument.nargs != 1 and argument.metavar is None
    argument.metavar = argument.metavar or f"{argument.name.upper()}{'...' if several else ''}"
    usage = argument.metavar if argument.required or argument.metavar.startswith("[") else f"[{argument.metavar}]"
    argument.get_usage_pieces = lambda context: [usage]
    argument.display_type_rich = lambda ctx: None


def _told(error: Any, words: Sequence[str]) -> str:
    """What is wrong with the words: with the option, the value and what is allowed."""
    said = error.format_message()
    parameter: Any = getattr(error, "param", None)
    names = parameter.opts if parameter is not None and parameter.opts[0].startswith("--") else []
    if said.startswith(("Missing option", "Missing argument")):
        return f"{said.rstrip('.')}: {str(parameter.help).rstrip('.')}"
    wanted = error.message.partition(", unable to")[0].removeprefix("Input should ")
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] in names), None)
    if at is None or wanted == error.message:  # None: of the environment, or no option
        return str(said)
    given = words[at].partition("=")[2] or "".join(words[at + 1 : at + 2])
    random = "; for another picture each time: --seed $RANDOM" if (names[0], given) == ("--seed", "-1") else ""
    return f"{names[0]}: got {given}; it should {wanted}{random}"


def _check_words(options: Sequence[Any], words: Sequence[str]) -> None:
    """Tell of an option that is given several times, of which the last counts, as a script's `"$@"` means it; and refuse an empty one,
    which comes of a variable that is not set, and would be the current folder, or as if it had not been given.

    Raises:
        UserError: naming the option.
    """
    given: dict[str, list[str]] = {}
    for one, value in _spoken(options, words):
        if not value and one.name not in TEXTS:
            raise UserError(f"{one.name}: got an empty text; give {one.opts[0]} a value, or leave it out")
        if not one.multiple:
            given.setdefault(one.name, []).append(value)
    for name, values in given.items():
        if len(set(values)) > 1:
            said = " and as ".join(map(shown, dict.fromkeys(values)))
            print(f"note: {name}: given as {said}; the last counts, {shown(values[-1])}", file=sys.stderr)


def _check_texts(given: Mapping[str, Any]) -> None:
    """Refuse prompts and other texts that are no UTF-8, as those of a script in Latin-1 are; paths may be of any bytes.

    Raises:
        UserError: naming the option.
    """
    for name in (*TEXTS, "prompt", "watermark", "x", "y", "z"):
        for value in given[name] if isinstance(given.get(name), list | tuple) else [given.get(name)]:
            if isinstance(value, str) and not is_text(value):
                raise UserError(f"{name}: {shown(value[:80])} is not UTF-8 (half a character, or another encoding); write it in UTF-8")


def _spoken(options: Sequence[Any], words: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Each option that has a value as it stands among the words, up to --."""
    known = {name: one for one in options for name in one.opts if name.startswith("-") and not one.is_flag}
    waiting = iter(words)
    for word in waiting:
        if word == "--":
            return
        name, sign, value = word.partition("=")
        if name in known:
            yield known[name], value if sign else next(waiting, "")


def _text_meant(words: Sequence[str], name: str) -> str:
    """How to give a text that begins with a dash, as the end of a message; empty where no word looks like one."""
    text = next((word for word in words if word.startswith("-") and not word.startswith("--") and len(word) > 2), "")
    return f"; a text that begins with a dash stands behind --, as in {name} --seed 1 -- {text[:40]!r}" if text else ""


def _check_needs(function: Callable[..., int], given: Callable[[str], bool]) -> None:
    """Refuse options that change nothing, because what they need is not given.

    Raises:
        UserError: naming both.
    """
    for kind in typing.get_type_hints(function).values():
        for name, told in _options(kind).items():
            if told.needs and given(name) and not given(told.needs):
                words = [f"--{field.replace('_', '-')}" for field in (name, told.needs)]
                raise UserError(f"{name}: changes nothing without {words[1]}; give that, too, or leave {words[0]} out")


def _look(function: Callable[..., int], values: Mapping[str, Any]) -> None:
    """Look for what the words name, before the verb begins: torch is not loaded for what is not there.

    Raises:
        UserError: naming what is missing.
    """
    for name, given in given_of(function).items():
        value = values.get(name)
        for word in value if isinstance(value, list | tuple) else [value]:
            if word:
                from ldm.cli.given import look

                look(given, name, str(word))


def given_of(function: Callable[..., int]) -> dict[str, Given]:
    """The words of a verb that name what must be there, by the options of its dataclasses and the marks of its parameters."""
    found: dict[str, Given] = {}
    for name, kind in typing.get_type_hints(function, include_extras=True).items():
        found |= {field: told.given for field, told in _options(kind).items() if told.given}
        if mark := next((one for one in getattr(kind, "__metadata__", ()) if isinstance(one, Given)), None):
            found[name] = mark
    return found


def _options(kind: Any) -> dict[str, Option]:
    """The options of a dataclass and of those in it; of anything else none."""
    if not is_dataclass(kind):
        return {}
    inner = [_options(hint) for hint in hints_of(kind).values()]
    return options_of(kind) | {name: told for one in inner for name, told in one.items()}  # type: ignore[arg-type]


def expanded(function: Callable[..., int], hub: bool = False) -> Callable[..., int]:
    """A function whose parameters are plain options, that calls `function` with the dataclasses made of them.

    A parameter annotated as a dataclass stands for the options among its fields (`ldm.config.options.option`), and for those of
    the dataclasses in it.

    Args:
        hub: whether its help has --hub.
    """
    import typer

    kinds = typing.get_type_hints(function, include_extras=True)
    plain: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(kinds[name]):
            plain |= {one.name: one for one in _parameters(kinds[name])}
        else:
            plain[name] = parameter.replace(annotation=_with_placeholder(kinds[name]), kind=inspect.Parameter.KEYWORD_ONLY)

    def run(**words: Any) -> int:
        words = {name: _at_home(value) for name, value in words.items()}
        return function(**{name: _built(kinds[name], words) if is_dataclass(kinds[name]) else words[name] for name in own})

    own = list(inspect.signature(function).parameters)
    if hub:
        shown = Annotated[bool, typer.Option("--hub", help=HUB, metavar="")]
        plain["hub"] = inspect.Parameter("hub", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=shown)
    run.__signature__ = inspect.Signature(list(plain.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in plain.items()}
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    return run


def _at_home(value: Any) -> Any:
    """A path, or several, with the home folder in place of ~, which the shell leaves alone within a word; all else as it is."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _parameters(kind: Any) -> Iterator[inspect.Parameter]:
    """typer's parameters of a dataclass, and of those in it, each under a heading of its own."""
    import typer

    hints, options, panel = hints_of(kind), options_of(kind), str(kind.__doc__).partition(":")[0]
    for name, hint in hints.items():
        if is_dataclass(hint):
            yield from _parameters(hint)
        if name not in options:
            continue
        told, default = options[name], default_of(kind, name)
        if typing.get_origin(hint) is tuple:
            hint, default = list[typing.get_args(hint)[0]] | None, None  # type: ignore[misc]
        names = (told.name or f"--{name.replace('_', '-')}",)
        shown: Any = {"help": told.help, "min": told.low, "max": told.high, "rich_help_panel": panel, "envvar": told.variable or None}
        if not told.argument:
            shown["metavar"] = _placeholder(hint, told)
        info = typer.Argument(help=told.help) if told.argument else typer.Option(*names, **shown)
        default = inspect.Parameter.empty if default is MISSING else default
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info])


def _with_placeholder(kind: Any) -> Any:
    """A parameter's annotation whose option, where it is one of typer's own, has the placeholder that the fields of dataclasses have."""
    import typer

    marks = [copy.copy(mark) if isinstance(mark, typer.models.OptionInfo) else mark for mark in getattr(kind, "__metadata__", ())]
    for mark in marks:
        if isinstance(mark, typer.models.OptionInfo) and mark.metavar is None:
            mark.metavar = _placeholder(without_annotation(kind), Option("", low=mark.min, high=mark.max))
    return Annotated[(without_annotation(kind), *marks)] if marks else kind


def _placeholder(hint: Any, told: Option) -> str:
    """What stands for an option's value in the help: the bounds of a number, or what it is; empty for what is said or not."""
    kind = without_null(hint)
    if kind in (int, float):
        high = "" if told.high is None or told.high >= 2**20 else f"{told.high:g}"
        return "NUMBER" if told.low is None and not high else f"{'' if told.low is None else f'{told.low:g}'}..{high}"
    return {str: "TEXT", list[str]: "TEXT", Path: "PATH", list[Path]: "PATH"}.get(kind, "")


def _built(kind: Any, words: Mapping[str, Any]) -> Any:
    """A dataclass of what was said; several words are a tuple."""
    hints, options = hints_of(kind), options_of(kind)
    told = {name: _built(hint, words) for name, hint in hints.items() if is_dataclass(hint)}
    for name in options:
        told[name] = tuple(words[name] or ()) if typing.get_origin(hints[name]) is tuple else words[name]
    return kind(**told)
