"""Dry run: what a start will do with each stage, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.families.family import Found
from ldm.runs.changed_data import data_change, marks_of
from ldm.runs.extension import decide
from ldm.runs.keys import Finished, check_data, finished, hashes_of, identity, key_of
from ldm.runs.run import Run

if TYPE_CHECKING:
    from ldm.data.sources import DataSet


@dataclass(frozen=True)
class Planned:
    """What a start will do with one stage, and why."""

    name: str
    skip: bool
    why: str


def planned(run: Run, out: Path, data: DataSet, val: DataSet, elsewhere: Mapping[str, Found], extend: bool) -> list[Planned]:
    """For every stage whether it runs or is skipped, from what lies in the run folder now.

    Args:
        elsewhere: what `ldm.runs.pretrained.find` says.
        extend: whether stages with other settings go on from their state.

    Raises:
        UserError: for what a start would refuse.
    """
    check_data(run, data, val)
    done: dict[str, Finished] = {}
    found: list[Planned] = []
    for name in run.stages:
        if waiting := [read.stage for read in run.reads(name).values() if read.stage and read.stage not in done]:
            found.append(Planned(name, False, f"because {waiting[0]} runs"))
            continue
        folder = out / "stages" / name
        have = finished(folder)
        wanted = identity(run, name, data, val, hashes_of(run, name, done, elsewhere))
        if have is not None and have.key == key_of(wanted):
            done[name] = have
            found.append(Planned(name, True, f"done, nothing it depends on has changed ({have.seconds:.0f} s saved)"))
        else:
            why = decide(folder, have, wanted, extend).why
            change = data_change(out, marks_of(data)) if "data: " in why else None
            found.append(Planned(name, False, f"{why}; data: {change}" if change else why))
    return found
