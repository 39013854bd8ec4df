"""A changed data set: what differs from the one that a run was last started with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.data.content import DataChange, HasMarks, compare

if TYPE_CHECKING:
    from ldm.data.sources import DataSet

MARKS = "data.npy"  # of the run folder: a hash of each sample's name, and one of its picture and captions


def data_change(out: Path, data: DataSet) -> DataChange | None:
    """What has changed in the data set since the run's last start; None: nothing, or nothing tells."""
    new = data.marks() if isinstance(data, HasMarks) else None
    if new is None:
        return None
    try:
        old = np.load(out / MARKS, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if old.dtype != np.uint64 or old.ndim != 2 or old.shape[1] != 2:
        return None
    found = compare(old, new)
    return found if found.added or found.removed or found.altered else None


def remember(out: Path, data: DataSet) -> None:
    """Keep what a later start compares with."""
    marks = data.marks() if isinstance(data, HasMarks) else None
    if marks is not None:
        temporary = out / f".{MARKS}"
        with temporary.open("wb") as file:
            np.save(file, marks, allow_pickle=False)
        temporary.replace(out / MARKS)
