"""Counter-based random numbers, addressed, not remembered: each draw is a function of (seed, purpose, sample position)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor


def mix(*words: int | str) -> int:
    """A 64-bit number that depends on every word and on their order (BLAKE2b)."""
    text = "\x1f".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


Draw = tuple[str, str, tuple[int, ...]]  # what is drawn: its kind, its purpose and its shape
Makers = dict[Draw, Callable[["Rng"], Tensor]]  # how to make each draw, a pure function of seed and positions
HOST = ("uniform",)  # kinds that stay on the CPU: few numbers, in float64, which not every device has


class Rng:
    """One independent stream per sample and purpose (Philox, counter based).

    The draws for a sample do not depend on its neighbours, its rank or the batch size, so a resumed or redistributed run
    repeats them exactly and no generator state is ever stored. So they may be made before anybody asks, too.

    Args:
        seed: the run's (or an image's) seed.
        positions: the global sample positions, one per row of the batch.
        ahead: draws that were made already, perhaps on a device.
        asked: is told how to make each draw that was asked for and had not been made.
    """

    def __init__(
        self, seed: int, positions: Sequence[int] | Tensor, ahead: Mapping[Draw, Tensor] | None = None, asked: Makers | None = None
    ) -> None:
        self.seed = seed
        self.positions: list[int] = positions.tolist() if isinstance(positions, Tensor) else [int(p) for p in positions]
        self.ahead, self.asked = ahead or {}, asked

    def __len__(self) -> int:
        return len(self.positions)

    def streams(self, purpose: str) -> Iterator[np.random.Generator]:
        """One NumPy generator per sample."""
        first = mix(self.seed, purpose)
        for position in self.positions:
            key = np.array([first, position & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
            yield np.random.Generator(np.random.Philox(key=key))

    def made(self, draw: Draw, make: Callable[[Rng], Tensor]) -> Tensor:
        """A tensor (B,...) that is a function of seed and positions alone: as it was made ahead, or as `make` makes it now, on the CPU."""
        if draw in self.ahead:
            return self.ahead[draw]
        if self.asked is not None:
            self.asked[draw] = make
        return make(Rng(self.seed, self.positions))  # what that draws is a part of it, and nothing by itself

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal draws, (B, *shape) float32; on the CPU unless they were made ahead."""
        size = tuple(shape)
        return self.made(("normal", purpose, size), partial(_normal, purpose=purpose, shape=size))

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform draws in [0,1), (B, *shape) float64 on the CPU."""
        size = tuple(shape)
        return self.made(("uniform", purpose, size), partial(_uniform, purpose=purpose, shape=size))


def _normal(rng: Rng, purpose: str, shape: tuple[int, ...]) -> Tensor:
    out = np.empty((len(rng), *shape), np.float32)
    for row, stream in zip(out.reshape(len(rng), -1), rng.streams(purpose), strict=True):
        stream.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def _uniform(rng: Rng, purpose: str, shape: tuple[int, ...]) -> Tensor:
    out = np.empty((len(rng), *shape), np.float64)
    for row, stream in zip(out.reshape(len(rng), -1), rng.streams(purpose), strict=True):
        stream.random(out=row)
    return torch.from_numpy(out)
