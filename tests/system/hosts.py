"""Hosts: two machines that see each other by a cable alone, made of Linux namespaces.

Each has its own network, process numbers, name and /etc/hosts; killing its first process ends all that runs on it, as a power cut does.
Root and iproute2 are needed; nothing is left behind, since namespaces end with their processes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tiny

NAMES = ("gpu1", "gpu2")
ADDRESSES = ("10.0.0.1", "10.0.0.2")
DEBIAN = ("127.0.1.1", "127.0.1.1")  # what its installer writes into /etc/hosts for a machine's own name
TOOLS = ("ip", "unshare", "nsenter")


def missing() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if sys.platform != "linux" or os.geteuid():
        return "network namespaces need Linux and root"
    if absent := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"{', '.join(absent)}: not installed (Debian: iproute2, util-linux)"
    found = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return found.stderr.strip() if found.returncode else ""


@dataclass
class Host:
    """A machine.

    Args:
        resolves: the address that its own name has in its /etc/hosts.
    """

    number: int
    resolves: str
    folder: Path
    first: subprocess.Popen[bytes] = field(init=False)
    entered: list[subprocess.Popen[bytes]] = field(init=False, default_factory=list)
    inside: int = field(init=False)  # its first process, by its number outside

    def __post_init__(self) -> None:
        names = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True) if name != self.name]
        hosts = self.folder / f"{self.name}.hosts"
        hosts.write_text("\n".join(["127.0.0.1 localhost", f"{self.resolves} {self.name}", *names]) + "\n")
        said = f"hostname {self.name}; mount --bind {hosts} /etc/hosts; ip link set lo up; exec sleep infinity"
        words = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", said]
        self.first = subprocess.Popen(words)
        self.inside = _until(lambda: children(self.first.pid))[0]

    @property
    def name(self) -> str:
        """Its name."""
        return NAMES[self.number]

    @property
    def address(self) -> str:
        """Its address on the cable."""
        return ADDRESSES[self.number]

    def words(self, *command: str) -> list[str]:
        """A command as it is entered here."""
        return ["nsenter", "--target", str(self.inside), "--net", "--uts", "--mount", "--pid", "--wdns=" + str(tiny.ROOT), *command]

    def start(self, *command: str, **environment: str) -> Started:
        """A command on this host; what it says goes into a file."""
        said = self.folder / f"{self.name}-{len(list(self.folder.glob('*.said')))}.said"
        given = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "GLOO_"))}
        given |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        with said.open("wb") as file:
            process = subprocess.Popen(self.words(*command), env=given, stdout=file, stderr=subprocess.STDOUT)
        self.entered.append(process)
        return Started(self, process, said)

    def plug(self) -> None:
        """The cable is in."""
        for words in (["addr", "add", f"{self.address}/24", "dev", "cable"], ["link", "set", "cable", "up"]):
            subprocess.run(self.words("ip", *words), check=True)

    def unplug(self) -> None:
        """The cable is out: nothing arrives any more, not even a word of farewell."""
        subprocess.run(self.words("ip", "link", "set", "cable", "down"), check=True)

    def die(self) -> None:
        """The power is cut."""
        self.unplug()
        self.end()

    def end(self) -> None:
        """All that runs here is killed."""
        self.first.kill()  # --kill-child: its child goes with it, and with that, the first process here, everything
        self.first.wait()
        for process in self.entered:  # nsenter stays stopped where what it entered with was
            process.kill()
            process.wait()


@dataclass
class Started:
    """A command on a host."""

    host: Host
    process: subprocess.Popen[bytes]
    file: Path

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self.file.read_text(errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.host.name} has not ended after {seconds} s:\n{self.said}") from None

    def until(self, text: str, seconds: float) -> None:
        """Wait until it has said this."""
        end = time.monotonic() + seconds
        while text not in self.said:
            assert time.monotonic() < end and self.process.poll() is None, f"{self.host.name} has not said {text!r}:\n{self.said}"
            time.sleep(0.05)

    @property
    def leader(self) -> int:
        """The process of the command itself, by its number outside: nsenter's child."""
        return _until(lambda: children(self.process.pid))[0]

    @property
    def workers(self) -> list[int]:
        """What a launcher started, in the order of its ranks."""
        return sorted(children(self.leader))


def children(pid: int) -> list[int]:
    """The children of a process."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _until(found: object, seconds: float = 10.0) -> list[int]:
    """What a question gives, once it gives something."""
    end = time.monotonic() + seconds
    while not (given := found()):  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)
    return given  # type: ignore[no-any-return]


@contextmanager
def hosts(folder: Path, resolves: Sequence[str] = ADDRESSES) -> Iterator[list[Host]]:
    """Two hosts, connected; both see this machine's files."""
    made: list[Host] = []
    try:
        for number, own in enumerate(resolves):
            made.append(Host(number, own, folder))
        a, b = (str(host.inside) for host in made)
        for host in made:
            _until(lambda host=host: [1] if _named(host) else [])
        subprocess.run(["ip", "link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b], check=True)
        for host in made:
            host.plug()
        yield made
    finally:
        for host in made:
            host.end()


def _named(host: Host) -> bool:
    """Whether a host has come up."""
    found = subprocess.run(host.words("hostname"), capture_output=True, text=True)
    return found.stdout.strip() == host.name
