"""Inference form of networks: fused projections, folded upsampling, cast weights; the same function of the same weights."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.models.blocks import Upsample, phase_kernels
from ldm.models.coder import MapAttention
from ldm.models.transformer import CrossAttention

M = TypeVar("M", bound=nn.Module)
COMPILED = 64  # forms of one class's code


def prepare(module: M, *, dtype: torch.dtype | None = None, channels_last: bool = False, in_place: bool = False) -> M:
    """A network that computes what `module` does, for inference alone; `module` and its state dict stay as they are.

    Projections of one input are one matrix product, enlargements by two with their 3x3 convolution four 2x2
    convolutions, and weights lie as the convolutions read them. What is not changed is shared with `module`. A layer that
    an adapter stands in for is left alone.

    Args:
        module: a denoising network, an autoencoder or a part of one.
        dtype: of the weights of products and convolutions, cast once instead of by autocast in every call: run the network
            under autocast of that type, and its numbers are the same to the bit. None: as they are.
        channels_last: lay convolutions' weights out by place first, channel last.
        in_place: change `module` itself, weight by weight, so that no more than one weight is there twice.
    """
    made = (module if in_place else shared_copy(module)).eval()
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if (better := _better(child)) is not None:
                setattr(parent, name, better)
    for part in made.modules():
        own = dtype if isinstance(part, nn.Linear | nn.Conv2d | FoldedUpsample | nn.ParameterList) else None
        for name, weight in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(_laid(weight.detach(), own, channels_last), requires_grad=False))
    return made


def shared_copy(module: M) -> M:
    """New modules on the same parameters and buffers, so that parts can be exchanged in one and not in the other."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _laid(weight: Tensor, dtype: torch.dtype | None, channels_last: bool) -> Tensor:
    """A weight in its type and layout; the same tensor where nothing changes."""
    weight = weight if dtype is None else weight.to(dtype)
    return weight.contiguous(memory_format=torch.channels_last) if channels_last and weight.ndim == 4 else weight


def _better(layer: nn.Module) -> nn.Module | None:
    """The faster layer that stands in for one, or None."""
    if type(layer) is CrossAttention and _plain(layer.to_q, layer.to_k, layer.to_v):
        return FusedAttention(layer)
    if type(layer) is MapAttention and _plain(layer.to_q, layer.to_k, layer.to_v):
        return FusedMapAttention(layer)
    if type(layer) is Upsample and type(layer.conv) is nn.Conv2d:
        return FoldedUpsample(layer)
    return None


def _plain(*layers: nn.Module) -> bool:
    return all(type(layer) is nn.Linear for layer in layers)


def _joined(*layers: nn.Linear) -> nn.Linear:
    """Layers that read the same input as one that gives their outputs side by side."""
    first = layers[0]
    made = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), first.bias is not None, device="meta")
    made.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
    if first.bias is not None:
        made.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)
    return made


class FusedAttention(CrossAttention):
    """CrossAttention with one projection for all that is read from the same tokens: q, k and v, or k and v."""

    def __init__(self, layer: CrossAttention) -> None:
        nn.Module.__init__(self)
        self.heads, self.upcast, self.looks_inward = layer.heads, layer.upcast, layer.looks_inward
        if layer.looks_inward:
            self.to_qkv = _joined(layer.to_q, layer.to_k, layer.to_v)
        else:
            self.to_q, self.to_kv = layer.to_q, _joined(layer.to_k, layer.to_v)
        self.to_out = layer.to_out

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B,S,C') -> two of (B,heads,S,D), of a text."""
        k, v = self.to_kv(source).chunk(2, dim=2)
        return self._split(k), self._split(v)

    def _inward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.to_qkv(x).chunk(3, dim=2)
        return self._split(q), self._split(k), self._split(v)


class FusedMapAttention(MapAttention):
    """MapAttention with one projection."""

    def __init__(self, layer: MapAttention) -> None:
        nn.Module.__init__(self)
        self.group_norm, self.spatial_norm, self.to_out, self.heads = layer.group_norm, layer.spatial_norm, layer.to_out, layer.heads
        self.to_qkv = _joined(layer.to_q, layer.to_k, layer.to_v)

    def _projected(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.to_qkv(h).chunk(3, dim=2)
        return q, k, v


class FoldedUpsample(Upsample):
    """Upsample whose four 2x2 kernels are computed once; for odd sizes too."""

    def __init__(self, layer: Upsample) -> None:
        nn.Module.__init__(self)
        self.conv = layer.conv
        kernels = [k.detach().contiguous() for k in phase_kernels(layer.conv.weight)]
        self.kernels = nn.ParameterList(nn.Parameter(k, requires_grad=False) for k in kernels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B,C,h,w) -> (B,C,2h,2w), or (B,C,*size) with a row or a column less."""
        height, width = x.shape[2:]
        rows, columns = size or (2 * height, 2 * width)
        if min(height, width) < 2 or (2 * height - rows) not in (0, 1) or (2 * width - columns) not in (0, 1):
            return super().forward(x, size)
        padded = F.pad(x, (1, 1, 1, 1))
        out: Tensor | None = None
        for i, kernel in enumerate(self.kernels):
            r, c = divmod(i, 2)
            part = F.conv2d(padded[:, :, r : r + height + 1, c : c + width + 1], kernel, self.conv.bias)  # (B,C',h,w)
            if out is None:
                like = torch.channels_last if part.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
                shape = (len(x), part.shape[1], rows, columns)
                out = torch.empty(shape, dtype=part.dtype, device=x.device, memory_format=like)
            place = out[:, :, r::2, c::2]
            place.copy_(part[:, :, : place.shape[2], : place.shape[3]])
        assert out is not None
        # The missing row would have been a copy of the last one, which now has padding in its place.
        if rows < 2 * height:
            out[:, :, -1:] = self.conv(F.interpolate(x[:, :, -2:], size=(3, columns)))[:, :, -1:]
        if columns < 2 * width:
            out[:, :, :, -1:] = self.conv(F.interpolate(x[:, :, :, -2:], size=(rows, 3)))[:, :, :, -1:]
        return out


class WholeUpsample(Upsample):
    """Upsample in the two steps that it means, for sides that are not known: what other programs' graphs are made of."""

    def __init__(self, layer: Upsample) -> None:
        nn.Module.__init__(self)
        self.conv = layer.conv

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B,C,h,w) -> (B,C,2h,2w), or (B,C,*size)."""
        return self.conv(F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size))


def unfolded(module: M) -> M:
    """A network that computes what `module` does without telling sides apart; weights are shared, `module` stays as it is."""
    made = shared_copy(module)
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if type(child) is Upsample:
                setattr(parent, name, WholeUpsample(child))
    return made


def compile_each(networks: Iterable[nn.Module]) -> None:
    """Have torch compile networks, or blocks of them, in place, when they are first called; names of weights stay.

    Blocks of one class share a place in the compiler's memory, which has room for eight shapes by its own choice.
    """
    from torch._dynamo import config

    config.recompile_limit = max(COMPILED, config.recompile_limit)
    for network in networks:
        network.compile()


def check_compiler(device: torch.device) -> None:
    """Refuse where torch.compile would find nothing to compile with.

    Raises:
        UserError: saying what is missing.
    """
    if device.type == "cpu":
        wanted = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
        if not any(map(shutil.which, wanted)):
            raise UserError("compile: no C++ compiler here, which torch.compile needs; install g++ or clang++, or leave it out")
    elif device.type == "cuda":
        from importlib.util import find_spec

        if find_spec("triton") is None:
            raise UserError("compile: triton is missing, which torch.compile needs on a GPU; install it or leave it out")
    else:
        raise UserError(f"compile: torch does not compile for {device.type}; leave it out")
