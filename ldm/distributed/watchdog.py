"""Watchdog: detects dead or hung ranks, names them in one line and ends the job in bounded time."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError

LIMIT = "LDM_TIMEOUT_S"  # how long a process may stand still within a training step
LIMIT_S = 600.0
SILENT_S = 30.0  # without a sign of life, and a process counts as dead or stopped
EXPLAIN_S = 8.0  # at most, from a broken connection to the word on what broke it
FAILED = 1  # exit code of a job that a process ended


def limit_s() -> float:
    """The seconds that LDM_TIMEOUT_S allows a process to stand still.

    Raises:
        UserError: where it is no number above 0.
    """
    text = os.environ.get(LIMIT, "")
    try:
        found = float(text or LIMIT_S)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UserError(f"{LIMIT}: got {text}; seconds above 0 are needed")
    return found


@dataclass(frozen=True)
class Verb:
    """What the processes do together."""

    name: str  # of ldm's verb
    again: str  # how to go on after a failure


TRAINING = Verb("train", "The same command goes on from the last checkpoint")


@dataclass(frozen=True)
class Place:
    """Where a process is: equal places are reached in the same order by all."""

    stage: int = 0  # how many stages it has begun
    step: int = -1
    part: int = 0  # within the step
    doing: str = "starting"
    limited: bool = False  # whether standing still here is a fault
    name: str = ""  # of the stage

    def __str__(self) -> str:
        step = f", step {self.step}" if self.step >= 0 else ""
        return f"{f'{self.name}{step}, ' if self.name else ''}{self.doing}"

    @property
    def order(self) -> tuple[int, int, int]:
        """Later places are larger."""
        return self.stage, self.step, self.part


@dataclass
class _Seen:
    """What is known of another process, in this one's own time."""

    tick: int = -1
    moved: int = -1
    place: Place = Place()
    ticked_at: float = 0.0
    moved_at: float = 0.0


class Watchdog:
    """Tells the others where this process is, and hears where they are, through the store that connected them.

    A thread of its own says twice a second that the process lives. The first process looks after all others, and they look
    after it. Where one is silent, or stands still in a step longer than the limit while all others wait for it, every
    process ends, and one of them says why.

    Args:
        store: a connection of this thread's own to the launch's key-value store.
        limit: seconds that a process may stand still within a step.
    """

    def __init__(self, store: Any, rank: int, world: int, limit: float, verb: Verb = TRAINING) -> None:
        self.store, self.rank, self.world, self.limit, self.verb = store, rank, world, limit, verb
        self.silent = min(SILENT_S, limit)
        self.period = min(0.5, self.silent / 10)
        self.folder: Path | None = None  # of the run, for stacks and the log
        self.place, self.moved = Place(), 0
        self._seen = {r: _Seen() for r in (range(world) if rank == 0 else [0, rank]) if r != rank}
        self._over = threading.Event()
        self._lock = threading.Lock()  # the store's connection serves one caller at a time
        self._word = threading.Lock()  # the main thread and the watchdog's may both have something to say
        self._tick = 0
        self._told = False
        self._gone: set[int] = set()
        self._cause, self._cause_at = "", 0.0
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # torchrun's or accelerate's, whose child this is
        self._asking = 0.0  # since when the store owes an answer; 0: it does not
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        self._closed = threading.Event()
        threading.Thread(target=self._listen, daemon=True, name="watchdog of the store").start()

    def at(self, place: Place) -> None:
        """This process is there now."""
        self.place, self.moved = place, self.moved + 1

    def close(self) -> None:
        """The work is done; nobody is looked after any more."""
        self._over.set()
        self._thread.join(5)
        self._closed.set()

    # The thread

    def _watch(self) -> None:
        now = time.monotonic()
        for seen in self._seen.values():
            seen.ticked_at = seen.moved_at = now
        own = _Seen(moved=self.moved, place=self.place, ticked_at=now, moved_at=now)
        before = now
        while not self._over.wait(self.period):
            try:
                self._say()
                verdict, self._cause = self._get("verdict"), self._get("cause")
                self._hear()
            except Exception:
                self._lost()
                return
            now = time.monotonic()
            if now - before > self.silent / 2:  # this process itself was stopped for a while: begin to count anew
                for seen in (*self._seen.values(), own):
                    seen.ticked_at = seen.moved_at = now
            before = now
            if own.moved != self.moved:
                own.moved, own.place, own.moved_at = self.moved, self.place, now
            if not verdict and (found := self._judge(own, now)):
                verdict = self._first("verdict", json.dumps(found))
            if verdict and not self._over.is_set():
                self._end(json.loads(verdict))
            self._follow(now)

    def _listen(self) -> None:
        """Ends this process where the store does not answer: its machine has no power, or its process is stopped.

        A request waits then until the system gives the connection up, which takes a quarter of an hour or has no end.
        """
        before = time.monotonic()
        while not self._closed.wait(self.period):
            now, asking = time.monotonic(), self._asking
            if now - before > self.silent / 2 and asking:  # this process itself was stopped for a while
                self._asking = now
            elif asking and now - asking > self.silent:
                self._speak(f"{_keeper()} gives no sign of life any more, killed or stopped (rank {self.rank} waits in {self.place})")
                os._exit(FAILED)
            before = now

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Within it the store is asked something."""
        with self._lock:
            self._asking = time.monotonic()
            try:
                yield
            finally:
                self._asking = 0.0

    def _say(self) -> None:
        self._tick += 1
        with self._asked():
            self.store.set(f"at/{self.rank}", json.dumps([self._tick, self.moved, asdict(self.place)]))

    def _hear(self) -> None:
        now = time.monotonic()
        for rank, seen in self._seen.items():
            text = self._get(f"at/{rank}")
            if not text:
                continue
            tick, moved, place = json.loads(text)
            if tick != seen.tick:
                seen.tick, seen.ticked_at = tick, now
            if moved != seen.moved:
                seen.moved, seen.moved_at, seen.place = moved, now, Place(**place)

    def _judge(self, own: _Seen, now: float) -> dict[str, Any] | None:
        """Who is at fault, if anybody."""
        if self._launcher not in (
            0,
            os.getppid(),
        ):  # nobody would start this process again, nor end it; its successors would write beside it
            return {"text": f"the launcher of rank {self.rank} is gone, killed or out of memory ({own.place})", "hung": []}
        quiet = {rank: seen for rank, seen in self._seen.items() if seen.tick >= 0 and now - seen.ticked_at > self.silent}
        if quiet:
            who = ", ".join(str(rank) for rank in sorted(quiet))
            text = f"rank {who} gives no sign of life any more, killed or stopped (rank {self.rank} waits in {own.place})"
            return {"text": text, "hung": []}
        if self.rank:  # who hangs is seen by the first process alone, which knows all places
            return None
        everyone = self._seen | {self.rank: own}
        last = min(seen.place.order for seen in everyone.values())
        hung = {rank: seen for rank, seen in everyone.items() if seen.place.order == last}
        # Those who stand further on only wait for these.
        if not all(seen.place.limited and now - seen.moved_at > self.limit for seen in hung.values()):
            return None
        ranks = ", ".join(str(rank) for rank in sorted(hung))
        place = next(iter(hung.values())).place
        return {"text": f"rank {ranks} has not moved for {self.limit:.0f} s ({place})", "hung": sorted(hung)}

    def _follow(self, now: float) -> None:
        """Another process failed and told why: this one ends too, if its main thread does not notice by itself."""
        if not self._cause or self._over.is_set():
            return
        self._cause_at = self._cause_at or now
        if now - self._cause_at > self.period:
            self._bye()
            os._exit(_code(self._cause))

    def _lost(self) -> None:
        """The store is gone, with the process that kept it: this one ends here, unless its main thread already does."""
        if self._over.is_set():
            return
        if not self._cause:
            self._speak(self._without_store())
        os._exit(_code(self._cause))

    def _without_store(self) -> str:
        return f"{_keeper()} is gone, killed or out of memory (rank {self.rank} waits in {self.place})"

    def _bye(self) -> None:
        """This process needs the store no more; the first one, which may keep it, waits for all others."""
        with suppress(Exception):
            self._first(f"bye/{self.rank}", "1")
            if self.rank or _agent():
                return
            end = time.monotonic() + 5 + 3 * self.period
            others = set(range(1, self.world)) - self._gone
            while time.monotonic() < end and not all(self._get(f"bye/{rank}") for rank in others):
                time.sleep(0.02)

    def _end(self, verdict: dict[str, Any]) -> None:
        """This process ends here, from its thread: its main thread waits in vain."""
        stacks = ""
        if verdict["hung"]:
            stacks = f"; stacks in {self.folder / 'stacks'}" if self.folder else ""
            self._stacks()
        text = f"{verdict['text']}; all processes end{stacks}. {self.verb.again}"
        self._speak(self._elected(text))
        sys.stderr.flush()
        self._bye()
        os._exit(FAILED)

    def _stacks(self) -> None:
        if self.folder is None:
            return
        try:
            (self.folder / "stacks").mkdir(exist_ok=True)
            with (self.folder / "stacks" / f"rank-{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            return

    # What ended the job

    def failed(self, error: BaseException, hint: str = "") -> int:
        """Called by the main thread when it fails: tells what ended the job, unless another process does; gives the exit code.

        A broken connection is no cause: the word of the process that broke it is waited for, or its silence. Only the first
        cause is told.

        Args:
            hint: what is told behind the error where no process broke the connection.
        """
        self._over.set()
        self._speak(self._cause_of(error, hint))
        user = isinstance(error, UserError) or self._user_caused()
        self._bye()
        return 2 if user else FAILED

    def _cause_of(self, error: BaseException, hint: str) -> str:
        try:
            mine = json.dumps({"rank": self.rank, "place": str(self.place), "error": _named(error), "user": isinstance(error, UserError)})
            found = self._explained() if broken(error) else self._first("cause", mine)
            if not found:
                return self._elected(f"the connection to the other processes broke ({_first_line(error)}; {self.place}){hint}")
            cause = json.loads(found)
            if cause["rank"] == self.rank:
                return f"rank {cause['rank']} ({cause['place']}): {cause['error']}"
            if cause["error"]:
                return ""
            return self._elected(f"rank {cause['rank']} is gone, killed or out of memory (rank {self.rank} waits in {self.place})")
        except Exception:
            # Without the store nobody knows what the others know; they tell it themselves.
            if not broken(error):
                return f"rank {self.rank} ({self.place}): {_named(error)}"
            return "" if self._cause else self._without_store()

    def _user_caused(self) -> bool:
        """Whether the first cause is a mistake that the user can mend."""
        try:
            return _code(self._get("cause")) != FAILED
        except Exception:
            return _code(self._cause) != FAILED

    def _explained(self) -> str:
        """The cause that another process has told, or that its silence tells; this process itself still gives signs of life."""
        before: dict[int, tuple[int, Place]] = {}
        quiet_since: dict[int, float] = {}
        end = time.monotonic() + EXPLAIN_S
        while time.monotonic() < end:
            self._say()
            if cause := self._get("cause"):
                return cause
            now = time.monotonic()
            for rank in range(self.world):
                text = self._get(f"at/{rank}")
                tick, _, place = json.loads(text) if text else (-1, 0, asdict(Place()))
                if rank not in before or before[rank][0] != tick:
                    before[rank], quiet_since[rank] = (tick, Place(**place)), now
            quiet = [r for r, since in quiet_since.items() if r != self.rank and now - since > max(1.5, 4 * self.period)]
            if quiet:
                rank, self._gone = quiet[0], set(quiet)
                return json.dumps({"rank": rank, "place": str(before[rank][1]), "error": "", "user": False})
            time.sleep(0.1)
        return ""

    def _speak(self, text: str) -> None:
        """To the console, the log and the launcher, if there is something to say and this process has not had its last word."""
        with self._word:
            if text and not self._told:
                say(text, self.folder, self.place, self.verb.name)
            self._told = True

    def _elected(self, text: str) -> str:
        """The text, where this process is the first that comes to speak for the job; else nothing."""
        try:
            return text if self._first("teller", str(self.rank)) == str(self.rank) else ""
        except Exception:
            return text  # no store, so nobody else knows either

    # The store

    def _get(self, key: str) -> str:
        with self._asked():
            return str(self.store.get(key), "utf-8") if self.store.check([key]) else ""

    def _first(self, key: str, value: str) -> str:
        """What the first process that came here has put down under the key."""
        with self._asked():
            return str(self.store.compare_set(key, "", value), "utf-8")


def _code(cause: str) -> int:
    """The exit code of processes that end for a cause, as the store has it: 2 where the user can mend it."""
    return 2 if cause and json.loads(cause)["user"] else FAILED


def broken(error: BaseException) -> bool:
    """Whether an error only says that another process could not be reached."""
    from torch.distributed import DistError

    words = ("gloo", "connection closed by peer", "connection reset by peer", "nccl")
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def say(text: str, folder: Path | None, place: Place, verb: str = TRAINING.name) -> None:
    """One line on standard error, one in the log, and one for torchrun's summary."""
    print(f"ldm {verb}: {text}", file=sys.stderr, flush=True)
    if folder is not None:
        line = {"failed": text, "place": asdict(place), "time": round(time.time(), 3)}
        with suppress(OSError), (folder / "log.jsonl").open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        word = {"message": text, "extraInfo": {"py_callstack": "", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": word}))


def _keeper() -> str:
    """Who keeps the store, with whom the job ends."""
    return "the launcher" if _agent() else "rank 0"


def _agent() -> bool:
    """Whether the launcher keeps the store, which then outlives every process."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"


def _named(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
