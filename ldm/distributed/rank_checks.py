"""Rank checks: configuration, data and versions of all ranks, compared before any work."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError
from ldm.config.version import __version__

if TYPE_CHECKING:
    from ldm.distributed.processes import Processes

PACKAGE = Path(__file__).parents[1]
SHARED_S = 10.0  # until a file that one machine wrote must be seen by the others


def code_hash(package: Path = PACKAGE) -> str:
    """A hash of ldm's own sources."""
    found = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def software() -> dict[str, str]:
    """The versions that this process works with."""
    import torch

    return {
        "ldm": f"{__version__}, sources {code_hash()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
    }


def compare(everyone: Sequence[dict[str, Any]]) -> None:
    """Refuse processes that differ.

    Args:
        everyone: the facts of each process, by rank.

    Raises:
        UserError: naming what differs, two ranks and the value of each.
    """
    for rank, theirs in enumerate(everyone):
        if different := list(_differences(everyone[0], theirs, "")):
            said = "; ".join(f"{name}: rank 0 has {mine}, rank {rank} has {other}" for name, mine, other in different[:4])
            raise UserError(f"the processes differ in {said}; start all of them with the same files, words and versions")


def _differences(mine: Any, theirs: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in [*mine, *(k for k in theirs if k not in mine)]:
            yield from _differences(mine.get(key, "nothing"), theirs.get(key, "nothing"), f"{name}.{key}" if name else str(key))
    elif mine != theirs:
        yield name, mine, theirs


def agree(processes: Processes, facts: Mapping[str, Any], out: Path) -> None:
    """Compare the facts and the software of all processes, and see that they share the run folder.

    Raises:
        UserError: naming what differs, the ranks and their values.
    """
    if processes.world == 1:
        return
    compare(processes.gather([{**facts, **software()}]))
    # The first process wrote it before; a network file system may take a while to show it.
    until = time.monotonic() + SHARED_S
    while not (seen := (out / "config.yaml").is_file()) and time.monotonic() < until:
        time.sleep(0.2)
    blind = [rank for rank, sees in enumerate(processes.gather([seen])) if not sees]
    if blind:
        raise UserError(
            f"out: rank {', '.join(map(str, blind))} does not see {out.resolve()}, where rank 0 writes;"
            " the run folder must be on a file system that all machines share"
        )
