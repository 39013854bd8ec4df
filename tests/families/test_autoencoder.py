"""The autoencoder's two-player game: one backward pass must equal the textbook's two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL, VQ, Adversarial, AutoencoderFamily, PixelLoss
from ldm.families.family import Context
from ldm.formats.latent_codec import LatentCodec, Statistics
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.discriminator import DiscriminatorConfig

SHAPE = {"channels": (8, 16), "layers": 1, "norm_groups": 4, "middle_attention": False}
ON = Adversarial(weight=0.7, start=0.0, discriminator=DiscriminatorConfig(channels=8, layers=1, norm_groups=4))


def family(config: KL | VQ, total: int = 100) -> AutoencoderFamily:
    torch.manual_seed(0)
    nothing: Any = None
    context = Context(data=nothing, val=nothing, resolution=16, seed=0, total_images=total)
    return config.build(context).double()


def batch(count: int = 3) -> ImageBatch:
    image = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    return ImageBatch(image=image, caption=("",) * count, size=torch.zeros(count, 6), position=torch.arange(count))


def kl(**fields: Any) -> KL:
    return KL(network=KLConfig(latent_channels=2, **SHAPE), **{"adversarial": ON, **fields})


def vq(**fields: Any) -> VQ:
    return VQ(network=VQConfig(latent_channels=4, codes=16, **SHAPE), **{"adversarial": ON, **fields})


def gradients(made: AutoencoderFamily, loss: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_gradients_equal_those_of_two_separate_backward_passes(loss: str) -> None:
    config = kl(
        pixel=PixelLoss(l1=1, l2=3, gradient=0.5), adversarial=Adversarial(weight=0.7, start=0.0, loss=loss, discriminator=ON.discriminator)
    )
    made, data = family(config), batch()
    terms, gauges = made(data, Rng(0, data.position))
    mine = gradients(made, torch.stack(list(terms.values())).sum())

    image = data.image
    mean, logvar = made.network.encode(image)
    noise = Rng(0, data.position).normal("posterior", mean.shape[1:])
    recon = made.network.decode(mean + (0.5 * logvar).exp() * noise)
    pixel = (recon - image).abs().mean() + 3 * (recon - image).square().mean()
    for axis in (2, 3):
        pixel = pixel + 0.5 * (recon.diff(dim=axis) - image.diff(dim=axis)).abs().mean()
    fake = made.discriminator(recon)
    opinion = -fake.mean() if loss == "hinge" else F.softplus(-fake).mean()
    last = made.network.last_layer
    a, b = (torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (pixel, opinion))
    weight = (a / (b + 1e-4)).clamp(0, 1e4).detach() * 0.7
    kl_term = config.weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / image.numel()
    player = gradients(made, pixel + weight * opinion + kl_term)
    real, fake = made.discriminator(image), made.discriminator(recon.detach())
    if loss == "hinge":
        game = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    else:
        game = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    discriminator = gradients(made, game)

    assert torch.isclose(gauges["lambda"].double(), weight, rtol=1e-9)
    for name, value in mine.items():
        expected = discriminator[name] if name.startswith("discriminator.") else player[name]
        assert torch.allclose(value, expected, rtol=1e-8, atol=1e-12), name


def test_the_reported_terms_sum_to_the_loss_that_is_descended() -> None:
    made, data = family(kl()), batch()
    terms, gauges = made(data, Rng(0, data.position))
    assert torch.isclose(terms["reconstruction"], gauges["l1"], rtol=1e-6)
    assert set(terms) == {"kl", "reconstruction", "adversarial", "discriminator"}


def test_the_discriminator_is_silent_and_idle_before_its_start() -> None:
    made, data = family(kl(adversarial=Adversarial(start=0.5, discriminator=ON.discriminator))), batch()
    made.progress(49)
    terms, gauges = made(data, Rng(0, data.position))
    assert "lambda" not in gauges and float(terms["discriminator"]) == 0
    assert {id(p) for p in made.idle()} == {id(p) for p in made.discriminator.parameters()}
    made.progress(50)
    terms, gauges = made(data, Rng(0, data.position))
    assert "lambda" in gauges and not made.idle() and float(terms["discriminator"]) > 0


def test_lambda_is_clamped_and_says_so() -> None:
    made, data = family(kl(adversarial=Adversarial(weight=1, start=0, max_weight=1e-3, discriminator=ON.discriminator))), batch()
    _, gauges = made(data, Rng(0, data.position))
    assert float(gauges["lambda"]) == pytest.approx(1e-3) and float(gauges["lambda_clamped"]) == 1


def test_no_discriminator_where_its_weight_is_zero() -> None:
    made = family(kl(adversarial=Adversarial(weight=0)))
    assert made.discriminator is None and [p.name for p in made.parameter_groups()] == ["autoencoder"]


def test_unused_codes_are_drawn_again_until_the_set_share_of_the_stage() -> None:
    config = vq(redraw_every=2, redraw_until=0.5)
    made, data = family(config, total=1000), batch()
    with torch.no_grad():
        made.network.codebook[1:] = 1e6  # only code 0 can be chosen
    for step in range(60):
        made.progress(step)
        made(data, Rng(0, data.position))
        gauges = made.after_step(step, Rng(0, [step]))
        if step == 0:
            assert "codes_redrawn" not in gauges and float(made.network.codebook[1:].min()) == 1e6
    assert float(made.network.codebook.abs().max()) < 1e3
    assert float(gauges["perplexity"]) > 1

    made.progress(501)
    made(data, Rng(0, data.position))
    before = made.network.codebook.detach().clone()
    made.usage.zero_()
    made.after_step(5, Rng(0, [5]))
    assert torch.equal(before, made.network.codebook)


def test_codebook_and_encoder_learn_from_their_own_terms_only() -> None:
    made, data = family(vq(pixel=PixelLoss(l1=0, l2=1))), batch()
    terms, _ = made(data, Rng(0, data.position))
    made.zero_grad()
    terms["codebook"].backward()
    assert made.network.codebook.grad is not None and made.network.quant_conv.weight.grad is None


def test_normalised_latents_have_zero_mean_and_unit_deviation() -> None:
    made, data = family(kl()), batch(8)
    with torch.no_grad():
        mean, logvar = made.network.encode(data.image)
        std = (mean.var((0, 2, 3), unbiased=False) + logvar.exp().mean((0, 2, 3))).sqrt()
    statistics = Statistics(tuple(mean.mean((0, 2, 3)).tolist()), tuple(std.tolist()), 8, 16)
    codec = LatentCodec(made.network, statistics)
    centre, spread = codec.moments(data.image)
    assert spread is not None
    total = (centre.double().var((0, 2, 3), unbiased=False) + spread.double().square().mean((0, 2, 3))).sqrt()
    assert torch.allclose(centre.double().mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(total, torch.ones(2, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(codec.decode(centre.double()), made.network.decode(mean), atol=1e-4)
