"""Offload: float32 weights, optimiser and EMA in this machine's memory, as ZeRO-Offload (arXiv 2101.06840); the device computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.families.family import Family, ParameterGroup


class Offload:
    """The learned weights of a family twice: in float32 on the CPU, where they are updated, and on the device as it computes.

    Matrices and kernels on the device are of the type that is computed in, and so are their gradients; vectors (biases, norms) stay
    in float32. In float32 a step has the bits of one without offload.

    Args:
        family: the networks, on their device.
        groups: its parameter groups.
        kind: the type that is computed in.
    """

    def __init__(self, family: Family, groups: Sequence[ParameterGroup], kind: torch.dtype) -> None:
        own = {id(p): p for group in groups for p in group.parameters}
        self._named = {name: p for name, p in family.named_parameters(remove_duplicate=False) if id(p) in own}
        self._device = next(iter(own.values())).device
        self._beside = self._device.type == "cuda"  # copies that are waited for together; elsewhere each is, since its buffer is not pinned
        self._masters: dict[int, nn.Parameter] = {}
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, Tensor]] = []  # on the device, on the CPU, what is copied through
        for key, p in own.items():
            pinned = p.is_cuda
            master = nn.Parameter(torch.empty_like(p, device="cpu", dtype=torch.float32, pin_memory=pinned).copy_(p.detach()))
            low = kind if p.ndim >= 2 else torch.float32
            through = torch.empty_like(p, device="cpu", dtype=low, pin_memory=pinned, requires_grad=False)
            p.data = through.copy_(p.detach()).to(p.device, copy=True)
            self._masters[key] = master
            self._pairs.append((p, master, through))
        self.groups = [
            replace(group, parameters=self.on_cpu(group.parameters), tables=frozenset(self.on_cpu([*group.tables]))) for group in groups
        ]

    def on_cpu(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        """These parameters of the device as they are in float32; those that do not learn as they are."""
        return [self._masters.get(id(p), p) for p in parameters]

    @torch.no_grad()
    def bring_gradients(self) -> None:
        """Move the gradients to the CPU, and off the device."""
        moved = [(p, master, through) for p, master, through in self._pairs if p.grad is not None]
        for p, _, through in moved:
            through.copy_(p.grad, non_blocking=self._beside)  # type: ignore[arg-type]
        self._wait()
        for p, master, through in moved:
            master.grad = through.to(torch.float32) if through.dtype != torch.float32 else through.clone()
            p.grad = None

    @torch.no_grad()
    def hand_out(self) -> None:
        """Give the device the weights as they are now."""
        for p, master, through in self._pairs:
            through.copy_(master)
            p.copy_(through, non_blocking=self._beside)
        self._wait()

    def _wait(self) -> None:
        if self._beside:
            torch.cuda.synchronize(self._device)

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state of the family with the weights as they are in float32."""
        return {name: self._masters[id(self._named[name])].detach() if name in self._named else value for name, value in tensors.items()}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take up the weights of such a state; returns what else is in it."""
        for name in self._named.keys() & tensors.keys():
            self._masters[id(self._named[name])].copy_(tensors[name])
        self.hand_out()
        return {name: value for name, value in tensors.items() if name not in self._named}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the device holds the weights in float32 alone, as products and pictures are made of them."""
        for p, master, _ in self._pairs:
            p.data = master.detach().to(self._device, copy=True)
        try:
            yield
        finally:
            for p, _, through in self._pairs:  # what was handed out last
                p.data = through.to(self._device, copy=True)
