"""FSDP2 sharding of parameters (torch's fully_shard), and gathering them whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def shard(module: nn.Module, device: torch.device, world: int) -> None:
    """Split every parameter over the processes, in place; during a step they are gathered, and gradients come back split."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh(device.type, (world,)))


def is_split(tensor: Tensor) -> bool:
    """Whether this process has only a part of it."""
    return torch.distributed.is_available() and isinstance(tensor, _split_type())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; where it is split every process must ask."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A tensor that every process has whole, split as the pattern is, without a word between them."""
    if not is_split(pattern) or tensor.shape != pattern.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = pattern.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(pattern.device), mesh, pattern.placements, src_data_rank=None)  # type: ignore[attr-defined]


def collected(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors in this machine's memory, one gathered after the other; every process must ask, those that do not `keep` get none."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            found[name] = value.cpu() if is_split(tensor) else value
    return found


@contextmanager
def gathered(module: nn.Module, keep: bool) -> Iterator[None]:
    """Within it the module of a process that will `keep` them holds whole parameters; every process must enter.

    It may be used there as if it had never been split, by that process alone.
    """
    split: list[tuple[nn.Module, str, nn.Parameter]] = []
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and is_split(parameter):
                split.append((owner, name, parameter))
    for owner, name, parameter in split:
        value = whole(parameter.detach())
        if keep:
            owner._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for owner, name, parameter in split:
            owner._parameters[name] = parameter


def _split_type() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor
