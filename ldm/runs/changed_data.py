"""A changed data set: what differs from the one that a run was last started with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ldm.data.content import DataChange, HasMarks, compare

if TYPE_CHECKING:
    from ldm.data.sources import DataSet

MARKS = "data.npy"  # of the run folder: a hash of each sample's name, and one of its picture and captions


def marks_of(data: DataSet) -> NDArray[np.uint64] | None:
    """What a data set is compared by; None: it is made by rule, or too large."""
    return data.marks() if isinstance(data, HasMarks) else None


def data_change(out: Path, new: NDArray[np.uint64] | None) -> DataChange | None:
    """What has changed in the data set, whose marks are `new`, since the run's last start; None: nothing, or nothing tells."""
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


def remember(out: Path, marks: NDArray[np.uint64] | None) -> None:
    """Keep what a later start compares with."""
    if marks is not None:
        temporary = out / f".{MARKS}"
        with temporary.open("wb") as file:
            np.save(file, marks, allow_pickle=False)
        temporary.replace(out / MARKS)
