"""Counted costs against published figures, against diffusers, transformers and against what real tensors keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.diffusion.batch import Cond, ImageBatch, Text
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL, Adversarial
from ldm.families.family import Context
from ldm.models import cost
from ldm.models.attention import get_attention, set_attention
from ldm.models.autoencoder import KLConfig
from ldm.models.discriminator import DiscriminatorConfig
from ldm.models.unet import UNetConfig

SMALL = UNetConfig(channels=(32, 64), layers=1, attention=(True, True), heads=2, context_width=24)


# Computed with torch's counter from diffusers' networks on the meta device; 10^9 operations of one image.
@pytest.mark.slow
@pytest.mark.parametrize(("side", "forward", "both"), [(256, 180.1, 537.3), (512, 803.3, 2406.8)])
def test_stable_diffusion_costs_what_is_known(side: int, forward: float, both: float) -> None:
    parameters, found = cost.denoiser(UNetConfig(), side // 8, side // 8, 77)
    assert parameters == 859_520_964
    assert found.forward / 1e9 == pytest.approx(forward, rel=1e-3) and found.training / 1e9 == pytest.approx(both, rel=1e-3)


def test_its_autoencoder_costs_what_is_known() -> None:
    _, encoder, decoder = cost.autoencoder(KLConfig(), 256, 256)
    assert encoder.forward / 1e9 == pytest.approx(272.7, rel=1e-3) and decoder.forward / 1e9 == pytest.approx(622.2, rel=1e-3)
    assert (encoder + decoder).training / 1e9 == pytest.approx(2684, rel=1e-3)


def test_diffusers_unet_costs_the_same() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        peer = UNet2DConditionModel.from_config(SMALL.to_diffusers())
        peer(torch.empty(1, 4, 16, 16), 0, torch.empty(1, 7, 24))
    assert cost.denoiser(SMALL, 16, 16, 7)[1].forward == counter.get_total_flops()


@pytest.mark.parametrize("shape", [cost.TextShape("CLIP ViT-L/14", 768, 12), cost.TextShape("small", 48, 3, 11, 600, 11, 100)])
def test_text_encoders_by_formula_are_those_of_transformers(shape: cost.TextShape) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    made = CLIPTextConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.inner or 4 * shape.width,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        num_attention_heads=12,
    )
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = CLIPTextModel(made)
        model(torch.zeros(1, shape.tokens, dtype=torch.long))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    assert counter.get_total_flops() == shape.cost.forward


def kept_by_real_tensors(config: UNetConfig, precision: torch.dtype) -> tuple[int, int]:
    """Bytes that a forward pass keeps on the CPU, and the network's parameters."""
    network = config.build()
    text = Text(tokens=torch.randn(1, 7, config.context_width), mask=torch.ones(1, 7, dtype=torch.bool))
    before = get_attention()
    set_attention("sdpa")
    try:
        half = torch.autocast("cpu", precision, enabled=precision != torch.float32)
        ledger = cost.Ledger(network)
        with half, ledger, torch.autograd.graph.saved_tensors_hooks(ledger.keep, lambda tensor: tensor):
            network(torch.randn(1, 4, 32, 32), torch.zeros(1), Cond(text=text))
    finally:
        set_attention(before)
    return ledger.bytes, sum(p.numel() for p in network.parameters())


def test_activations_are_those_that_real_tensors_keep() -> None:
    _, found = cost.denoiser(SMALL, 32, 32, 7)
    real, parameters = kept_by_real_tensors(SMALL, torch.float32)
    assert found.activations == pytest.approx(real, rel=0.06)  # the CPU folds up-convolutions, which keeps a little less
    half, _ = kept_by_real_tensors(SMALL, torch.bfloat16)
    assert found.activations / 2 + 2 * parameters == pytest.approx(half, rel=0.15)


def test_checkpointing_keeps_less_and_computes_more() -> None:
    _, plain = cost.denoiser(SMALL, 32, 32, 7)
    _, recomputed = cost.denoiser(replace(SMALL, checkpointing=True), 32, 32, 7)
    assert recomputed.activations < plain.activations / 2
    assert plain.forward == recomputed.forward and plain.backward < recomputed.backward <= plain.backward + plain.forward


def test_checkpointing_an_autoencoder_keeps_less_and_computes_more() -> None:
    network = KLConfig(channels=(16, 32, 32), layers=2, norm_groups=8)
    (_, *plain), (_, *recomputed) = (cost.autoencoder(replace(network, checkpointing=on), 64, 64) for on in (False, True))
    before, after = plain[0] + plain[1], recomputed[0] + recomputed[1]
    assert after.activations < 0.7 * before.activations
    assert before.forward == after.forward and before.backward < after.backward <= before.backward + before.forward


class Nowhere:
    """A module tracker that tracks nothing."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *problem: object) -> None: ...


def test_one_place_at_the_lowest_level_can_be_counted() -> None:
    whole, half = (cost.denoiser(SMALL, side, side, 7)[1] for side in (2, 16))
    assert 0 < whole.forward < half.forward


def test_the_parts_of_an_adversarial_step_make_up_the_whole() -> None:
    network = KLConfig(channels=(16, 32, 32), layers=1, norm_groups=8)
    discriminator = DiscriminatorConfig(channels=16, layers=2, norm_groups=8)
    family = KL(network=network, adversarial=Adversarial(start=0.0, discriminator=discriminator)).build(
        Context(data=None, val=None, resolution=32, seed=0, total_images=8)  # type: ignore[arg-type]
    )
    batch = ImageBatch(image=torch.rand(1, 3, 32, 32), caption=("",), size=torch.zeros(1, 6), position=torch.zeros(1, dtype=torch.long))
    family = family.to("meta")
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Nowhere()  # the usual one cannot follow gradients that are taken within a forward pass
    with counter:
        terms, _ = family(batch.to("meta"), Rng(0, [0]))
        torch.stack(list(terms.values())).sum().backward()
    _, encode, decode = cost.autoencoder(network, 32, 32)
    parts = encode + decode + cost.discriminator(discriminator, 32, 32)[1]
    assert parts.training == pytest.approx(counter.get_total_flops(), rel=0.03)
