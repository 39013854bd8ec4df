"""Frozen layers whose weights lie in 8 or 4 bits and are made whole each time they are computed with, for adapters that learn beside them.

The forward pass keeps no whole weight for the backward pass: that makes it anew from the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

Bits = Literal["int8", "nf4"]
BLOCK = 64  # weights that share a scale in nf4
LEAST = 4096  # weights of a layer that is quantized; a smaller one is not worth its error
# Quantiles of a Gaussian, 8 below zero, 0 and 7 above, as QLoRA (Dettmers 2023, arXiv 2305.14314, appendix E) has them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BYTES: dict[Bits, float] = {"int8": 1.0, "nf4": 0.5 + 4 / BLOCK}  # a weight; int8's scales, one an output, are few


class Packed(NamedTuple):
    """A weight in bits, and the float32 scales that make it whole."""

    codes: Tensor  # int8 of the weight's shape, or uint8 (n,) of two codes each
    scale: Tensor  # (out,1,...) or (blocks,)


def pack(weight: Tensor, bits: Bits) -> Packed:
    """A weight (out,in,...) in bits: `int8` by a scale for each output, its greatest value / 127; `nf4` by one for each 64 values."""
    weight = weight.detach().float()
    if bits == "int8":
        scale = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        scale = scale.view(-1, *[1] * (weight.ndim - 1))
        return Packed((weight / scale).round().clamp(-127, 127).to(torch.int8), scale)
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / scale[:, None], (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    return Packed(codes[::2] << 4 | codes[1::2], scale)


def unpack(packed: Packed, shape: torch.Size, kind: torch.dtype) -> Tensor:
    """The weight again, of a shape and a type, as near as its bits tell."""
    codes, scale = packed
    if codes.dtype == torch.int8:
        return (codes * scale).to(kind)
    levels = torch.tensor(NF4, device=codes.device)
    whole = levels[torch.stack([codes >> 4, codes & 15], 1).flatten().long()].view(-1, BLOCK) * scale[:, None]
    return whole.flatten()[: shape.numel()].view(shape).to(kind)


class _Call(NamedTuple):
    """What a layer does with its weight."""

    shape: torch.Size
    convolution: tuple[Any, ...] = ()  # stride, padding, dilation, groups; none: a linear layer


class _Computed(torch.autograd.Function):
    """A layer's answer; only its input has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.call, ctx.size = call, x.shape
        weight = unpack(Packed(codes, scale), call.shape, x.dtype)
        return F.conv2d(x, weight, bias, *call.convolution) if call.convolution else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        weight = unpack(Packed(*ctx.saved_tensors), ctx.call.shape, grads[0].dtype)
        if ctx.call.convolution:
            stride, padding, dilation, groups = ctx.call.convolution
            back = conv2d_input(ctx.size, weight, grads[0], stride, padding, dilation, groups)
        else:
            back = grads[0] @ weight
        return back, None, None, None, None


class _Quantized(nn.Module):
    """A layer with its weight in bits. Its `weight` is made whole each time that it is asked for."""

    codes: Tensor
    scale: Tensor
    _shape: torch.Size
    _kind: torch.dtype

    @property
    def weight(self) -> Tensor:
        """(out,in,...), of the type that it had."""
        return unpack(self.packed, self._shape, self._kind)

    @property
    def packed(self) -> Packed:
        """Its bits and their scales."""
        return Packed(self.codes, self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)  # a half type would make all the bits count for less
        return self

    def _answer(self, x: Tensor, *convolution: Any) -> Tensor:
        where = x.device.type
        kind = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else x.dtype
        own: Any = self.bias
        bias = None if own is None else own.to(kind)
        with torch.autocast(where, enabled=False):
            return _Computed.apply(x.to(kind), self.codes, self.scale, bias, _Call(self._shape, convolution))  # type: ignore[no-any-return,no-untyped-call]


class QuantizedLinear(_Quantized, nn.Linear):  # type: ignore[override]
    """A linear layer with its weight in bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(...,in) -> (...,out)."""
        return self._answer(x)


class QuantizedConv2d(_Quantized, nn.Conv2d):  # type: ignore[override]
    """A convolution with its kernel in bits."""

    def forward(self, x: Tensor) -> Tensor:
        """(B,in,h,w) -> (B,out,h',w')."""
        return self._answer(x, self.stride, self.padding, self.dilation, self.groups)


MADE: dict[type[nn.Module], type[_Quantized]] = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}


def quantizable(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of some frozen layers whose weights may lie in bits: plain ones of 4,096 weights or more that do not learn."""
    return [one for one in layers if type(one) in MADE and one.weight.numel() >= LEAST and _padded(one)]  # type: ignore[operator,union-attr]


def _padded(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Conv2d) or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))


def quantize(layer: nn.Module, bits: Bits) -> None:
    """Put a layer's weight into bits, where it stands; there is no way back."""
    assert bits in get_args(Bits)
    weight: Any = layer._parameters.pop("weight")
    packed = pack(weight, bits)
    layer.__class__ = MADE[type(layer)]
    made: Any = layer
    made._shape, made._kind = weight.shape, weight.dtype
    for name, value in packed._asdict().items():
        layer.register_buffer(name, value)


def quantized_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a network that `quantize` has changed, by name."""
    for name, layer in network.named_modules():
        if isinstance(layer, _Quantized):
            yield name, layer


def same(layer: nn.Module, weight: Tensor) -> bool:
    """Whether a weight has the bits of a quantized layer's."""
    assert isinstance(layer, _Quantized)
    bits: Bits = "int8" if layer.codes.dtype == torch.int8 else "nf4"
    own, other = layer.packed, pack(weight.to(layer.codes.device), bits)
    return torch.equal(own.codes, other.codes) and torch.equal(own.scale, other.scale)
