"""The house keeps its shape: imports go down only, without circles; slow packages wait; what may know what is known by name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm"
FILES = sorted(PACKAGE.rglob("*.py"))
# The rooms, lowest first: a file imports from its own room and those before it.
ROOMS = (
    "config",
    "diffusion",
    "models",
    "formats",
    "text",
    "data",
    "families",
    "metrics",
    "distributed",
    "training",
    "runs",
    "sampling",
    "cli",
    "demo",
)
NOT_FOR = {"models": {"data", "text", "formats"}, "diffusion": {"models"}}  # mathematics knows no network, networks no files
ONLY_IN = {"accelerate": "distributed", "pydantic": "config"}
WAITING = {
    "transformers",
    "open_clip",
    "diffusers",
    "datasets",
    "wandb",
    "gradio",
    "matplotlib",
    "scipy",
    "accelerate",
    "peft",
    "rich",
    "xformers",
    "huggingface_hub",
    "torchvision",
    "tokenizers",
    "pyarrow",
    "fsspec",
    "duckdb",
    "tensorboard",
}
VERBS = ("train", "sample", "grid", "animate", "info", "evaluate", "report", "doctor", "data", "export")
LIGHT = (
    "ldm",
    "ldm.__main__",
    "ldm.cli.command",
    *(f"ldm.cli.{verb}" for verb in VERBS),
    "ldm.demo.server",
    "ldm.config.schema",
    "ldm.training.log",
)


def module(file: Path) -> str:
    """A file's name as it is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(file): file for file in FILES}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, those for types alone and in functions too, and whether the import acts as soon as the file is read."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    later = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative imports say less"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else node.module), node not in later
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value and node.value in MODULES:
            yield node.value, False  # a module that is imported by its name


GRAPH = {name: {found for found, _ in imports(file) if found in MODULES and found != name} for name, file in MODULES.items()}


def room(name: str) -> str:
    return (name.split(".") + [""])[1]


def test_nothing_lies_beside_the_rooms() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert there == {*ROOMS, "__init__.py", "__main__.py"}
    assert all(len(file.relative_to(PACKAGE).parts) <= 3 for file in FILES), "below a room at most one more level"


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_down_only(name: str) -> None:
    allowed = {*ROOMS[: ROOMS.index(name) + 1]} - NOT_FOR.get(name, set())
    for own in (own for own in MODULES if room(own) == name):
        upward = {found for found in GRAPH[own] if room(found) not in allowed and found != "ldm.config.version"}
        assert not upward, f"{own} must not import {', '.join(sorted(upward))}"


def circles() -> list[set[str]]:
    """Groups of files that import each other, directly or through others (Tarjan's strongly connected components)."""
    found: list[set[str]] = []
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in GRAPH[name]:
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(group)

    for name in GRAPH:
        if name not in number and name not in ("ldm", "ldm.__main__"):
            visit(name)
    return found


def test_there_are_no_circles() -> None:
    assert circles() == []


def test_the_test_would_see_a_circle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPH, "ldm.diffusion.rng", {"ldm.runs.execution"})
    assert any({"ldm.diffusion.rng", "ldm.runs.execution"} <= group for group in circles())


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_slow_packages_wait_until_they_are_needed(file: Path) -> None:
    for name, at_once in imports(file):
        top = name.split(".")[0]
        assert not (at_once and top in WAITING), f"{file.name}: import {top} inside the function that needs it"
        assert ONLY_IN.get(top, room(module(file))) == room(module(file)), f"{file.name}: {top} belongs to {ONLY_IN.get(top)}"


def test_accelerate_is_known_to_one_file() -> None:
    assert {file.name for file in FILES if any(name.split(".")[0] == "accelerate" for name, _ in imports(file))} == {"processes.py"}


def test_the_loop_does_not_know_which_family_runs() -> None:
    known = {found for name in GRAPH if room(name) == "training" for found in GRAPH[name] if room(found) == "families"}
    assert known == {"ldm.families.family"}


def test_nobody_asks_a_family_its_name() -> None:
    """Outside families/ no kind of a model is compared, and no family's class is asked for or imported."""
    kinds = "clip|pretrained_text|kl|vq|pretrained_autoencoder|latent_diffusion"
    asked = re.compile(rf"kind *[!=]= *[\"']({kinds})[\"']|(family|model|role|name) *[!=]= *[\"'](text|autoencoder|diffusion)[\"']")
    for file in FILES:
        if room(module(file)) == "families" or module(file) == "ldm.cli.classifier":  # which trains a part of latent diffusion
            continue
        found = asked.search(file.read_text(encoding="utf-8"))
        assert found is None, f"{module(file)}: {found and found[0]}; ask the family instead"
        if "benchmarks" not in file.parts:
            own = {name for name in GRAPH[module(file)] if room(name) == "families"}
            shared = {"ldm.families", "ldm.families.family", "ldm.families.draws", "ldm.families.registry"}
            assert own <= shared, f"{module(file)} imports {', '.join(sorted(own - shared))}"


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_root_scripts_use_one_public_name(name: str) -> None:
    assert {module for module, _ in imports(ROOT / name)} == {"sys", "ldm.__main__"}


def loaded_by(module: str) -> set[str]:
    """The packages that importing a module alone brings in."""
    code = f"import sys; before = set(sys.modules); import {module}; print(*(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in found.stdout.split()}


def test_the_package_alone_costs_the_standard_library() -> None:
    assert loaded_by("ldm") - set(sys.stdlib_module_names) == {"ldm"}


@pytest.mark.parametrize("module", LIGHT[1:])
def test_what_answers_at_once_loads_neither_torch_nor_what_waits(module: str) -> None:
    assert not loaded_by(module) & (WAITING | {"torch"})


def test_public_names_load_on_first_use() -> None:
    import ldm
    from ldm.config.errors import UserError

    assert ldm.UserError is UserError and callable(ldm.load) and callable(ldm.start) and ldm.Run.__name__ == "Run"
    assert set(ldm.__all__) == {"Run", "UserError", "__version__", "load", "start"}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        ldm.lod  # noqa: B018
