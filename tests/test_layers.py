"""Imports go down only, slow packages wait until they are needed, and a file stays one thought."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm"
FILES = sorted(PACKAGE.rglob("*.py"))

# Modules by layer, lowest first, as docs/architecture.md tells; what is named nowhere is of the last one.
LAYERS = (
    (
        "errors",
        "threads",
        "rng",
        "batch",
        "config",
        "config_presets",
        "config_text",
        "config_yaml",
        "models",
        "diffusion",
        "process",
        "redact",
        "sharded",
    ),
    (
        "checkpoint",
        "compvis",
        "compvis_shapes",
        "pickles",
        "single_file",
        "folder",
        "tensor_file",
        "text",
        "text_files",
        "text_pretrained",
        "text_weighted",
        "prompt_syntax",
        "data",
        "lora",
        "lora_files",
        "words",
        "optim",
        "ema",
        "snapshot",
        "trackers",
        "pace",
        "log",
        "pictures",
    ),
    ("families", "metrics"),
)
NEIGHBOURS = {"models": {"models", "config", "batch", "errors", "rng"}, "diffusion": {"diffusion", "config", "batch", "errors", "rng"}}
ONLY_IN = {"pydantic": {"config.py"}, "accelerate": {"processes.py"}}
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
LIGHT = (
    "ldm",
    "ldm.__main__",
    "ldm.cli.command",
    "ldm.cli.train",
    "ldm.cli.sample",
    "ldm.cli.grid",
    "ldm.cli.animate",
    "ldm.cli.info",
    "ldm.demo.server",
    "ldm.runs.evaluation",
    "ldm.runs.report",
    "ldm.cli.doctor",
    "ldm.cli.data",
    "ldm.cli.export",
    "ldm.config.schema",
    "ldm.training.log",
)


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Every imported module, and whether the import acts as soon as the file is read."""
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
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"ldm.{alias.name}" for alias in node.names] if node.module == "ldm" else [node.module]
            yield from ((name, node not in later) for name in names)


def part(module: str) -> str:
    """The file or folder of the package that a module belongs to."""
    return (module.split(".") + [""])[1]


def layer(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), len(LAYERS))


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for module, at_once in imports(file):
        top, name = module.split(".")[0], part(module)
        if top == "ldm" and name not in ("", "__version__"):
            assert layer(name) <= layer(own), f"{file.name} is below {module}"
            assert name in NEIGHBOURS.get(own, {name}), f"{own} must not know {name}"
        assert not (at_once and top in WAITING), f"{file.name}: import {top} inside the function that needs it"
        assert file.name in ONLY_IN.get(top, {file.name}), f"{file.name}: {top} belongs to {ONLY_IN.get(top)}"


def test_the_loop_does_not_know_which_family_runs() -> None:
    known = {module for module, _ in imports(PACKAGE / "train.py") if module.startswith("ldm.families")}
    assert known == {"ldm.families.family"}


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_root_scripts_use_one_public_name(name: str) -> None:
    assert {module for module, _ in imports(ROOT / name)} == {"sys", "ldm.__main__"}


def test_layers_name_what_there_is() -> None:
    there = {part(".".join(("ldm", *f.relative_to(PACKAGE).with_suffix("").parts))) for f in FILES}
    assert {name for names in LAYERS for name in names} <= there


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_is_one_thought(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400 and len(file.relative_to(PACKAGE).parts) <= 2


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
    assert set(ldm.__all__) == {"Run", "UserError", "load", "start"}
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        ldm.lod  # noqa: B018
