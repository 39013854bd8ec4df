"""Tensor call: a denoising network as a function of tensors alone, which is what converters to other programs' graphs take."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.diffusion.batch import Cond, filled, tensors_of
from ldm.models.backbone import Denoiser


class TensorCall(nn.Module):
    """The network called with x (B,C,h,w), t (B,) and then the tensors of a condition, in the order of `tensors_of`.

    Args:
        network: what is called.
        cond: whose shape is told: which fields there are, and what in them is no tensor.
    """

    def __init__(self, network: Denoiser, cond: Cond) -> None:
        super().__init__()
        self.network = network
        self.cond = cond

    def forward(self, x: Tensor, t: Tensor, *told: Tensor) -> Tensor:
        """(B,C',h,w)."""
        made: Tensor = self.network(x, t, filled(self.cond, told))
        return made


def inputs_of(x: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, ...]:
    """What a `TensorCall` is called with."""
    return x, t, *tensors_of(cond)
