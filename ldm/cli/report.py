"""The report verb: renders a run's report.html anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.command import call
from ldm.runs.report import report


def main(words: Sequence[str]) -> int:
    """`ldm report RUN`: the exit code."""
    return call(_verb, words, "ldm report")


def _verb(run: Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart; it may be unfinished.")]) -> int:
    """Write the page of a run, report.html, anew."""
    print(report(run))
    return 0
