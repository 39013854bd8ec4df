"""The processes of a launch meet in bounded time; who is missing is named while it is awaited and when it is given up."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import NamedTuple

import pytest
import several

from ldm.config.errors import UserError
from ldm.distributed import rendezvous
from ldm.distributed.rendezvous import Arrival, Meeting, interface, together, way

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def meetings(world: int, limit: float = 60.0) -> list[Meeting]:
    port = several.free_port()
    common = {"world": world, "address": "127.0.0.1", "port": port, "kept": False, "limit": limit}
    return [Meeting(rank=rank, local=rank, **common) for rank in range(world)]  # type: ignore[arg-type]


def gathered(come: list[Meeting], devices: list[str] | None = None) -> dict[int, object]:
    """What each process' meeting gave: its store or its error."""
    found: dict[int, object] = {}

    def one(meeting: Meeting, device: str) -> None:
        try:
            found[meeting.rank] = meeting.meet(Arrival(rank=meeting.rank, host="here", device=device)).store
        except UserError as error:
            found[meeting.rank] = str(error)

    threads = [
        threading.Thread(target=one, args=(meeting, device), daemon=True)
        for meeting, device in zip(come, devices or ["cpu"] * len(come), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_all_come_and_share_one_store() -> None:
    found = gathered(meetings(3))
    found[2].set("word", "said")  # type: ignore[attr-defined]
    assert found[0].get("word") == found[1].get("word") == b"said"  # type: ignore[attr-defined]


@pytest.mark.parametrize("absent", [[2], [1, 2]])
def test_who_is_missing_is_named_while_awaited_and_when_given_up(
    absent: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "EVERY_S", 0.3)
    begun = time.monotonic()
    found = gathered([one for one in meetings(3, limit=1.5) if one.rank not in absent])
    assert time.monotonic() - begun < 120
    name = "rank 2" if absent == [2] else "ranks 1-2"
    said = f"{name} did not come within 2 s (LDM_TIMEOUT_S): {3 - len(absent)} of 3 processes were here"
    assert set(found.values()) == {said}
    assert f"{3 - len(absent)} of 3 processes are here; waiting for {name} (" in capfd.readouterr().err


def test_without_the_first_process_the_others_say_where_they_look_for_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "EVERY_S", 0.3)
    monkeypatch.setattr(rendezvous, "TRY_S", 0.5)
    come = meetings(3, limit=8.0)[1:]
    found = gathered(come)
    where = f"127.0.0.1:{come[0].port}"
    assert all(str(said).startswith(f"rank 0 was not reached at {where} within 8 s (LDM_TIMEOUT_S)") for said in found.values())
    assert f"ldm: rank 1 waits for rank 0 at {where} (" in capfd.readouterr().err


def test_a_port_that_is_taken_is_told() -> None:
    import socket

    come = meetings(2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", come[0].port))
        other.listen()
        with pytest.raises(UserError, match="MASTER_PORT: rank 0 cannot listen at"):
            come[0].meet(Arrival(rank=0, host="here", device="cpu"))


def test_a_further_start_on_the_launchers_store_does_not_meet_those_of_the_former() -> None:
    from datetime import timedelta

    from torch.distributed import TCPStore

    first = meetings(2)
    agent = TCPStore("127.0.0.1", first[0].port, None, True, timedelta(seconds=20), wait_for_workers=False)
    kept = [replace(one, kept=True, limit=1.0) for one in first]
    assert all(not isinstance(one, str) for one in gathered(kept).values())
    assert "rank 1 did not come" in str(gathered(kept[:1])[0])
    assert "rank 0, which waits for all others, gives no sign of life" in str(gathered(kept[1:])[1])
    again = [replace(one, limit=60.0) for one in kept]
    later = threading.Timer(1.0, lambda: found.update(gathered(again[:1])))  # who comes before the first process waits for its session
    found: dict[int, object] = {}
    later.start()
    found |= gathered(again[1:])
    later.join()
    found[1].set("word", "said")  # type: ignore[attr-defined]
    assert found[0].get("word") == b"said"  # type: ignore[attr-defined]
    del agent


def test_the_interface_is_the_one_by_which_machines_reach_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Address(NamedTuple):
        address: str

    here = {"lo": [Address("127.0.0.1")], "eth0": [Address("02:00"), Address("10.0.0.2")], "eth1": [Address("fe80::1%eth1")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: here)
    assert interface("10.0.0.2", "10.0.0.1") == "eth0" and interface("fe80::1", "") == "eth1"
    assert interface("127.0.1.1", "10.0.0.2") == "eth0"  # the first machine, whose own name leads to itself alone
    assert interface("127.0.0.1", "") == "" and interface("10.0.0.9", "") == ""
    own, first = way("127.0.0.1", 29500)
    assert (own, first) == ("127.0.0.1", "127.0.0.1") and way("no such name.invalid", 1) == ("", "")


def test_a_machine_without_its_driver_is_named_before_any_group_is_made() -> None:
    found = gathered(meetings(3), ["cuda", "cuda", "cpu"])
    assert len(set(found.values())) == 1
    assert str(found[0]).startswith("the processes have devices of different kinds, cuda: ranks 0-1 (on here); cpu: rank 2 (on here)")


def test_two_processes_on_one_gpu_are_told() -> None:
    arrivals = [Arrival(rank=rank, host="gpu7", device="cuda", unit=unit) for rank, unit in enumerate("aab")]
    assert together(arrivals).startswith("ranks 0-1 have the same GPU of gpu7; start one process for each GPU")
    assert together([replace(one, unit=f"{one.rank}") for one in arrivals]) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "4"}, "RANK: got 4; with WORLD_SIZE 4 it is 0 to 3"),
        ({"RANK": ""}, "RANK: got nothing"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT: got x"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: got 70000; it is 1 to 65535"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: got nothing"),
    ],
)
def test_variables_that_launchers_set_are_read_or_named(change: dict[str, str], said: str) -> None:
    assert Meeting.told(WHOLE, 600).port == 29500
    with pytest.raises(UserError) as error:
        Meeting.told(WHOLE | change, 600)
    assert str(error.value).startswith(said)
