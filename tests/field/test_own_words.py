"""A message names words that the verb takes which prints it."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.main import get_command

from ldm.__main__ import VERBS, main
from ldm.cli import command, encode
from ldm.config.own_words import OPTIONS, in_own_words

ROOT = Path(__file__).parents[2]
WORD = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
CALLS = [verb for verb in VERBS if verb not in ("train", "data")] + [
    f"data {what}" for what in ("check", "hash", "index", "encode", "curate", "fetch")
]
OF_TRAIN = {"--extend", "--plan", "--json", "--processes", "--tflops", "--help", "--hub"}
OF_OTHERS = {  # options of the command itself, of launchers, and of other programs that a message names
    "ldm/__main__.py": {"--version"},
    "ldm/distributed/launcher.py": {"--config-file", "--config", "--nproc-per-node", "--nnodes"},
    "ldm/families/translator.py": {"--net", "--ngf", "--norm", "--input", "--no"},  # of the authors' script
    "ldm/distributed/rendezvous.py": {"--gpus-per-task"},
    "ldm/cli/benchmarks/machine.py": {"--porcelain", "--short"},
    "ldm/config/synonyms.py": set(),
    "ldm/data/curation/fetch.py": set(),
    "ldm/data/link_guard/sitecustomize.py": set(),
}
FOREIGN = re.compile(r"var\(--|style=|python -m pip|accelerate|img2dataset|<script>")


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    """The options of every verb, as typer reads them."""
    found: dict[str, set[str]] = {"train": set(OF_TRAIN)}

    def read(function: Callable[..., int], words: Any, name: str) -> int:
        app, name = typer.Typer(add_completion=False), name.removeprefix("ldm ")
        app.command()(command.expanded(function, hub=name in command.FETCHES))
        one: Any = get_command(app)
        found[name] = {word for parameter in one.params for word in parameter.opts if word.startswith("--")} | {"--help"}
        return 0

    modules = {verb: importlib.import_module(VERBS[verb.split()[0]][0]) for verb in CALLS}  # each has taken the true one
    with pytest.MonkeyPatch.context() as patch:
        for verb, module in modules.items():
            for one in (module, encode, command):
                if hasattr(one, "call"):
                    patch.setattr(one, "call", read)
            module.main([*verb.split()[1:], "x"])
    return found


def _texts(file: Path) -> Iterator[tuple[int, str]]:
    """The texts of a module, with {} for what is filled in; docstrings left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.lineno, node.value


def test_every_option_that_a_text_names_is_one(options: dict[str, set[str]]) -> None:
    assert set(options) == {"train", *CALLS}
    known = set().union(*options.values())
    strange = [
        f"{file.relative_to(ROOT)}:{line}: {word} ({text[:80]})"
        for file in sorted((ROOT / "ldm").rglob("*.py"))
        for line, text in _texts(file)
        if not FOREIGN.search(text)
        for word in WORD.findall(text)
        if word not in known | OF_OTHERS.get(str(file.relative_to(ROOT)), set())
    ]
    assert strange == [], "\n".join(strange)


@pytest.mark.parametrize("verb", [verb for verb in CALLS if " " not in verb])
def test_a_verbs_own_messages_name_its_own_options(verb: str, options: dict[str, set[str]]) -> None:
    file = ROOT / f"{VERBS[verb][0].replace('.', '/')}.py"
    said = [
        (line, word, text)
        for line, text in _texts(file)
        if not re.search(rf"\b(ldm|python) (?!{verb}\b)\w+|train\.py|sample\.py|accelerate|`--from`", text)
        for word in WORD.findall(text)
        if word not in options[verb]
    ]
    assert said == []


def test_the_options_in_place_of_fields_are_there(options: dict[str, set[str]]) -> None:
    assert [(verb, word) for verb, named in OPTIONS.items() for word in named.values() if word not in options[verb]] == []


SAID = "pics: 3 images but no captions (data.captions=auto); write x.txt, or set data.captions=filename"


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("train", SAID),
        ("plan", SAID),
        ("data check", "pics: 3 images but no captions (--captions auto); write x.txt, or set --captions filename"),
        ("data hash", f"{SAID} (data.captions is a field of a configuration, and no word of ldm data hash)"),
        (
            "data encode",
            f"{SAID} (data.captions is a field of a configuration, and no word of ldm data encode; DATA may be a YAML file that says it)",
        ),
    ],
)
def test_fields_are_told_in_the_words_of_the_verb(verb: str, said: str) -> None:
    assert in_own_words(SAID, verb) == said


def test_a_flag_has_no_value_and_an_archive_no_kind() -> None:
    assert in_own_words("it leads out; set data.outside=true to follow it", "data check") == "it leads out; set --outside to follow it"
    assert in_own_words("unpack it > x.tar, which data.kind=shards reads", "data check") == "unpack it > x.tar, which can be read"


def test_the_check_asks_for_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"a {name} square.png")
    assert main(["data", "check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "or set --captions filename" in said and "data.captions" not in said
    assert main(["data", "check", str(tmp_path), "--captions", "filename"]) == 0
