"""Which of several processes this is, where a launcher started more than one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """This process among `world` that share the work."""

    rank: int = 0
    world: int = 1
    local: int = 0  # among those of this machine

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
