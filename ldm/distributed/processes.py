"""Process group: rank, world size and collectives; the only file that knows accelerate."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from ldm.config.errors import UserError
from ldm.config.secrets import redacted
from ldm.config.terminal import shown
from ldm.distributed.launcher import here
from ldm.distributed.rendezvous import Arrival, Meeting, host, way
from ldm.distributed.sharding import shard
from ldm.distributed.watchdog import TRAINING, Place, Verb, Watchdog, broken, limit_s

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import Tensor

    from ldm.families.family import Family, Ranks


INTERFACE = "GLOO_SOCKET_IFNAME"  # the network interface that gloo uses
LONG = timedelta(days=7)  # for the first process's work alone, an evaluation say; who stands still is the watchdog's to find
ALONE = 1 << 30  # behind every other part of a step


@dataclass
class Processes:
    """This process among `world` that share the work."""

    rank: int = 0
    world: int = 1
    local: int = 0  # among those of this machine
    watchdog: Watchdog | None = field(default=None, kw_only=True)

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

    def ended(self, error: BaseException) -> int:
        """After a failure that leaves the others waiting: says what was its first cause, and gives the exit code."""
        assert self.watchdog is not None
        if not isinstance(error, UserError) and not broken(error):
            print(shown(redacted("".join(traceback.format_exception(error)))), end="", file=sys.stderr)
        return self.watchdog.failed(error)

    def close(self) -> None:
        """All have come to the end."""
        if self.watchdog is not None:
            self.wait()
            self.watchdog.close()
            self.wait()
            self.watchdog = None


@contextmanager
def processes(cpu: bool, verb: Verb) -> Iterator[Processes]:
    """This process, connected to the others that `accelerate launch`, `torchrun` or `srun` started with it, if any.

    Within it the watchdog ends all processes when one of them is killed or stopped, and says why.

    Raises:
        UserError: naming who did not come, or a variable of the launcher that is wrong.
    """
    if here().world == 1:
        yield Processes()
        return
    state, watchdog = _connected(cpu or not _accelerated(), limit_s(), verb)
    found = Processes(state.process_index, state.num_processes, state.local_process_index, watchdog=watchdog)
    watchdog.at(Place(doing="working"))
    try:
        yield found
        found.close()
    except Exception as error:
        leave(found.ended(error))


def _accelerated() -> bool:
    """Whether this machine has an accelerator that the launch may use."""
    import torch

    return torch.accelerator.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")


def _arrival(meeting: Meeting, cpu: bool) -> Arrival:
    """This process and the device that will be its own."""
    import torch

    device = None if cpu else torch.accelerator.current_accelerator()
    own, first = way(meeting.address, meeting.port)
    come = Arrival(rank=meeting.rank, host=host(), device="cpu" if device is None else device.type, own=own, first=first)
    if come.device != "cuda":
        return come
    card = torch.cuda.get_device_properties(meeting.local % torch.cuda.device_count())
    return replace(come, unit=str(getattr(card, "uuid", "")))


def _connected(cpu: bool, limit: float, verb: Verb) -> tuple[PartialState, Watchdog]:
    """Accelerate's state of this process, once all have met, and the watchdog, which has them in sight before they are connected."""
    from accelerate import PartialState

    meeting = Meeting.told(os.environ, limit)
    met = meeting.meet(_arrival(meeting, cpu))
    watchdog = Watchdog(meeting.connection(met.session, "watchdog"), meeting.rank, meeting.world, limit, verb)
    if met.interface:
        os.environ.setdefault(INTERFACE, met.interface)
    watchdog.at(Place(doing="connecting"))
    try:
        state = PartialState(cpu=cpu, store=met.store, rank=meeting.rank, world_size=meeting.world, timeout=LONG)
    except RuntimeError as error:
        took = f"{INTERFACE}={os.environ[INTERFACE]}" if INTERFACE in os.environ else f"{INTERFACE} is not set"
        leave(watchdog.failed(error, f"; {took}: it and NCCL_SOCKET_IFNAME name the network by which the machines reach each other"))
    if state.num_processes != meeting.world:
        raise UserError(f"WORLD_SIZE: {meeting.world}, but {state.num_processes} processes are connected; start with torchrun")
    return state, watchdog


class Learners(Processes):
    """The processes of a training launch: they hold the same weights, and average their gradients.

    Raises:
        UserError: for a launcher's wish that `ldm` does not have, or variables that contradict each other.
    """

    def __init__(self) -> None:
        self.launch = here()
        limit = limit_s()
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND"):  # what they ask for is done or told of here
            os.environ.pop(name, None)
        cpu = not _accelerated()
        watchdog = _connected(cpu, limit, TRAINING)[1] if self.launch.world > 1 else None
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        from ldm.models.gpu_form import round_products

        # Families keep their buffers equal themselves. Precision is the stage's, not the launcher's: stages of one run may differ.
        keywords = [DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)]
        self.accelerator = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=keywords)
        own = self.accelerator
        super().__init__(own.process_index, own.num_processes, own.local_process_index, watchdog=watchdog)
        self.device: torch.device = self.accelerator.device
        round_products(to_tf32=False)  # but for stages that say otherwise
        self.sharded = self.launch.sharded and self.world > 1  # what families allow it for
        self._stages = 0  # that have begun, those of training twice

    def begin(self, stage: str, doing: str) -> None:
        """This process has come to a stage; what it does there before any step may take its time."""
        self._stages += 1
        self.alone(stage, -1, doing)

    def at(self, stage: str, step: int, doing: str, part: int) -> None:
        """This process has come to that part of a training step, and should soon go on."""
        if self.watchdog is not None:
            self.watchdog.at(Place(self._stages, step, part, doing, True, stage))

    def alone(self, stage: str, step: int, doing: str) -> None:
        """What this process does now may take its time, and the others wait."""
        if self.watchdog is not None:
            self.watchdog.at(Place(self._stages, step, ALONE, doing, False, stage))

    def mean(self, tensor: Tensor) -> Tensor:
        """The average over processes."""
        return tensor if self.world == 1 else self.accelerator.reduce(tensor.clone(), "mean")

    def ranks(self) -> Ranks:
        """What a family may know of all this."""
        from ldm.families.family import Ranks

        return Ranks(rank=self.rank, world=self.world, mean=self.mean)

    def split(self, family: Family) -> bool:
        """Split the family's parameters over the processes where the launch asks for it and the family allows it; whether it was done."""
        self.sharded = self.launch.splits(family.shardable)
        if self.sharded:
            shard(family, self.device, self.world)
        return self.sharded

    def wrap(self, family: Family) -> torch.nn.Module:
        """What gives the family's loss, with gradients averaged over processes in every backward pass."""
        self._stages += 1
        self.accelerator.free_memory()  # of the models of earlier stages
        if self.sharded:
            return family
        # Gradients of 1x1 convolutions may lie in either of two layouts; the copy that one of them needs is nothing to act on.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)  # open_clip's
        with warnings.catch_warnings():  # torch 2.15 renames the option; older ones know the old name alone
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return self.accelerator.prepare_model(family)

    @contextmanager
    def apart(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it gradients stay on this process (all micro-batches but the last)."""
        if not self.sharded:
            with self.accelerator.no_sync(model):
                yield
            return
        switch: Callable[[bool], None] = model.set_requires_gradient_sync  # type: ignore[assignment]
        switch(False)
        try:
            yield
        finally:
            switch(True)

    def chained(self, parts: list[Tensor]) -> Tensor:
        """The sum of everyone's parts, added one by one in the order of the ranks and of each one's list."""
        import torch
        from torch import distributed

        total, own = parts[0].clone(), parts[1:]
        if self.rank:
            total, own = torch.empty_like(total), parts
            distributed.recv(total, src=self.rank - 1)
        for part in own:
            total += part
        if self.world > 1:
            if self.rank < self.world - 1:
                distributed.send(total, dst=self.rank + 1)
            distributed.broadcast(total, src=self.world - 1)
        return total

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any process says so."""
        if self.world == 1:
            return flags
        import torch

        found = self.accelerator.reduce(torch.tensor([float(flag) for flag in flags], device=self.device), "sum")
        return tuple(bool(value) for value in found.tolist())


def leave(code: int) -> NoReturn:
    """End a process that was connected to others: at once, since gloo's threads may abort it when they are taken down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
