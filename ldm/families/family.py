"""The contract that joins networks and mathematics, and that the one training loop relies on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.sources import DataSet
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Ranks:
    """What a loss may know about the other processes: how many they are, and how to average a tensor over them."""

    rank: int = 0
    world: int = 1
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Product:
    """What a finished stage left: a folder of parts and the hash of its content."""

    folder: Path
    hash: str


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a family may look at when it is built: the data, the earlier products, the stage's numbers."""

    data: DataSet
    val: DataSet
    resolution: int  # px
    seed: int
    total_images: int  # the length of the stage
    products: Mapping[str, Product] = field(default_factory=dict)  # by the name of the family that made them
    init: Product | None = None  # an earlier stage of the same family, to continue
    device: torch.device = torch.device("cpu")


class Family(nn.Module, ABC):
    """Networks with their loss.

    Trainable networks are submodules; frozen ones are listed by `frozen`, outside the module tree, so that no wrapper,
    optimiser or state dict ever sees them. `forward` is the loss, so that gradients pass through whatever wraps the module.
    """

    ranks: Ranks = Ranks()
    shardable: bool = False  # whether its parameters may be split over processes: `forward` alone uses them, and none is a scalar

    @abstractmethod
    def loss(self, batch: Any, rng: Rng) -> tuple[Terms, Terms]:
        """Terms (scalars whose sum is minimised) and gauges (scalars to watch, no gradient) for one batch."""

    def forward(self, batch: Any, rng: Rng) -> tuple[Terms, Terms]:
        """The loss."""
        return self.loss(batch, rng)

    def frozen(self) -> list[nn.Module]:
        """Networks that are used but never trained."""
        return []

    def parameter_groups(self) -> list[ParameterGroup]:
        """Parameters by who learns them; each player's gradients are clipped apart."""
        return [ParameterGroup(name="model", parameters=[p for p in self.parameters() if p.requires_grad])]

    def compilable(self) -> list[nn.Module]:
        """The networks that nearly all of a training step goes through, as calls of their own."""
        return []

    def idle(self) -> list[nn.Parameter]:
        """Parameters that do not learn at this step; their gradients are dropped."""
        return []

    def progress(self, images: int) -> None:
        """Told before each step how many images the stage has seen (start of an adversarial term, say)."""

    def after_step(self, step: int, rng: Rng) -> Terms:
        """Called after the optimiser's step number `step` (codebook maintenance, say); returns gauges."""
        return {}

    def averaged(self) -> list[nn.Parameter]:
        """The parameters whose moving average is sampled and saved."""
        return [p for p in self.parameter_groups()[0].parameters]

    def preview(self, batch: ImageBatch, seed: int) -> Tensor | None:
        """A few pictures (N,3,H,W) in [-1,1] for the eye, laid out in rows of `preview_columns`."""
        return None

    preview_columns: int = 8

    def finish(self, context: Context) -> dict[str, Any]:
        """Measurements on the final weights (latent statistics, say) that belong to the product; also logged."""
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the parts in diffusers' layout below `folder`."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are clipped together and learn at `lr_scale` times the stage's rate."""

    name: str
    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
