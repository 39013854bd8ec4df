"""The model to be exported: its networks' float32 weights and configurations, tokenizer, schedule and record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.diffusion.process import Process
from ldm.formats.latent_codec import Codec, Statistics
from ldm.models.autoencoder import KLConfig, VQConfig, fold_latent_stats
from ldm.models.backbone import DenoiserConfig
from ldm.models.unet import UNetConfig

CARD = "README.md"


@dataclass(frozen=True)
class ExportedNetwork:
    """Exported network: configuration and float32 state dict."""

    config: dict[str, Any]  # the content of config.json
    state: dict[str, Tensor]  # float32


@dataclass(frozen=True)
class ExportedModel:
    """Exported text-to-image model: networks, tokenizer, schedule, sampling defaults and provenance."""

    name: str  # for titles: the run's or folder's
    parts: dict[str, ExportedNetwork]  # the denoising network's (unet or transformer), vae or vqvae, text_encoder, text_encoder_2 of a pair
    network: DenoiserConfig
    autoencoder: Codec
    statistics: Statistics | None  # of a VQ autoencoder's latents, where they were measured; a KL one has them folded in
    tokenizers: dict[str, Any]  # by their folders: tokenizer, of a pair of text encoders also tokenizer_2
    process: Process
    scheduler: dict[str, Any]  # the content of scheduler_config.json
    defaults: dict[str, Any]  # how it wants to be sampled
    story: dict[str, Any]  # how it was made; empty: elsewhere
    card: str  # the model card that came with it; empty: none
    notices: tuple[str, ...]  # what is not taken along
    hash: str
    own_clip: Path | None = None  # the folder of its run's own CLIP, where it has one
    index: dict[str, Any] = field(default_factory=dict)  # what model_index.json says besides which class opens what

    @property
    def unet(self) -> UNetConfig:
        """The denoising network where it is a U-Net, as in files under CompVis' names."""
        assert isinstance(self.network, UNetConfig)
        return self.network

    @property
    def codec(self) -> str:
        """The folder name of its autoencoder."""
        return "vqvae" if isinstance(self.autoencoder, VQConfig) else "vae"

    @property
    def clip(self) -> bool:
        """Whether its text encoder is a CLIP's."""
        return str(self.parts["text_encoder"].config["model_type"]) == "clip_text_model"

    @property
    def pair(self) -> bool:
        """Whether it has two text encoders."""
        return "text_encoder_2" in self.parts

    @property
    def inpaints(self) -> bool:
        """Whether its network is told a masked picture besides the latents (Stable Diffusion inpainting: 4 + 4 + 1 channels)."""
        return self.network.in_channels == 2 * self.network.out_channels + 1

    def record(self) -> dict[str, Any]:
        """What a copy must say besides the networks' own configurations, so that it is sampled and told of as this one."""
        from ldm.config.version import __version__

        defaults = {**self.defaults, "size": list(self.defaults["size"])}
        offset = {"offset_noise": self.process.offset_noise} if self.process.offset_noise else {}
        return {"defaults": defaults, "scheduler": self.scheduler, **offset, "ldm_version": __version__, "story": self.story}


def with_quant_convolutions(config: KLConfig, state: Mapping[str, Tensor]) -> tuple[KLConfig, dict[str, Tensor]]:
    """KL autoencoder with its latent shift folded into 1x1 (quant) convolutions on both sides of the latents, as CompVis' has them.

    Its scaling factor stays. Where nothing is to be done, the weights are the same tensors.
    """
    mean, std = config.stated
    if config.quant_conv and config.post_quant_conv and not any(mean) and config.latents_std is None:
        return replace(config, shift_factor=None), dict(state)
    folded, made = fold_latent_stats(config, state, mean, tuple(value * config.scaling_factor for value in std))
    return replace(folded, scaling_factor=config.scaling_factor), made
