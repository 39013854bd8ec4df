"""Benchmarks of token models: ours beside diffusers' UVit2DModel and AmusedPipeline, with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional as F

from ldm.cli.benchmarks.models import CAPTIONS, QUICKSTART, build_text, distance
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.cli.benchmarks.training import GRADIENTS, gradients
from ldm.families.draws import Wanted
from ldm.families.family import Product
from ldm.families.registry import open_finished
from ldm.families.tokens.configuration import TokenDefaults
from ldm.families.tokens.family import Tokens, TokensFamily
from ldm.formats.latent_codec import LatentCodec, Statistics, save_codec
from ldm.models.autoencoder import VQConfig
from ldm.models.token_transformer import TokenTransformerConfig
from ldm.text.penultimate import PenultimateText

STEPS, GUIDANCE = 8, 3.0
# The sizes of configs/tokens.yaml.
NETWORK = TokenTransformerConfig(width=128, layers=4, heads=4, res_blocks=2, size_channels=16)
CODEC = VQConfig(channels=(16, 32, 64, 64), layers=1, latent_channels=4, codes=512, norm_groups=8, middle_attention=False)
TOY = replace(NETWORK, width=16, layers=1, heads=2, size_channels=4)
PIXELS = 32


def family_of(setup: Setup, chunk: int, order: str = "masked") -> TokensFamily:
    """A token model of random weights whose codes differ from each other."""
    torch.manual_seed(0)
    size = TOY if setup.tiny else NETWORK
    size = size if order == "masked" else replace(size, res_blocks=None)
    config = Tokens(order=order, network=size, defaults=TokenDefaults(steps=STEPS, guidance=GUIDANCE, chunk=chunk))  # type: ignore[arg-type]
    network = CODEC.build()
    torch.nn.init.normal_(network.codebook)
    codec = LatentCodec(network, Statistics((0.0,) * 4, (1.0,) * 4, 0, 0))
    text = PenultimateText.of_encoder(build_text(QUICKSTART))
    words = text.max_tokens, len(text.tokenizer)
    shape = config.shape(CODEC.codes, (PIXELS // CODEC.factor) ** 2, text.width, text.pooled_width, words)
    family = TokensFamily(config, shape.build(), codec, text, PIXELS)
    for weight in family.network.parameters():
        if weight.dim() > 1:  # far from the start, where all places are nearly equally sure
            torch.nn.init.normal_(weight, std=0.1)
    for module in (family, *family.frozen()):
        module.to(setup.device)
    return family


def step(setup: Setup) -> Iterator[Case]:
    """B23: forward and backward of one batch."""
    from diffusers import UVit2DModel

    family = family_of(setup, 1)
    network, device = family.network, setup.device
    peer: Any = UVit2DModel.from_config(network.shape.to_diffusers(PIXELS // CODEC.factor))
    peer.load_state_dict(network.state_dict(), strict=True)
    peer.to(device)
    batch, side = 4 if setup.tiny else 48, PIXELS // CODEC.factor
    codes = torch.randint(network.shape.vocabulary, (batch, side, side), device=device)
    wanted = torch.randint(network.shape.codes, (batch, side, side), device=device)
    text = family.text.encode([CAPTIONS[i % len(CAPTIONS)] for i in range(batch)])
    assert text.pooled is not None
    states, pooled = text.tokens, text.pooled
    numbers = torch.tensor([[PIXELS, PIXELS, 0, 0, 6.0]], device=device).expand(batch, 5)

    def ours() -> None:
        network.zero_grad()
        F.cross_entropy(network(codes, network.told(states, pooled, numbers)).transpose(1, 2), wanted.flatten(1)).backward()

    def theirs() -> None:
        peer.zero_grad()
        logits = peer(codes, encoder_hidden_states=states, pooled_text_emb=pooled, micro_conds=numbers)
        F.cross_entropy(logits, wanted).backward()

    def check() -> float:
        for one in (network, peer):
            one.eval()  # without dropout
        ours()
        theirs()
        found = distance(gradients(network), gradients(peer))
        for one in (network, peer):
            one.train()
        return found

    yield Case(
        name=f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, {side}x{side} codes, batch {batch}, fp32",
        kind="equal",
        ours=ours,
        theirs=theirs,
        check=check,
        tolerance=1e-4,
        error=GRADIENTS,
        per_call=batch,
    )


def drawing(setup: Setup) -> Iterator[Case]:
    """B24: pictures by masked order with guidance, text encoder and decoder included."""
    for images in (1, 8):
        yield _drawing(setup, images)


def _drawing(setup: Setup, images: int) -> Case:
    from diffusers import AmusedPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()
    family = family_of(setup, images).eval()
    root = setup.folder / f"codes-{images}"
    family.text.save(root / "text")
    save_codec(root / "autoencoder" / "vqvae", family.codec.network, family.codec.statistics)
    family.save(root / "product")
    folders = {"text": root / "text", "autoencoder": root / "autoencoder", "model": root / "product"}
    family.config.assemble({name: Product(folder, name) for name, folder in folders.items()}, root / "model", {"name": "bench"})
    family = cast("TokensFamily", open_finished(root / "model", setup.device))
    family.config = replace(family.config, defaults=replace(family.config.defaults, noise=0.0))
    pipeline: Any = AmusedPipeline.from_pretrained(root / "model").to(setup.device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [CAPTIONS[i % len(CAPTIONS)] for i in range(images)]

    def ours(temperature: float = 1.0) -> np.ndarray:
        return family.sample(prompts, range(images), Wanted(temperature=temperature)).numpy()

    def theirs() -> np.ndarray:
        kwargs: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "temperature": (0, 0), "output_type": "np"}
        return np.asarray(pipeline(prompts, **kwargs).images * 255)

    def check() -> float:
        likeliest: Callable[..., torch.Tensor] = lambda chance, n, generator=None: chance.argmax(-1, keepdim=True)  # noqa: E731
        with patch.object(torch, "multinomial", likeliest):  # theirs draws codes by it; here both take the likeliest
            return float(np.abs(ours(0.0) - theirs()).max())

    return Case(
        name=f"{images} at a time, {STEPS} steps, {PIXELS} px, fp32",
        kind="equal",
        ours=ours,
        theirs=theirs,
        check=check,
        tolerance=1.0,
        error="largest difference in levels of 255",
        per_call=images,
    )
