"""The pages as a site: every link, anchor and page of it is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_is_built_and_no_link_leads_nowhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")} | {"changelog"}
    made = {file.parent.name for file in (tmp_path / "site").glob("*/index.html")}
    assert pages <= made and (tmp_path / "site" / "index.html").is_file()
    shown = "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "site").rglob("index.html"))
    assert "fonts.googleapis" not in shown and 'src="pictures/quickstart.png"' in shown
