"""Deep-compression autoencoder (DC-AE, arXiv 2410.10733): diffusers' AutoencoderDC, read as it is.

The network is diffusers' own: it is used frozen, never trained here, and its linear attention needs none of what ours is written for
(stripes, recomputing, folded up-convolutions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Count, PositiveFloat, Width, config, plain
from ldm.models.diffusers_config import CONFIG, require_buildable
from ldm.models.stripes import Stripes

CLASS = "AutoencoderDC"
Block = Literal["ResBlock", "EfficientViTBlock"]
Norm = Literal["rms_norm", "batch_norm", "layer_norm"]
Activation = Literal["silu", "relu", "gelu", "mish"]
LISTS = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")  # of the encoder, and of the decoder


@config
class DCConfig:
    """What an AutoencoderDC is made of, under diffusers' names; the defaults are those of its class (f32c32)."""

    in_channels: Width = 3
    latent_channels: Width = 32
    attention_head_dim: Width = 32
    encoder_block_types: Block | tuple[Block, ...] = "ResBlock"
    decoder_block_types: Block | tuple[Block, ...] = "ResBlock"
    encoder_block_out_channels: tuple[Width, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[Width, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[Count, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[Count, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[Width, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[Width, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    downsample_block_type: Literal["pixel_unshuffle", "conv"] = "pixel_unshuffle"
    decoder_norm_types: Norm | tuple[Norm, ...] = "rms_norm"
    decoder_act_fns: Activation | tuple[Activation, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: Activation = "relu"
    scaling_factor: PositiveFloat = 1.0

    checkpointing: ClassVar[bool] = False

    def __post_init__(self) -> None:
        levels = len(self.encoder_block_out_channels)
        for side in ("encoder", "decoder"):
            for name in (*(f"{side}_{name}" for name in LISTS), *(("decoder_norm_types", "decoder_act_fns") if side == "decoder" else ())):
                value = getattr(self, name)
                if isinstance(value, tuple) and len(value) != levels:
                    raise UserError(f"{name} has {len(value)} entries for the {levels} levels of encoder_block_out_channels")
            require_buildable(getattr(self, f"{side}_block_out_channels"), max(getattr(self, f"{side}_layers_per_block"), default=0))

        for side, on, ways in (("encoder", self.encoder_out_shortcut, 1), ("decoder", self.decoder_in_shortcut, -1)):
            widths = getattr(self, f"{side}_block_out_channels")
            if on and widths[-1] % self.latent_channels:
                raise UserError(f"latent_channels {self.latent_channels} does not divide {widths[-1]} of {side}_block_out_channels")
            for before, after in zip(widths[::ways], widths[::ways][1:], strict=False):
                if 4 * min(before, after) % max(before, after):
                    raise UserError(
                        f"{side}_block_out_channels: {before} and {after} are neighbours, but 4 times the less is no multiple of the other"
                    )
            kinds = getattr(self, f"{side}_block_types")
            for width, kind in zip(widths, kinds if isinstance(kinds, tuple) else [kinds] * levels, strict=True):
                if kind == "EfficientViTBlock" and width % self.attention_head_dim:
                    raise UserError(f"attention_head_dim {self.attention_head_dim} does not divide {width} of {side}_block_out_channels")

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return 1 << (len(self.encoder_block_out_channels) - 1)

    @property
    def latent_width(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    def build(self) -> DCAutoencoder:
        """A freshly initialised network."""
        return DCAutoencoder(self)

    def to_diffusers(self) -> dict[str, object]:
        """The content of diffusers' config.json."""
        return {"_class_name": CLASS, **plain(self)}

    @classmethod
    def from_diffusers(cls, values: Mapping[str, Any], where: str = CONFIG) -> DCConfig:
        """The configuration behind an AutoencoderDC's config.json, the file `where`.

        Raises:
            UserError: naming a field that is not known, or makes no sense.
        """
        return typed({name: _tuples(value) for name, value in values.items() if not name.startswith("_")}, cls, where)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class DCAutoencoder(nn.Module):
    """Images to latents and back, without a posterior."""

    def __init__(self, config: DCConfig) -> None:
        from diffusers import AutoencoderDC

        super().__init__()
        self.config = config
        made: Any = AutoencoderDC(**{name: _tuples(value) for name, value in plain(config).items()})
        self.encoder, self.decoder = made.encoder, made.decoder

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return self.config.factor

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config.latent_channels

    def encode(self, image: Tensor, way: Stripes | None = None) -> Tensor:
        """Latents (B,c,h,w) of images (B,3,H,W) in [-1,1]; large ones on no other way, since every place sees every other."""
        return torch.as_tensor(self.encoder(image))

    def decode(self, z: Tensor, way: Stripes | None = None) -> Tensor:
        """Images (B,3,H,W), about [-1,1], of latents (B,c,h,w)."""
        return torch.as_tensor(self.decoder(z))
