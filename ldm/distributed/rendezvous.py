"""Rendezvous: the processes of a launch find each other in bounded time, and those that are missing are named."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError, first_line

if TYPE_CHECKING:
    from torch.distributed import Store

EVERY_S = 10.0  # between two words on who is awaited
TRY_S = 5.0  # of one try to reach the store
ANSWER_S = 20.0  # until a store that was reached must have answered
LOOK_S = 0.1  # between two looks at who has come
SESSION = "ldm/session"  # the key of the latest one


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a process tells of itself when it comes."""

    rank: int
    host: str  # its machine's name
    device: str  # the kind: cuda, xpu, mps, cpu
    unit: str = ""  # what tells this device from all others, where the device has such a name
    own: str = ""  # its machine's address on the way to the first one; empty where that is unknown
    first: str = ""  # the first machine's address, as it is known here


@dataclass(frozen=True)
class Met:
    """What the processes of a launch share once all have come."""

    session: str  # what tells this start from all others on the same store
    store: Store  # that connects them, for a process group
    interface: str  # of this machine's network, by which the others reach it; empty where all may be one machine, or it is unknown


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where the processes of a launch meet.

    Args:
        kept: whether the launcher keeps the store; else the first process does.
        limit: seconds after which a missing process ends all others.
    """

    rank: int
    world: int
    local: int
    address: str
    port: int
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
        kept = environment.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
        local = numbers["LOCAL_RANK"]
        return cls(rank=rank, world=world, local=local, address=address, port=port, kept=kept, limit=limit)

    @property
    def keeper(self) -> str:
        """Who keeps the store, in words."""
        return "the launcher" if self.kept else "rank 0"

    def connection(self, session: str, purpose: str) -> Store:
        """A further connection to the store, for keys of that session and purpose alone."""
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(self.address, self.port, None, False, timeout=timedelta(seconds=ANSWER_S))
        return PrefixStore(f"ldm/{session}/{purpose}", store)

    def meet(self, arrival: Arrival) -> Met:
        """Wait until all processes have come.

        The first process opens a session of its own name and looks after the others, and says every ten seconds who is missing. A launcher
        that starts all again keeps its store, with what former processes left there, and its agents count restarts apart: so those
        who join a session go on only when its verdict names them, and else join the next one.

        Raises:
            UserError: naming who did not come within the limit, or processes whose devices do not go together.
        """
        from torch.distributed import PrefixStore

        begun = time.monotonic()
        base = self._store(begun)
        base.set_timeout(timedelta(seconds=self.limit))
        own = os.urandom(8).hex()
        text = json.dumps({"came": own, **asdict(arrival)})
        known = ""
        try:
            if self.rank == 0:
                session, store = own, _of(own, base)
                store.set("here/0", text)
                base.set(SESSION, session)
                said = self._look(store, begun)
            else:
                session, said = self._join(base, own, text, begun)
                store = _of(session, base)
            if not said:
                known = str(store.get("first machine"), "utf-8")
        except Exception as error:  # the store is gone, with whoever kept it
            raise UserError(f"{self.keeper} ended while rank {self.rank} waited for the others ({first_line(error, 120)})") from None
        if said:
            self._heard(store)
            raise UserError(said)
        return Met(session, PrefixStore(f"ldm/{session}/group", base), interface(arrival.own, known))

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
                    f"MASTER_ADDR, MASTER_PORT: rank 0 cannot listen at {where} ({first_line(error, 120)});"
                    " the address must be this machine's, and the port a free one"
                ) from None
        told = begun
        while True:
            try:
                return TCPStore(self.address, self.port, None, False, timeout=timedelta(seconds=min(TRY_S, self.limit)))
            except Exception as error:
                why = first_line(error, 120)
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
                _decide(store, said, [key for rank, key in enumerate(keys) if rank not in absent])
                return said
            if absent:
                told = now
                _tell(f"{there} of {self.world} processes are here; waiting for {missing}", now - begun, self.limit)
        arrivals = _decide(store, None, keys)
        return together(arrivals)

    def _join(self, base: Store, own: str, text: str, begun: float) -> tuple[str, str]:
        """Join the first process' session; its name, and what is wrong there."""
        told, joined, over = begun, "", False
        while True:
            if base.check([SESSION]) and (session := str(base.get(SESSION), "utf-8")) != joined:
                joined, over = session, False
                _of(joined, base).set(f"here/{self.rank}", text)
            if joined and not over and _of(joined, base).check(["verdict"]):
                verdict = json.loads(_of(joined, base).get("verdict"))
                if own in verdict["came"]:
                    return joined, verdict["said"]
                over = True  # a session of former processes
            now = time.monotonic()
            if now - begun > self.limit + 2 * TRY_S:
                return joined, f"rank 0, which waits for all others, gives no sign of life after {self.limit:.0f} s (LDM_TIMEOUT_S)"
            if now - told > EVERY_S and self.local < 2 and (over or not joined):
                told = now
                _tell(f"rank {self.rank} waits for rank 0", now - begun, self.limit)
            time.sleep(LOOK_S)


def _of(session: str, base: Store) -> Store:
    """The keys of a session's rendezvous."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"ldm/{session}/rendezvous", base)


def _decide(store: Store, said: str | None, keys: list[str]) -> list[Arrival]:
    """Tell those who came what is wrong; None: what their devices say. Gives who came."""
    came = [json.loads(store.get(key)) for key in keys]
    names = [one.pop("came") for one in came]
    arrivals = [Arrival(**one) for one in came]
    store.set("first machine", next((one.first for one in arrivals if not _within(one.first)), ""))
    store.set("verdict", json.dumps({"said": together(arrivals) if said is None else said, "came": names}))
    return arrivals


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


def way(address: str, port: int) -> tuple[str, str]:
    """This machine's own address on the way to another one, and that one's; empty where the name is not known. Nothing is sent."""
    with suppress(OSError):
        family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as found:
            found.connect(where)
            return str(found.getsockname()[0]), str(found.getpeername()[0])
    return "", ""


def interface(own: str, first: str) -> str:
    """The network interface by which other machines reach this one; empty where it is not known.

    gloo would take the address that this machine's own name has. That is 127.0.1.1 as Debian installs it, and no other machine's
    processes get there.

    Args:
        own: this machine's address on the way to the first one, which the first one itself may know as 127.0.1.1 alone.
        first: the first machine's address as other machines know it.
    """
    import psutil

    wanted = first if _within(own) else own
    for name, addresses in psutil.net_if_addrs().items():
        if wanted and any(one.address.partition("%")[0] == wanted for one in addresses):
            return name
    return ""


def _within(address: str) -> bool:
    """Whether an address leads nowhere but to the machine itself."""
    return address in ("", "::1") or address.startswith("127.")


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
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
