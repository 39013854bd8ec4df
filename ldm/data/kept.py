"""Rows of a table that are a data set's samples, held as whichever are fewer: those that are, or those that are not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Kept:
    """A subset of the rows 0 to n - 1, in their order.

    Args:
        n: how many rows there are.
        rows: (K,) ascending, those that are kept; or with `out` those that are not.
    """

    def __init__(self, n: int, rows: NDArray[np.int64], out: bool = False) -> None:
        self.n, self._out = n, out
        if len(rows) > n // 2:
            mask = np.ones(n, bool)
            mask[rows] = False
            self._out, rows = not out, np.flatnonzero(mask)
        kind = np.uint32 if n < 2**32 else np.uint64
        self._rows: NDArray[Any] = rows.astype(kind)
        self._gaps = (rows - np.arange(len(rows))).astype(kind) if self._out else None  # how many are kept before each

    def __len__(self) -> int:
        return self.n - len(self._rows) if self._out else len(self._rows)

    def rows(self, index: ArrayLike | None = None) -> NDArray[np.int64]:
        """The rows of samples, by default of all of them; int64, of the shape of `index`."""
        wanted = np.arange(len(self)) if index is None else np.asarray(index, np.int64)
        if self._gaps is None:
            return self._rows[wanted].astype(np.int64)
        return wanted + np.searchsorted(self._gaps, wanted, side="right")

    def before(self, row: int) -> int:
        """How many samples lie before a row."""
        found = int(np.searchsorted(self._rows, row, side="left"))
        return row - found if self._out else found


class Repeated(Kept):
    """Rows that are kept, each as often as its number of times says.

    Args:
        kept: the rows.
        times: (n,) of all rows.
    """

    def __init__(self, kept: Kept, times: NDArray[Any]) -> None:
        self.n, self._out, self._gaps = kept.n, False, None
        rows = kept.rows()
        self._rows = np.repeat(rows, times[rows]).astype(np.uint32 if kept.n < 2**32 else np.uint64)
