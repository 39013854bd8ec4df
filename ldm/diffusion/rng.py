"""Counter-based random numbers, addressed, not remembered: each draw is a function of (seed, purpose, sample position)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


def mix(*words: int | str) -> int:
    """A 64-bit number that depends on every word and on their order (BLAKE2b)."""
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Rng:
    """One independent stream per sample and purpose (Philox, counter based).

    The draws for a sample do not depend on its neighbours, its rank or the batch size, so a resumed or redistributed run
    repeats them exactly and no generator state is ever stored.

    Args:
        seed: the run's (or an image's) seed.
        positions: the global sample positions, one per row of the batch.
    """

    def __init__(self, seed: int, positions: Sequence[int] | Tensor) -> None:
        self.seed = seed
        self.positions: list[int] = positions.tolist() if isinstance(positions, Tensor) else [int(p) for p in positions]

    def __len__(self) -> int:
        return len(self.positions)

    def streams(self, purpose: str) -> Iterator[np.random.Generator]:
        """One NumPy generator per sample."""
        first = mix(self.seed, purpose)
        for position in self.positions:
            key = np.array([first, position & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
            yield np.random.Generator(np.random.Philox(key=key))

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal draws, (B, *shape) float32 on the CPU."""
        out = np.empty((len(self), *shape), np.float32)
        for row, stream in zip(out.reshape(len(self), -1), self.streams(purpose), strict=True):
            stream.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(out)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0,1), (B, *shape) float64 on the CPU."""
        out = np.empty((len(self), *shape), np.float64)
        for row, stream in zip(out.reshape(len(self), -1), self.streams(purpose), strict=True):
            stream.random(out=row)
        return torch.from_numpy(out)
