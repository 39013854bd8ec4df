"""Perceptual losses: none, LPIPS from a weights file, or features of the run's own CLIP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from torch import Tensor, nn

from ldm.config.schema import BY_KIND, NonNegative, PathGiven, config
from ldm.families.family import Context, ModelConfig
from ldm.formats.clip_folder import load_tower
from ldm.formats.model_folder import OWN_CLIP
from ldm.models.perceptual import FeatureDistance, Lpips, load_lpips


@config
class PerceptualNone:
    """No perceptual term."""

    kind: Literal["none"] = "none"

    def inputs(self) -> dict[str, str]:
        """The models that it reads, by role."""
        return {}

    def network(self, others: Mapping[str, ModelConfig], side: int, note: Callable[[str], None]) -> nn.Module | None:
        """A network of its shape, for counting; None: there is none."""
        return None

    def build(self, context: Context) -> None:
        """Nothing."""
        return None


@config
class PerceptualLpips:
    """LPIPS with VGG16 (Zhang 2018, arXiv 1801.03924), its weights read from a local file."""

    kind: Literal["lpips"] = "lpips"
    weights: PathGiven  # a .safetensors or .pth file with the backbone and the linear heads
    weight: NonNegative = 1.0  # of the distance

    def inputs(self) -> dict[str, str]:
        """The models that it reads, by role."""
        return {}

    def network(self, others: Mapping[str, ModelConfig], side: int, note: Callable[[str], None]) -> nn.Module:
        """A network of its shape, for counting."""
        return Lpips()

    def build(self, context: Context) -> nn.Module:
        """The frozen distance, scaled by its weight."""
        return Scaled(load_lpips(Path(self.weights)), self.weight)


@config
class PerceptualClip:
    """Distance of feature maps in the image tower of the run's own CLIP, or of a pretrained one."""

    kind: Literal["clip"] = "clip"
    model: str = "text"  # the run's CLIP, by its name in models
    weight: NonNegative = 1.0  # of the distance

    def inputs(self) -> dict[str, str]:
        """The models that it reads, by role."""
        return {"text": self.model}

    def network(self, others: Mapping[str, ModelConfig], side: int, note: Callable[[str], None]) -> nn.Module:
        """A network of its shape, for counting."""
        return FeatureDistance(others["text"].image_tower(side, note).build())

    def build(self, context: Context) -> nn.Module:
        """The frozen distance, scaled by its weight."""
        tower, *_ = load_tower(context.products["text"].folder / OWN_CLIP)
        return Scaled(FeatureDistance(tower), self.weight)


Perceptual = Annotated[PerceptualNone | PerceptualLpips | PerceptualClip, BY_KIND]


class Scaled(nn.Module):
    """A frozen distance times a weight: two image batches (B,3,H,W) in [-1,1] to (B,)."""

    def __init__(self, distance: nn.Module, weight: float) -> None:
        super().__init__()
        self.distance = distance.eval().requires_grad_(False)
        self.weight = weight

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The weighted distance (B,)."""
        return self.weight * self.distance(a, b)
