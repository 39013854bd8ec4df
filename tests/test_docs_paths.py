"""The documentation names files and modules that exist, and writes configurations that can be read."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from ldm.config.schema import load
from ldm.runs.run import Run
from ldm.training.settings import Train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ADDRESS = re.compile(r"\w+://\S+")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"`([^`\n]+)`")
OURS = re.compile(r"(?<![\w./-])(?:ldm|tests|docs|configs|\.ci)/[\w./*-]*\w")  # wherever such a path stands
FILE = re.compile(r"(?<![\w./*-])[\w/*-]+\.(?:py|sbatch)\b")  # in code style, and perhaps below the folder that the text is about


def files() -> list[str]:
    """Every file of the repository, from its root."""
    folders = [ROOT / name for name in ("ldm", "tests", "docs", "configs", ".ci")]
    found = [*ROOT.glob("*.*"), *(path for folder in folders for path in folder.rglob("*"))]
    return [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]


EXISTING = files()


def exists(name: str, anywhere: bool) -> bool:
    """Whether a path, in which * stands for any letters, is there, or (`anywhere`) below some folder."""
    pattern = re.compile(("(.*/)?" if anywhere else "") + re.escape(name.rstrip("/")).replace(r"\*", "[^/]*"))
    return any(pattern.fullmatch(path) for path in EXISTING)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in LINK.findall(FENCE.sub("", text)) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    text = ADDRESS.sub("", text)
    missing += [path for path in OURS.findall(text) if not exists(path, anywhere=False)]
    spans = CODE.findall(FENCE.sub("", text))
    missing += [file for span in spans for file in FILE.findall(span) if not OURS.match(file) and not exists(file, anywhere=True)]
    assert not missing


def test_nothing_installs_the_project_that_the_index_calls_ldm() -> None:
    said = [*PAGES, ROOT / "Makefile", ROOT / ".ci" / "run", *(ROOT / "ldm").rglob("*.py"), *(ROOT / "configs").rglob("*.*")]
    stranger = re.compile(r"pip3?\s+install[^\n`]*[ '\"=]ldm(?:$|[\s'\"\[=`])", re.MULTILINE)
    assert stranger.search("pip install 'ldm[data]'") and not stranger.search('pip install -e ".[data]"  # ldm-train')
    assert [str(file) for file in said if file.is_file() and stranger.search(file.read_text(encoding="utf-8"))] == []
    # Pages speak to people in the clone: nobody has published the distribution, and an index knows it as little.
    assert [page.name for page in PAGES if "ldm-train[" in page.read_text(encoding="utf-8")] == []
    assert 'name = "ldm-train"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_work(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ldm":
                module = importlib.import_module(node.module or "")
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_trainings_are_configurations(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "yaml" and isinstance(said := yaml.safe_load(block), dict):
            known = {field.name for kind in (Run, Train) for field in fields(kind)} | {"base", *said.get("stages", ())}
            assert not said.keys() - known - {"network"}
        if language != "bash":
            continue
        own = {name: text for name, text in re.findall(r"^cat > (\S+) <<END\n(.*?)^END$", block, re.MULTILINE | re.DOTALL)}
        for name, text in own.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        for line in block.replace("\\\n", " ").splitlines():
            _, called, rest = line.partition("train.py ")
            words = shlex.split(rest, comments=True) if called else []
            if words and (words[0].startswith("configs/") or words[0] in own):
                file = tmp_path / words[0] if words[0] in own else ROOT / words[0]
                load(file, [word for word in words[1:] if "=" in word and not word.startswith("-")], Run)
