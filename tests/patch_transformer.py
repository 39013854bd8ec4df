"""A denoiser of another shape, one file and one name: transformer blocks over patches of the latents (as DiT, arXiv 2212.09748)."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.schema import BY_KIND, Positive, config
from ldm.diffusion.batch import Cond
from ldm.models import denoiser
from ldm.models.backbone import Denoiser, DenoiserConfig
from ldm.models.blocks import recompute
from ldm.models.embeddings import coordinates, waves
from ldm.models.transformer import Memory, TransformerBlock
from ldm.models.unet import UNetConfig


@config
class PatchesConfig(DenoiserConfig):
    class_names: ClassVar[tuple[str, ...]] = ("PatchTransformer",)

    kind: Literal["patches"] = "patches"
    in_channels: Positive = 4
    out_channels: Positive = 4
    context_width: Positive = 32
    width: Positive = 32
    depth: Positive = 2
    checkpointing: bool = field(default=False, compare=False)

    @property
    def aligned_width(self) -> int:
        return self.width

    def build(self) -> PatchTransformer:
        return PatchTransformer(self)


class PatchTransformer(Denoiser):
    config: PatchesConfig

    def __init__(self, config: PatchesConfig) -> None:
        super().__init__(config)
        self.proj_in = nn.Conv2d(config.in_channels + 6, config.width, 2, stride=2)
        self.time = nn.Linear(config.width, config.width)
        self.blocks = nn.ModuleList(TransformerBlock(config.width, 2, config.context_width, False, 0.0) for _ in range(config.depth))
        self.proj_out = nn.ConvTranspose2d(config.width, config.out_channels, 2, stride=2)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: Any = None, step: Any = None) -> Tensor:
        x = x if cond.image is None else torch.cat([x, cond.image], dim=1)
        h = self.proj_in(torch.cat([x, coordinates(x)], dim=1))  # (B,W,h/2,w/2)
        places = h.shape[2:]
        h = h.flatten(2).transpose(1, 2) + F.silu(self.time(waves(t, self.config.width).to(h.dtype)))[:, None]
        text = Memory(cond.text.tokens.to(h.dtype), None)
        for block in self.blocks:
            h = recompute(block, h, text) if self.checkpointing and torch.is_grad_enabled() else block(h, text)
        return self.proj_out(h.transpose(1, 2).unflatten(2, places))

    def aligned(self) -> nn.Module:
        return self.blocks[0]


def register() -> None:
    """From here on `network: {kind: patches}` is read, built and opened."""
    denoiser.Network = Annotated[UNetConfig | PatchesConfig, BY_KIND]  # type: ignore[misc]
