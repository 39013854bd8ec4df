"""An update that was not made, because something in it was not finite: which samples it was to be made of."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ldm.data.order import Order
    from ldm.data.sources import DataSet
    from ldm.log import Log

NAMED = 4  # samples in the line for the reader; log.jsonl names all


def rows_not_finite(batch: Any) -> list[int]:
    """The global positions of a batch's samples that hold NaN or infinity as they come from the data."""
    bad = torch.zeros(len(batch.position), dtype=torch.bool)
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            bad |= ~torch.isfinite(value.flatten(1)).all(1).cpu()
    return [int(position) for position in batch.position[bad.to(batch.position.device)]]


@dataclass(frozen=True)
class Skipped:
    """One such update."""

    data: DataSet
    batch: int  # rows of one, over all processes
    order: Order
    step: int
    norms: dict[str, float]  # of each player's gradient

    def tell(self, stage: str, bad: list[int], log: Log) -> None:
        """A line for the reader, and all samples of the batch in log.jsonl.

        Args:
            bad: positions of samples that were not finite before any network saw them.
        """
        first, last = self.step * self.batch, (self.step + 1) * self.batch
        index, _ = self.order.at(self.step, 0, self.batch)
        names = {first + i: self.data.origin(int(number)) for i, number in enumerate(index)}
        guilty = {position: names[position] for position in sorted(set(bad)) if position in names}
        norms = {name: norm if np.isfinite(norm) else str(norm) for name, norm in self.norms.items()}
        log.record({
            "skipped": {
                "positions": [first, last - 1], "samples": list(names.values()), "not_finite": list(guilty.values()), "norms": norms,
            },
            "stage": stage, "at_step": self.step, "images": last,
        })  # fmt: skip
        said = ", ".join(f"{name} {norm}" for name, norm in norms.items())
        more = f" and {len(guilty) - NAMED} more" if len(guilty) > NAMED else ""
        why = f"not finite as read: {', '.join(list(guilty.values())[:NAMED])}{more}; " if guilty else ""
        log.note(
            f"{stage}: step {self.step}: loss or gradient not finite (norms: {said}); this update is skipped by all processes."
            f" {why}its samples, positions {first} to {last - 1}, are named in log.jsonl"
        )
