"""What `mkdocs build` changes of the pages: README is the first one, and links to source files are their paths in code style."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")  # a file of the repository that is no page


def on_files(files: Any, config: Any) -> Any:
    """Add README.md and CHANGELOG.md, which lie beside docs/."""
    from mkdocs.structure.files import File

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_within(readme)))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=_within(changes)))
    return files


def _within(text: str) -> str:
    """A text whose links start beside docs/, with links that start in it."""
    return re.sub(r"(\]\(|src=\")docs/", r"\1", text).replace("](CHANGELOG.md)", "](changelog.md)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page as the site has it."""
    return OUTSIDE.sub(r"\1", markdown)
