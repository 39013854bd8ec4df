"""Benchmark models with random weights, and their diffusers counterparts with the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.diffusion.batch import MomentBatch
from ldm.diffusion.process import Process
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily
from ldm.formats.latent_codec import LatentCodec, Statistics
from ldm.models.autoencoder import KLAutoencoder, KLConfig
from ldm.models.unet import UNetConfig
from ldm.text.encoder import TextEncoder, train_tokenizer

CAPTIONS = ("a red ball on the grass", "two boats", "an old house by the sea", "a dog", "a city at night", "fog", "a tree", "snow")
SCALE = 0.18215  # Stable Diffusion's scaling factor
TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Model shape: sizes of a text-to-image model."""

    unet: UNetConfig
    autoencoder: KLConfig
    text_layers: int
    text_heads: int
    vocabulary: int = 560
    pixels: int  # px, side of the pictures
    batch: int  # of a training step

    @property
    def side(self) -> int:
        """px, of the latents."""
        return self.pixels // 2 ** (len(self.autoencoder.channels) - 1)


KL_SMALL = KLConfig(channels=(64, 128, 256, 256), scaling_factor=SCALE)
KL_SD = KLConfig(scaling_factor=SCALE)
SMALL = ModelShape(
    unet=UNetConfig(channels=(64, 128, 256), attention=(True, True, False), heads=8, context_width=128),
    autoencoder=KL_SMALL,
    text_layers=2,
    text_heads=4,
    pixels=256,
    batch=8,
)
QUICKSTART = ModelShape(
    unet=UNetConfig(
        channels=(128, 128, 128), layers=1, attention=(False, True, True), heads=2, context_width=128, in_channels=8, out_channels=8
    ),
    autoencoder=KLConfig(channels=(16, 32, 64, 64), layers=1, latent_channels=8, norm_groups=8, middle_attention=False),
    text_layers=2,
    text_heads=4,
    pixels=64,
    batch=32,
)
TINY = ModelShape(
    unet=UNetConfig(channels=(16, 32), layers=1, attention=(True, False), heads=2, norm_groups=8, context_width=32),
    autoencoder=KLConfig(channels=(8, 8, 8, 16), layers=1, norm_groups=4, scaling_factor=SCALE),
    text_layers=1,
    text_heads=2,
    pixels=64,
    batch=2,
)
SD1 = ModelShape(unet=UNetConfig(), autoencoder=KL_SD, text_layers=12, text_heads=12, vocabulary=49408, pixels=512, batch=16)
SD2 = ModelShape(
    unet=UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
    autoencoder=KL_SD,
    text_layers=23,
    text_heads=16,
    vocabulary=49408,
    pixels=512,
    batch=64,
)


def small(tiny: bool) -> ModelShape:
    """The shape of the CPU rows."""
    return TINY if tiny else SMALL


def count(config: UNetConfig | KLConfig) -> int:
    """Parameters, without making any."""
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())


def counts(shape: ModelShape) -> dict[str, int]:
    """Parameters of the networks of a shape, for the record."""
    return {"unet_parameters": count(shape.unet), "autoencoder_parameters": count(shape.autoencoder)}


def build_text(shape: ModelShape) -> TextEncoder:
    """A random CLIP text tower whose tokenizer knows a few words only."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = train_tokenizer(CAPTIONS, 560, TOKENS)
    width = shape.unet.context_width
    made = CLIPTextConfig(
        vocab_size=max(shape.vocabulary, len(tokenizer)),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_heads,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextEncoder(CLIPTextModel(made).eval().requires_grad_(False), tokenizer)


def build_family(shape: ModelShape, device: str, chunk: int = 1) -> LatentDiffusionFamily:
    """A whole model of random weights; all its parts on the device."""
    torch.manual_seed(0)
    text = build_text(shape)
    channels = shape.autoencoder.latent_channels
    scale = shape.autoencoder.scaling_factor
    codec = LatentCodec(shape.autoencoder.build(), Statistics((0.0,) * channels, (1 / scale,) * channels, 0, 0))
    config = LatentDiffusion(
        network=replace(shape.unet, sample_size=shape.side),
        process=Process(),
        caption_dropout=0.0,
        defaults=Defaults(steps=50, guidance=7.5, sampler="ddim", chunk=chunk),
    )
    family = LatentDiffusionFamily(config, config.network.build(), codec, text)
    family.resolution = shape.pixels
    for module in (family, *family.frozen()):
        module.to(device)
    return family


def twin_unet(family: LatentDiffusionFamily) -> Any:
    """diffusers' UNet2DConditionModel with the family's weights."""
    from diffusers import UNet2DConditionModel

    return _twin(UNet2DConditionModel, family.config.network.to_diffusers(), family.denoiser)


def twin_autoencoder(network: KLAutoencoder) -> Any:
    """diffusers' AutoencoderKL with the network's weights."""
    from diffusers import AutoencoderKL

    return _twin(AutoencoderKL, network.config.to_diffusers(), network)


def _twin(kind: Any, config: dict[str, object], network: nn.Module) -> Any:
    from diffusers.utils import logging

    logging.set_verbosity_error()
    weight = next(network.parameters())
    made = kind.from_config(config)
    made.load_state_dict(network.state_dict(), strict=True)
    return made.to(weight.device, weight.dtype)


def twin_pipeline(family: LatentDiffusionFamily) -> Any:
    """diffusers' StableDiffusionPipeline with the family's weights, tokenizer and schedule, and DDIM."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    assert isinstance(family.codec.network, KLAutoencoder)
    pipeline: Any = StableDiffusionPipeline(
        vae=twin_autoencoder(family.codec.network).eval(),
        text_encoder=family.text.model,
        tokenizer=family.text.tokenizer,
        unet=twin_unet(family).eval(),
        scheduler=DDIMScheduler.from_config(family.process.scheduler_config()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,  # type: ignore[arg-type]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def moments(shape: ModelShape) -> MomentBatch:
    """A batch as it comes from the latent cache."""
    size = (shape.batch, shape.autoencoder.latent_channels, shape.side, shape.side)
    row = [shape.pixels, shape.pixels, 0, 0, shape.pixels, shape.pixels]
    return MomentBatch(
        mean=torch.randn(size),
        std=torch.full(size, 0.01),
        caption=tuple(CAPTIONS[i % len(CAPTIONS)] for i in range(shape.batch)),
        size=torch.tensor([row] * shape.batch).float(),
        position=torch.arange(shape.batch),
    )


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative difference of two lists of tensors: the norm of the difference over the norm of the second."""
    squares = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in zip(ours, theirs, strict=True)]
    return float((torch.stack([s for s, _ in squares]).sum() / torch.stack([s for _, s in squares]).sum()).sqrt())
