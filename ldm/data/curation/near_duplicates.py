"""Pictures that are nearly the same, by 64-bit perceptual hashes that differ in few bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def near_duplicates(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.bool_]:
    """Which of N hashes lie within `bits` of an earlier one that stays, (N,) bool.

    Two hashes that differ in at most d bits agree in one of d + 1 bands, so only rows that share a band are compared: within
    each band the rows are sorted, and each is compared with the next, the next but one, ... as long as their bands agree.
    """
    hashes = np.asarray(hashes, np.uint64)
    values, first = np.unique(hashes, return_index=True)
    twice = np.ones(len(hashes), bool)
    twice[first] = False
    if bits <= 0 or len(values) < 2:
        return twice
    order = np.argsort(first, kind="stable")
    values, first = values[order], first[order]
    earlier, later = _pairs(values, min(bits, 63))
    gone = np.zeros(len(values), bool)
    for i in np.lexsort((earlier, later)).tolist():
        if not gone[earlier[i]]:
            gone[later[i]] = True
    twice[first[gone]] = True
    return twice


def _pairs(values: NDArray[np.uint64], bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs (earlier, later) within `bits`, each once or a few times."""
    edges = np.linspace(0, 64, bits + 2).round().astype(int)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, here = band[order], values[order]
        active = np.arange(len(values) - 1)
        distance = 1
        while len(active := active[active < len(values) - distance]):
            active = active[band[active] == band[active + distance]]
            close = active[_ones(here[active] ^ here[active + distance]) <= bits]
            if len(close):
                found.append((order[close], order[close + distance]))
            distance += 1
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def _ones(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits are set (Warren, Hacker's Delight, figure 5-2)."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
