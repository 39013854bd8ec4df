"""Rendezvous: the processes of a launch find each other in bounded time, and those that are missing are named."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

EVERY_S = 10.0  # between two words on who is awaited
TRY_S = 5.0  # of one try to reach the store
ANSWER_S = 20.0  # until a store that was reached must have answered
LOOK_S = 0.1  # between two looks at who has come


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a process tells of itself when it comes."""

    rank: int
    host: str  # its machine's name
    device: str  # the kind: cuda, xpu, mps, cpu
    unit: str = ""  # what tells this device from all others, where the device has such a name


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the processes of a launch meet.

    Args:
        attempt: what tells a start of the launcher from the one before, whose keys may still stand in the launcher's store.
        kept: whether the launcher keeps the store; else the first process does.
        limit: seconds after which a missing process ends all others.
    """

    rank: int
    world: int
    local: int
    address: str
    port: int
    attempt: str
    kept: bool
    limit: float

    @classmethod
    def told(cls, environment: Mapping[str, str], limit: float) -> Meeting:
        """What a launcher's variables say.

        Raises:
            UserError: naming the variable that is missing or no whole number.
        """
        numbers = {}
        for name, otherwise in (("RANK", ""), ("WORLD_SIZE", ""), ("LOCAL_RANK", "0"), ("MASTER_PORT", "")):
            text = environment.get(name) or otherwise
            if not text.isdecimal():
                raise UserError(f"{name}: got {text or 'nothing'}; several processes need a whole number there, which launchers set")
            numbers[name] = int(text)
        rank, world, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
        if rank >= world:
            raise UserError(f"RANK: got {rank}; with WORLD_SIZE {world} it is 0 to {world - 1}")
        if not 0 < port < 1 << 16:
            raise UserError(f"MASTER_PORT: got {port}; it is 1 to 65535")
        if not (address := environment.get("MASTER_ADDR", "")):
            raise UserError("MASTER_ADDR: got nothing; several processes need the first one's address there, which launchers set")
        attempt = f"{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}.{world}"
        kept = environment.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
        local = numbers["LOCAL_RANK"]
        return cls(rank=rank, world=world, local=local, address=address, port=port, attempt=attempt, kept=kept, limit=limit)

    @property
    def keeper(self) -> str:
        """Who keeps the store, in words."""
        return "the launcher" if self.kept else "rank 0"

    def connection(self, purpose: str) -> Store:
        """A further connection to the store, for keys of that purpose alone."""
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(self.address, self.port, None, False, timeout=timedelta(seconds=ANSWER_S))
        return PrefixStore(f"ldm/{self.attempt}/{purpose}", store)

    def meet(self, arrival: Arrival) -> Store:
        """Wait until all processes have come; the store that connects them, for a process group.

        The first that comes looks after the others, and says every ten seconds who is missing.

        Raises:
            UserError: naming who did not come within the limit, or processes whose devices do not go together.
        """
        from torch.distributed import PrefixStore

        begun = time.monotonic()
        base = self._store(begun)
        base.set_timeout(timedelta(seconds=self.limit))
        store = PrefixStore(f"ldm/{self.attempt}/rendezvous", base)
        try:
            first = str(store.compare_set("first", "", str(self.rank)), "utf-8") == str(self.rank)
            store.set(f"here/{self.rank}", json.dumps(asdict(arrival)))
            said = self._look(store, begun) if first else self._verdict(store, begun)
        except Exception as error:  # the store is gone, with whoever kept it
            raise UserError(
                f"{self.keeper} ended while rank {self.rank} waited for the others ({str(error).splitlines()[0][:120]})"
            ) from None
        if said:
            self._heard(store)
            raise UserError(said)
        return PrefixStore(f"ldm/{self.attempt}/group", base)

    def _heard(self, store: Store) -> None:
        """A refusal was heard; who keeps the store leaves last."""
        with suppress(Exception):
            store.set(f"heard/{self.rank}", "1")
            end = time.monotonic() + TRY_S
            came = [f"heard/{rank}" for rank in range(self.world) if store.check([f"here/{rank}"])]
            while self.rank == 0 and not self.kept and time.monotonic() < end and not all(store.check([key]) for key in came):
                time.sleep(LOOK_S)

    def _store(self, begun: float) -> Any:
        """The store itself: kept here by the first process, else reached for until the limit."""
        from torch.distributed import TCPStore

        where = f"{self.address}:{self.port}"
        if self.rank == 0 and not self.kept:
            try:
                return TCPStore(
                    self.address, self.port, self.world, True, timedelta(seconds=TRY_S), wait_for_workers=False, multi_tenant=True
                )
            except Exception as error:
                raise UserError(
                    f"MASTER_ADDR, MASTER_PORT: rank 0 cannot listen at {where} ({str(error).splitlines()[0][:120]});"
                    " the address must be this machine's, and the port a free one"
                ) from None
        told = begun
        while True:
            try:
                return TCPStore(self.address, self.port, None, False, timeout=timedelta(seconds=min(TRY_S, self.limit)))
            except Exception as error:
                why = str(error).splitlines()[0][:120]
            now = time.monotonic()
            if now - begun > self.limit:
                raise UserError(
                    f"{self.keeper} was not reached at {where} within {self.limit:.0f} s (LDM_TIMEOUT_S): {why};"
                    " is it started, and may this machine connect to that port?"
                )
            if now - told > EVERY_S and self.local < 2:  # one of this machine's, or two, not all of them
                told = now
                _tell(f"rank {self.rank} waits for {self.keeper} at {where}", now - begun, self.limit)
            time.sleep(min(1.0, self.limit / 10))

    def _look(self, store: Store, begun: float) -> str:
        """Wait for all; tells the others what is wrong, empty where nothing is."""
        told, keys = begun, [f"here/{rank}" for rank in range(self.world)]
        while not store.check(keys):
            time.sleep(LOOK_S)
            now = time.monotonic()
            if now - told < EVERY_S and now - begun <= self.limit:
                continue
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            missing, there = _ranks(absent), self.world - len(absent)
            if absent and now - begun > self.limit:
                said = f"{missing} did not come within {self.limit:.0f} s (LDM_TIMEOUT_S): {there} of {self.world} processes were here"
                store.set("verdict", said)
                return said
            if absent:
                told = now
                _tell(f"{there} of {self.world} processes are here; waiting for {missing}", now - begun, self.limit)
        arrivals = [Arrival(**json.loads(store.get(f"here/{rank}"))) for rank in range(self.world)]
        said = together(arrivals)
        store.set("verdict", said)
        return said

    def _verdict(self, store: Store, begun: float) -> str:
        """Wait for what the first one says."""
        while not store.check(["verdict"]):
            if time.monotonic() - begun > self.limit + 2 * TRY_S:
                first = str(store.get("first"), "utf-8")
                return f"rank {first}, which waited for all others, gives no sign of life after {self.limit:.0f} s (LDM_TIMEOUT_S)"
            time.sleep(LOOK_S)
        return str(store.get("verdict"), "utf-8")


def together(arrivals: list[Arrival]) -> str:
    """What keeps processes from working together, in one line; empty where nothing does."""
    kinds: dict[str, list[int]] = {}
    units: dict[str, list[Arrival]] = {}
    for one in arrivals:
        kinds.setdefault(one.device, []).append(one.rank)
        if one.unit:
            units.setdefault(one.unit, []).append(one)
    if len(kinds) > 1:
        by = {one.rank: one.host for one in arrivals}
        said = "; ".join(f"{kind}: {_ranks(ranks)} (on {by[ranks[0]]})" for kind, ranks in kinds.items())
        return (
            f"the processes have devices of different kinds, {said}; a machine whose driver is missing finds its CPU alone:"
            " mend it, leave it out, or set ACCELERATE_USE_CPU=1 everywhere"
        )
    for shared in units.values():
        if len(shared) > 1:
            return (
                f"{_ranks([one.rank for one in shared])} have the same GPU of {shared[0].host}; start one process for each GPU"
                " that it sees (srun: --gpus-per-task=1, or as many tasks as GPUs)"
            )
    return ""


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 1, 4-7`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    said = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:8]) + (", ..." if len(runs) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {said}"


def _tell(text: str, seconds: float, limit: float) -> None:
    print(f"ldm: {text} ({seconds:.0f} s; ends after {limit:.0f}, LDM_TIMEOUT_S)", file=sys.stderr, flush=True)


def host() -> str:
    """This machine's name, as Slurm or the system has it."""
    import socket

    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
