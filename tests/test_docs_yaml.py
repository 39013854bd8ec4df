"""Configurations in the pages: whole ones are runs, parts name fields that there are. docs/own_pictures.md has a test of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ldm.cli.train import validated
from ldm.config.errors import UserError
from ldm.config.schema import read

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(text, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "own_pictures.md"
    for number, text in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


def refused(text: str, folder: Path) -> str:
    """What is wrong with a configuration; empty: nothing."""
    file = folder / "page.yaml"
    file.write_text(text, encoding="utf-8")
    try:
        return validated(read(file, []), file)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("text", BLOCKS)
def test_what_a_page_writes_is_read(text: str, tmp_path: Path) -> None:
    said = yaml.safe_load(text)
    if "stages" in said and "base" not in said and {"data", "init"} & set(said):
        assert refused(text, tmp_path) == ""
        return
    base = ROOT / "configs" / said.get("base", "quickstart.yaml")
    part = "\n".join(line for line in text.splitlines() if not line.startswith("base:"))
    mistakes = [line for line in refused(f"base: {base}\n{part}", tmp_path).splitlines() if "unknown field" in line]
    assert mistakes == []


def test_the_pages_have_some() -> None:
    assert len(BLOCKS) > 25
