"""Adapters of one layer: LoRA and LoCon, LoHa, LoKr, a whole difference, and DoRA's magnitudes; what each adds to the layer's weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

Ready = Callable[[Tensor], Tensor]  # a stored tensor in the type and on the device that is computed with


@dataclass(frozen=True, kw_only=True)
class LayerAdapter(ABC):
    """What is added to one layer's weight (out,in) or (out,in,kh,kw): a factor times a product of small tensors.

    With magnitudes m (DoRA, Liu 2024, arXiv 2402.09353) the weight becomes m (W + added) / |W + added|. The norm is over all that goes into
    an output, or, where m has the shape (1,in,...), over all that one input goes to.
    """

    magnitude: Tensor | None = None  # DoRA's: (out,), (out,1,...) or (1,in,...)
    bias: Tensor | None = None  # (out,), added to the layer's bias

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int] | None:
        """(outputs, inputs times kernel) of the product, without computing it; None: its tensors do not fit together."""

    @abstractmethod
    def product(self, ready: Ready) -> Tensor:
        """What is multiplied by the factor, its values in the order of the weight's."""

    @property
    def count(self) -> int:
        """How many numbers it has."""
        found = [part for value in vars(self).values() for part in (value if isinstance(value, tuple) else (value,))]
        return sum(part.numel() for part in found if isinstance(part, Tensor))

    @property
    def idle(self) -> bool:
        """Whether it leaves every weight as it is: its factor is 0, or a tensor of its product has zeros alone."""
        if self.magnitude is not None or (self.bias is not None and bool(self.bias.any())):
            return False
        found = [part for name, value in vars(self).items() if name != "bias" for part in (value if isinstance(value, tuple) else (value,))]
        parts = [part for part in found if isinstance(part, Tensor)]
        return not self.scale or not parts or any(not bool(part.any()) for part in parts)

    def delta(self, weight: Tensor) -> Tensor:
        """What is added to `weight`, in its shape, at least in float32."""
        kind = torch.promote_types(weight.dtype, torch.float32)

        def ready(part: Tensor) -> Tensor:
            return part.to(weight.device, kind)

        added = (self.product(ready) * self.scale).reshape(weight.shape)
        if self.magnitude is None:
            return added
        whole, by_input = ready(weight) + added, self._by_input(weight)
        norm = (whole.transpose(0, 1) if by_input else whole).flatten(1).norm(dim=1)
        factor = ready(self.magnitude).flatten() / norm.clamp(min=torch.finfo(kind).eps)
        return whole * factor.view(*((1, -1) if by_input else (-1, 1)), *[1] * (weight.ndim - 2)) - ready(weight)

    def fits(self, weight: Tensor) -> bool:
        """Whether it can be added to a layer's weight: the same outputs, inputs and kernel."""
        outputs, rest = len(weight), prod(weight.shape[1:])
        if self.bias is not None and self.bias.shape != (outputs,):
            return False
        if self.magnitude is not None and self.magnitude.numel() != (weight.shape[1] if self._by_input(weight) else outputs):
            return False
        return self.shape == (outputs, rest)

    def _by_input(self, weight: Tensor) -> bool:
        shape = () if self.magnitude is None else self.magnitude.shape
        return len(shape) > 1 and shape[0] == 1 and shape[0] != len(weight)


@dataclass(frozen=True)
class Pair(LayerAdapter):
    """LoRA (Hu 2021, arXiv 2106.09685): alpha / r times up @ down; of a convolution LoCon, also with a kernel between (Tucker, "CP")."""

    down: Tensor  # (r,in) or (r,in,kh,kw); with `mid` (r,in,1,1)
    up: Tensor  # (out,r) or (out,r,1,1)
    alpha: float
    mid: Tensor | None = None  # (r,r,kh,kw)

    @property
    def method(self) -> str:
        """Whether it is DoRA."""
        return "lora" if self.magnitude is None else "dora"

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int] | None:
        """The outer sides, where the ranks are equal."""
        ends, kernel = (_columns(self.up), len(self.down)), 1
        if self.mid is not None:
            kernel = prod(self.mid.shape[2:])
            return (len(self.up), _columns(self.down) * kernel) if self.mid.shape[:2] == ends else None
        return (len(self.up), _columns(self.down)) if ends[0] == ends[1] else None

    def product(self, ready: Ready) -> Tensor:
        """up @ down, with the kernel between them."""
        up, down = ready(self.up).flatten(1), ready(self.down).flatten(1)
        return up @ down if self.mid is None else tucker(ready(self.mid), up.T, down)


@dataclass(frozen=True)
class Hadamard(LayerAdapter):
    """LoHa (Hyeon-Woo 2022, arXiv 2108.06098): alpha / r times (w1_a @ w1_b) * (w2_a @ w2_b), of convolutions also with kernels between."""

    first: tuple[Tensor, Tensor]  # (out,r), (r,in times kernel); with kernels (r,out), (r,in)
    second: tuple[Tensor, Tensor]
    alpha: float
    kernels: tuple[Tensor, Tensor] | None = None  # (r,r,kh,kw) each

    @property
    def rank(self) -> int:
        """r."""
        return len(self.first[1])

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int] | None:
        """That of both factors, where it is the same."""
        kernels = self.kernels or (None, None)
        one, other = (_factor_shape(pair, kernel) for pair, kernel in zip((self.first, self.second), kernels, strict=True))
        return one if one == other else None

    def product(self, ready: Ready) -> Tensor:
        """Both factors, value by value."""
        kernels = self.kernels or (None, None)
        return _factor(self.first, kernels[0], ready) * _factor(self.second, kernels[1], ready)


@dataclass(frozen=True)
class Kronecker(LayerAdapter):
    """LoKr (Edalati 2022, arXiv 2212.10650; Yeh 2023, arXiv 2309.14859): alpha / r times the Kronecker product of two factors.

    Each is one matrix or a product of two, the second may have a kernel.
    """

    first: tuple[Tensor, ...]  # (out1,in1); or (out1,r), (r,in1)
    second: tuple[Tensor, ...]  # (out2,in2) or (out2,in2,kh,kw); or (out2,r), (r,in2 times kernel); with `kernel` (r,out2), (r,in2)
    alpha: float
    rank: int
    kernel: Tensor | None = None  # (r,r,kh,kw)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int] | None:
        """The product of the factors' sides."""
        one, other = _factor_shape(self.first, None), _factor_shape(self.second, self.kernel)
        return None if one is None or other is None else (one[0] * other[0], one[1] * other[1])

    def product(self, ready: Ready) -> Tensor:
        """The Kronecker product of the factors as matrices."""
        return torch.kron(_factor(self.first, None, ready), _factor(self.second, self.kernel, ready).flatten(1))


@dataclass(frozen=True)
class Difference(LayerAdapter):
    """Difference of two whole weights."""

    weight: Tensor | None = None  # (out,in) or (out,in,kh,kw), (out,) of a norm; None: of the bias alone

    @property
    def scale(self) -> float:
        """1."""
        return 1.0

    @property
    def shape(self) -> tuple[int, int] | None:
        """Its own."""
        return None if self.weight is None else (len(self.weight), prod(self.weight.shape[1:]))

    def fits(self, weight: Tensor) -> bool:
        """Of the same outputs, inputs and kernel; of a bias, of as many outputs."""
        if self.weight is None:
            return self.bias is not None and self.bias.shape == (len(weight),)
        return super().fits(weight)

    def product(self, ready: Ready) -> Tensor:
        """Itself."""
        return ready(self.weight) if self.weight is not None else torch.zeros(())

    def delta(self, weight: Tensor) -> Tensor:
        """The difference, or zero where there is only a bias'."""
        return super().delta(weight) if self.weight is not None else torch.zeros_like(weight, dtype=torch.float32)


@dataclass(frozen=True)
class Whole(LayerAdapter):
    """A weight in the place of the layer's own (Custom Diffusion)."""

    weight: Tensor  # (out,in)

    @property
    def scale(self) -> float:
        """1."""
        return 1.0

    @property
    def idle(self) -> bool:
        """Never: zeros in a weight's place are a change."""
        return False

    @property
    def shape(self) -> tuple[int, int] | None:
        """Its own."""
        return (len(self.weight), prod(self.weight.shape[1:]))

    def product(self, ready: Ready) -> Tensor:
        """Itself."""
        return ready(self.weight)

    def delta(self, weight: Tensor) -> Tensor:
        """What it differs by from the layer's."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        return self.weight.to(weight.device, kind).reshape(weight.shape) - weight.to(kind)


def tucker(kernel: Tensor, outward: Tensor, inward: Tensor) -> Tensor:
    """The kernel (r,s,kh,kw) between `outward` (r,out) and `inward` (s,in): (out,in,kh,kw)."""
    return torch.einsum("abhw,ao,bi->oihw", kernel, outward, inward)


def _columns(part: Tensor) -> int:
    return prod(part.shape[1:])


def _factor_shape(parts: tuple[Tensor, ...], kernel: Tensor | None) -> tuple[int, int] | None:
    """(outputs, inputs times kernel) of a factor of one or two tensors; None: they do not fit together."""
    if len(parts) == 1:
        return len(parts[0]), _columns(parts[0])
    one, other = parts
    if kernel is not None:
        fits = one.ndim == other.ndim == 2 and kernel.shape[:2] == (len(one), len(other))
        return (one.shape[1], other.shape[1] * prod(kernel.shape[2:])) if fits else None
    return (len(one), _columns(other)) if _columns(one) == len(other) else None


def _factor(parts: tuple[Tensor, ...], kernel: Tensor | None, ready: Ready) -> Tensor:
    if len(parts) == 1:
        return ready(parts[0])
    one, other = (ready(part).flatten(1) for part in parts)
    return one @ other if kernel is None else tucker(ready(kernel), one, other)
