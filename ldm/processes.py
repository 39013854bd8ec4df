"""Which of several processes this is, and what they do together. All of accelerate is here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.families.family import Family, Ranks


@dataclass
class Processes:
    """This process among `world` that share the work."""

    rank: int = 0
    world: int = 1
    local: int = 0  # among those of this machine

    @property
    def main(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces are this process'."""
        each = -(-count // self.world)
        return range(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def wait(self) -> None:
        """Until all have come this far."""
        if self.world > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def gather(self, values: list[Any]) -> list[Any]:
        """Everyone's values, in the order of the ranks."""
        if self.world == 1:
            return values
        from accelerate.utils import gather_object

        return list(gather_object(values))


def processes(cpu: bool) -> Processes:
    """This process, connected to the others that `accelerate launch` or `torchrun` started with it, if any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=cpu)
    return Processes(state.process_index, state.num_processes, state.local_process_index)


class Learners(Processes):
    """The processes of a training launch: they hold the same weights, and average their gradients."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        # Precision is the stage's, not the launcher's: stages of one run may differ in it.
        self.accelerator = Accelerator(mixed_precision="no")
        super().__init__(self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.local_process_index)
        self.device: torch.device = self.accelerator.device

    def mean(self, tensor: Tensor) -> Tensor:
        """The average over processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor.clone(), "mean")

    def ranks(self) -> Ranks:
        """What a family may know of all this."""
        from ldm.families.family import Ranks

        return Ranks(rank=self.rank, world=self.world, mean=self.mean)

    def wrap(self, family: Family) -> torch.nn.Module:
        """The family on this process's device, its gradients averaged over processes in every backward pass."""
        return self.accelerator.prepare_model(family)

    def apart(self, model: torch.nn.Module) -> Any:
        """Within it gradients stay on this process (all micro-batches but the last)."""
        return self.accelerator.no_sync(model)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        if self.world == 1:
            return flag
        import torch

        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())


class Stopped(Exception):
    """Training was asked to stop, and its state is saved."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within it SIGTERM and SIGINT ask for a stop after the present step; a second one stops at once."""
    asked: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever owns it handles signals
        old = {}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
