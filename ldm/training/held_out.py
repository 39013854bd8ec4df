"""Held-out loss by noise level, beside that of as many training samples: the gap tells what a model memorises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldm.data.buckets import bucket_stage
from ldm.data.dataset import Samples, loaded
from ldm.data.images import Shape
from ldm.diffusion.batch import ImageBatch, MomentBatch
from ldm.diffusion.rng import Rng, mix
from ldm.training.settings import BINS

if TYPE_CHECKING:
    from ldm.distributed.processes import Learners
    from ldm.families.family import Family
    from ldm.training.settings import Train

CHUNK = 16  # samples of one forward pass, whatever the batch and the number of processes: results depend on it in the last bits
Data = Samples[ImageBatch] | Samples[MomentBatch]


@dataclass(frozen=True)
class LossByLevel:
    """Mean losses in bins of noise level, from clean to noisy."""

    samples: int  # noised samples of each kind
    sigma: tuple[float, ...]  # the mean share of noise in each bin
    train: tuple[float, ...]  # of samples that are trained on
    held_out: tuple[float, ...]  # of samples that are not

    def means(self) -> dict[str, float]:
        """Over all bins alike: of training samples, of held-out ones, and what these are more."""
        train, held_out = (sum(values) / len(values) for values in (self.train, self.held_out))
        return {"train": train, "held_out": held_out, "gap": held_out - train}


@dataclass(frozen=True)
class Drawn:
    """One noised sample that is measured: which sample, in which shape, and its number, which addresses its noise."""

    index: int
    shape: Shape
    number: int


class HeldOutLoss:
    """Measures the loss on held-out samples and on as many that are trained on.

    Draw k has the same noise and the same noise level whenever it is measured, a function of the seed and k, and draw k of either
    kind has those of the other's. A kind that has fewer samples gives each several times, in other noise.

    Args:
        family: one that answers `loss_at`.
        data: what is trained on, pictures or cached latents.
        held_out: pictures that are not.
        own: how many of the data's first samples are compared (others preserve a prior); 0: all.
    """

    def __init__(
        self, family: Family, data: Data, held_out: Data, *, stage: Train, seed: int, own: int, processes: Learners, whole: bool
    ) -> None:
        self.family, self.stage, self.processes, self.whole = family, stage, processes, whole
        self.seed = mix(seed, "held_out") % 2**63
        self.samples = stage.held_out_plan[0]
        self._kinds: list[tuple[Data, list[list[Drawn]]]] = []
        for each, many in ((data, min(own or len(data), len(data))), (held_out, len(held_out))):
            self._kinds.append((each, list(self._chunks(each, many))))
        self._known: dict[tuple[int, int], MomentBatch] = {}  # what frozen networks made of a chunk, by kind and number

    def _chunks(self, data: Data, many: int) -> Iterator[list[Drawn]]:
        """Draws of a data set's first `many` samples, spread evenly over them, in chunks of one shape each."""
        several = min(many, self.samples)
        turn = math.lcm(several, BINS)  # so many draws until a sample would meet the same bin again
        index = [(k + k // turn) % several * many // several for k in range(self.samples)]
        shapes = self._shapes(data, index)
        for shape in dict.fromkeys(shapes):
            here = [Drawn(i, shape, k) for k, (i, own) in enumerate(zip(index, shapes, strict=True)) if own == shape]
            yield from (here[start : start + CHUNK] for start in range(0, len(here), CHUNK))

    def _shapes(self, data: Data, index: Sequence[int]) -> list[Shape]:
        stage = self.stage
        buckets = None
        if stage.buckets is not None:
            buckets = bucket_stage(data, stage.buckets, resolution=stage.resolution, seed=0, batch=1, steps=1)
        if buckets is None:
            return [stage.resolution] * len(index)
        shape_of = np.empty(len(data), np.int64)
        for number, members in enumerate(buckets.order.members):
            shape_of[members] = number
        return [buckets.order.shapes[shape_of[i]] for i in index]

    def measure(self, autocast: Callable[[], AbstractContextManager[Any]]) -> LossByLevel | None:
        """The losses with the weights as they are; every process must ask, the first one is answered.

        The chunks are shared by the processes where each has `whole` weights.
        """
        found: list[tuple[int, int, int, float, float]] = []  # kind, draw, bin, sigma, loss
        turn, turns = (self.processes.rank, self.processes.world) if self.whole else (0, 1)
        if self.whole or self.processes.main:
            for kind, (data, chunks) in enumerate(self._kinds):
                for number in range(turn, len(chunks), turns):
                    found += self._one(kind, number, data, chunks[number], autocast)
        found = sorted(self.processes.gather(found))
        if not self.processes.main:
            return None
        sigma = np.array([row[3] for row in found if row[0] == 0])
        bins = np.array([row[2] for row in found if row[0] == 0])
        losses = [np.array([row[4] for row in found if row[0] == kind]) for kind in (0, 1)]
        means = [tuple(float(values[bins == b].mean()) for b in range(BINS)) for values in (sigma, *losses)]
        return LossByLevel(self.samples, *means)

    @torch.no_grad()
    def _one(
        self, kind: int, number: int, data: Any, chunk: list[Drawn], autocast: Callable[[], AbstractContextManager[Any]]
    ) -> Iterator[tuple[int, int, int, float, float]]:
        numbers = [one.number for one in chunk]
        batch: Any = self._known.get((kind, number))
        if batch is None:
            batch = loaded(data, [one.index for one in chunk], numbers, chunk[0].shape, self.seed, False)
            batch = batch.to(self.processes.device)
            with autocast():
                known = self.family.known(batch)
            if known is not None:
                batch = self._known[kind, number] = known.to("cpu")
        rng = Rng(self.seed, numbers)
        bins = [k % BINS for k in numbers]
        level = (torch.tensor(bins) + rng.uniform("level")) / BINS
        with autocast():
            loss, sigma = self.family.loss_at(batch.to(self.processes.device), rng, level)
        rows = zip(numbers, bins, sigma.tolist(), loss.tolist(), strict=True)
        return ((kind, *row) for row in rows)
