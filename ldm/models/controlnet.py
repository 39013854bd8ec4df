"""ControlNet (arXiv 2302.05543): a copy of a U-Net's way down reads a map and adds to the skips, under diffusers' parameter names."""

from __future__ import annotations

from dataclasses import replace
from math import log2
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Width, config
from ldm.diffusion.batch import Cond, Injected, Told
from ldm.models.backbone import Denoiser
from ldm.models.blocks import zero
from ldm.models.conditioned import ConditionNetwork
from ldm.models.unet import UNetConfig, UNetEncoder

NOT_THERE = {  # of a U-Net's config.json, what ControlNetModel's does not have
    "attention_type",
    "center_input_sample",
    "class_embeddings_concat",
    "conv_in_kernel",
    "conv_out_kernel",
    "cross_attention_norm",
    "dropout",
    "dual_cross_attention",
    "mid_block_only_cross_attention",
    "out_channels",
    "resnet_out_scale_factor",
    "resnet_skip_time_act",
    "reverse_transformer_layers_per_block",
    "sample_size",
    "time_cond_proj_dim",
    "time_embedding_act_fn",
    "time_embedding_dim",
    "time_embedding_type",
    "timestep_post_act",
    "up_block_types",
}


@config
class ControlNetConfig:
    """What a ControlNet is made of, beside the U-Net that it adds to."""

    hint_channels: Width = 3  # channels of the map
    widths: tuple[Width, ...] = (16, 32, 96, 256)  # of the layers that shrink the map to the latents' size, by two between one and the next

    @classmethod
    def shrinking(cls, factor: int, most: int, hint_channels: int = 3) -> ControlNetConfig:
        """For maps `factor` times as large as the latents, with layers up to `most` wide.

        Raises:
            UserError: if the factor is no power of two.
        """
        if factor & (factor - 1):
            raise UserError(f"residual: the autoencoder shrinks pictures by {factor}; a ControlNet needs a power of two")
        return cls(hint_channels=hint_channels, widths=tuple(min(w, most) for w in (16, 32, 96, 256, 256, 256)[: 1 + int(log2(factor))]))

    def to_diffusers(self, unet: UNetConfig) -> dict[str, Any]:
        """The content of config.json."""
        said = {name: value for name, value in unet.to_diffusers().items() if name not in NOT_THERE}
        return said | {
            "_class_name": "ControlNetModel",
            "conditioning_channels": self.hint_channels,
            "conditioning_embedding_out_channels": list(self.widths),
            "controlnet_conditioning_channel_order": "rgb",
            "global_pool_conditions": False,
        }

    @classmethod
    def from_diffusers(cls, values: dict[str, Any], where: str = "config.json") -> ControlNetConfig:
        """The configuration behind a config.json.

        Raises:
            UserError: for another network, or a channel order or pooling that this one does not have.
        """
        for name, need in (
            ("_class_name", "ControlNetModel"),
            ("controlnet_conditioning_channel_order", "rgb"),
            ("global_pool_conditions", False),
        ):
            if values.get(name, need) != need:
                raise UserError(f"{where}: {name} is {values[name]!r}; a ControlNet here has {need!r} only")
        widths = values.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
        return cls(hint_channels=values.get("conditioning_channels", 3), widths=tuple(widths))


class HintEmbedding(nn.Module):
    """Convolutions from a map to the size and the width of a U-Net's first level, the last of which starts at zero."""

    def __init__(self, config: ControlNetConfig, channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.hint_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in zip(widths, widths[1:], strict=False):
            self.blocks += [nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2)]
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)
        zero(self.conv_out)

    def forward(self, hint: Tensor) -> Tensor:
        """(B,C,H,W) in [0,1] -> (B,c,h,w)."""
        x = F.silu(self.conv_in(hint))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder, ConditionNetwork):
    """The way down of a U-Net that is told a map besides, and a convolution of zeros for each of its outputs."""

    folder: ClassVar[str] = "controlnet"
    class_name: ClassVar[str] = "ControlNetModel"

    def __init__(self, config: UNetConfig, own: ControlNetConfig) -> None:
        super().__init__(config)
        self.own = own
        self.controlnet_cond_embedding = HintEmbedding(own, config.channels[0])
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(c, c, 1) for c in config.skip_channels)
        self.controlnet_mid_block = nn.Conv2d(config.channels[-1], config.channels[-1], 1)
        for layer in (*self.controlnet_down_blocks, self.controlnet_mid_block):
            zero(layer)

    @classmethod
    def beside(cls, unet: UNetConfig, own: ControlNetConfig, latents: int) -> ControlNet:
        """One for a U-Net, told so many channels of latents and nothing that joins them."""
        return cls(replace(unet, in_channels=latents, gated=False, guidance_channels=0), own)

    def begin(self, base: Denoiser) -> None:
        """Start as the U-Net's way down."""
        theirs = base.state_dict()
        first, own = theirs["conv_in.weight"], self.conv_in.weight
        more = first.shape[1] - base.config.in_channels  # coordinates come last
        theirs["conv_in.weight"] = torch.cat([first[:, : own.shape[1] - more], first[:, first.shape[1] - more :]], dim=1)
        self.load_state_dict({name: theirs.get(name, value) for name, value in self.state_dict().items()})
        self.to(first)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, told: Told | None) -> Cond:
        """`cond` with what it adds, of a map (B,C,H,W) in pixels."""
        if told is None:
            return cond
        return replace(cond, injected=(cond.injected or Injected()) + self.added(x, t, cond, told.value, told.strength))

    def added(self, x: Tensor, t: Tensor, cond: Cond, hint: Tensor, weight: Tensor) -> Injected:
        """What it adds to the U-Net that is told x, t and cond.

        Args:
            hint: (B,C,H,W) in [0,1], the map in pixels.
            weight: (B,), how much of it is added; 0: nothing.
        """
        time, memory = F.silu(self._time(t, cond, x.dtype)), self._memory(cond.text, x.dtype)
        x = self.enter(x, replace(cond, image=None))
        x = x + self.controlnet_cond_embedding(hint.to(x))
        x, skips = self.contract(x, time, memory, self.checkpointing and torch.is_grad_enabled())
        scale = weight.to(x)[:, None, None, None]
        outputs = zip(self.controlnet_down_blocks, skips, strict=True)
        return Injected(skips=tuple(scale * layer(skip) for layer, skip in outputs), middle=scale * self.controlnet_mid_block(x))

    def to_diffusers(self) -> dict[str, Any]:
        """The content of its config.json."""
        return self.own.to_diffusers(self.config)
