"""Denoising network that OpenVINO computes on a CPU; a graph is made for every shape that it is called with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Movable
from ldm.families.latent_diffusion.engine import PRECISION
from ldm.formats.openvino_graph import OTHERWISE, Graph, check_openvino, compiled, weights_hash
from ldm.models.attention_exchange import AttentionExchange
from ldm.models.denoiser import Denoiser
from ldm.models.tensor_call import TensorCall, inputs_of

NAMES = {kind: name for name, kind in PRECISION.items()}


class OnOpenVINO(Denoiser):
    """The network whose forward pass is OpenVINO's, with the conditions that it is told; engine and guidance take it for the network.

    Its answer is torch's in fp32 to rounding (2e-6 relative); in half precision, which is autocast around the call, it refuses.

    Args:
        network: on a CPU, with its adapters merged; its weights must not change any more.
    """

    def __init__(self, network: Denoiser) -> None:
        super().__init__(network.config)
        self.network = network.eval().requires_grad_(False)
        self.joins = network.joins
        self._graphs: dict[str, Graph] = {}
        self._weights = ""

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: Any = None, step: Any = None) -> Tensor:
        """As the network's; nothing is remembered."""
        precision = NAMES[torch.get_autocast_dtype("cpu")] if torch.is_autocast_enabled("cpu") else "fp32"
        inputs = tuple(value.float() if value.is_floating_point() else value for value in inputs_of(x, t, cond))
        shapes = _shape_of(cond) + str([tuple(value.shape) for value in inputs[:2]])
        check_openvino(x.device, precision)
        if (graph := self._graphs.get(shapes)) is None:
            self._weights = self._weights or weights_hash(self.network)
            call = TensorCall(self.network, cond).eval()
            graph = compiled(call, inputs, self._weights, f"{self.network.config} {shapes}")
            self._graphs[shapes] = graph
        return graph(inputs).to(x.dtype)

    def exchanging(self, memory: Any, exchange: AttentionExchange) -> NoReturn:
        """Nothing can be put between the layers of a graph.

        Raises:
            UserError: always.
        """
        raise UserError(f"source: takes the attention of another prompt, which is inside openvino's graph; {OTHERWISE}, or leave it out")


def _shape_of(value: Any) -> str:
    """What of a condition a graph is made for: its fields, the shapes of tensors, and all that is no tensor."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}{value.dtype}"
    if isinstance(value, Mapping):
        return str({name: _shape_of(one) for name, one in value.items()})
    if isinstance(value, Movable):
        return str({f.name: _shape_of(getattr(value, f.name)) for f in fields(value)})  # type: ignore[arg-type]
    return repr(value)
