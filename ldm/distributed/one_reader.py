"""One reader a machine: a process reads tensors from files and sends them to the others beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.distributed.rendezvous import host

if TYPE_CHECKING:
    from ldm.distributed.processes import Processes

Groups = dict[str, dict[str, Tensor]]
Read = TypeVar("Read", bound="tuple[Path, Groups, Any] | None")


def one_reader(processes: Processes, read: Callable[[], Read]) -> Read:
    """What `read` gives in every process, though it is called in the first of each machine alone.

    Args:
        read: where the tensors come from, the tensors by group, and what else is told of them; None: nothing.

    Raises:
        UserError: naming two machines that read different things.
    """
    if processes.world == 1:
        return read()
    hosts = processes.gather([host()])
    own = [rank for rank, name in enumerate(hosts) if name == hosts[processes.rank]]
    found = read() if processes.rank == own[0] else None
    _agreed(processes.gather([None if processes.rank != own[0] else _told(found)]), hosts)
    groups = {name: [rank for rank, other in enumerate(hosts) if other == name] for name in dict.fromkeys(hosts)}
    for name, ranks in groups.items():  # every process takes part in making every group
        group = torch.distributed.new_group(ranks, backend="gloo") if len(ranks) > 1 else None
        if name == hosts[processes.rank] and group is not None:
            found = cast("Read", _sent(found, own[0], group, processes.rank == own[0]))
            torch.distributed.destroy_process_group(group)
    return cast("Read", found)


def _told(found: tuple[Path, Groups, Any] | None) -> str:
    """What was read, in a line that differs where that does."""
    return "nothing" if found is None else f"{found[0].name} ({hashlib.sha256(repr(found[2]).encode()).hexdigest()[:12]})"


def _agreed(said: list[str | None], hosts: list[str]) -> None:
    first = next(text for text in said if text is not None)
    for rank, text in enumerate(said):
        if text is not None and text != first:
            raise UserError(
                f"{hosts[0]} goes on from {first}, but {hosts[rank]} from {text}; all machines must see the same run folder: "
                f"start again when they do, or move away what one of them cannot read"
            )


def _sent(found: tuple[Path, Groups, Any] | None, source: int, group: Any, mine: bool) -> tuple[Path, Groups, Any] | None:
    """What the source has read, in every process of the group."""
    about: list[Any] = [None]
    if mine and found is not None:
        shapes = {name: {each: (tuple(t.shape), t.dtype) for each, t in tensors.items()} for name, tensors in found[1].items()}
        about = [(found[0], found[2], shapes)]
    torch.distributed.broadcast_object_list(about, src=source, group=group, device=torch.device("cpu"))
    if about[0] is None:
        return None
    path, told, shapes = about[0]
    groups: Groups = {}
    for name, tensors in shapes.items():
        groups[name] = {}
        for each, (shape, kind) in tensors.items():
            tensor = found[1][name][each] if mine and found is not None else torch.empty(shape, dtype=kind)
            if tensor.numel():
                torch.distributed.broadcast(tensor.reshape(-1).view(torch.uint8), src=source, group=group)
            groups[name][each] = tensor
    return path, groups, told
