"""The autoencoder recipes against latent diffusion's losses, written out as their code has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ldm.config.schema import load
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL, VQ, AutoencoderFamily
from ldm.families.family import Context
from ldm.runs.run import Run

CONFIGS = Path(__file__).parents[2] / "configs"
SIDE, BATCH = 32, 2
VALUES = 3 * SIDE * SIDE


def family(recipe: str, *words: str) -> AutoencoderFamily:
    """A recipe's family at a small size, in float64, its discriminator at work."""
    small = [
        "network.channels=[8,16,16]",
        "network.layers=1",
        "network.norm_groups=4",
        "perceptual.kind=none",
        "adversarial.start=0",
        "adversarial.discriminator={channels: 8, layers: 2, norm_groups: 8}",
        *words,
    ]
    run = load(CONFIGS / recipe, ["data.path=x", *(f"models.autoencoder.{word}" for word in small)], Run)
    assert isinstance(run.models["autoencoder"], KL | VQ)
    torch.manual_seed(0)
    context = Context(data=None, val=None, resolution=SIDE, seed=0, total_images=8)  # type: ignore[arg-type]
    return run.models["autoencoder"].build(context).double()


def pictures() -> torch.Tensor:
    return torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def gradients(ours: AutoencoderFamily) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of our loss, with our terms."""
    image = pictures()
    batch = ImageBatch(image=image, caption=("",) * BATCH, size=torch.zeros(BATCH, 6), position=torch.arange(BATCH))
    terms, gauges = ours(batch, Rng(0, [0, 1]))
    torch.stack([terms[name] for name in terms if name != "discriminator"]).sum().backward()
    found = {name: p.grad.clone() for name, p in ours.network.named_parameters() if p.grad is not None}
    ours.zero_grad()
    return found, terms | gauges


def lambda_of(reconstruction: torch.Tensor, opinion: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """calculate_adaptive_weight, without its factor."""
    slopes = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (reconstruction, opinion)]
    return (slopes[0] / (slopes[1] + 1e-4)).clamp(0, 1e4).detach()


@pytest.mark.parametrize("clamped", [False, True])
def test_kl_f8_is_the_original_s_sums_divided_by_the_number_of_pixel_values(clamped: bool) -> None:
    # Far out, the opinion's slope is so small that lambda meets its limit.
    ours = family("autoencoder-kl-f8.yaml", f"adversarial.max_weight={1e4 / VALUES}")
    assert ours.discriminator is not None
    if clamped:
        with torch.no_grad():
            ours.discriminator.layers[-1].weight.mul_(1e-9)
    found, terms = gradients(ours)
    image = pictures()
    mean, logvar = ours.network.encode(image)
    noise = Rng(0, [0, 1]).normal("posterior", mean.shape[1:]).to(mean)
    recon = ours.network.decode(mean + (0.5 * logvar).exp() * noise)
    nll = (recon - image).abs().sum() / BATCH
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / BATCH
    opinion = -ours.discriminator(recon).mean()
    weight = lambda_of(nll, opinion, ours.network.last_layer)
    assert (float(weight) == 1e4) == clamped
    (nll + 1e-6 * kl + 0.5 * weight * opinion).backward()
    assert float(terms["reconstruction"]) * VALUES == pytest.approx(nll.item(), rel=1e-9)
    assert float(terms["kl"]) * VALUES == pytest.approx(1e-6 * kl.item(), rel=1e-9)
    assert float(terms["lambda"]) * VALUES == pytest.approx(0.5 * float(weight), rel=1e-4)
    scale = max(float(p.grad.abs().max()) for p in ours.network.parameters())  # type: ignore[union-attr]
    for name, parameter in ours.network.named_parameters():
        assert torch.allclose(found[name] * VALUES, parameter.grad, rtol=1e-4, atol=1e-7 * scale), name  # type: ignore[arg-type]


def test_kl_f8_s_limit_is_that_of_256_px() -> None:
    run = load(CONFIGS / "autoencoder-kl-f8.yaml", ["data.path=x", "models.autoencoder.perceptual.weights=x"], Run)
    made: Any = run.models["autoencoder"]
    assert made.adversarial.max_weight == pytest.approx(1e4 / (3 * 256 * 256), rel=1e-5)
    stage: Any = run.stages["autoencoder"]
    assert stage.steps == 246_803 and int(made.adversarial.start * stage.images / stage.batch) in (50_000, 50_001)
    assert stage.optim.lr == pytest.approx(4.5e-6 * stage.batch)


def test_vq_f4_has_the_weights_that_the_original_trained_with() -> None:
    ours = family("autoencoder-vq-f4.yaml", "network.codes=32")
    assert ours.discriminator is not None
    found, terms = gradients(ours)
    image = pictures()
    z = ours.network.encode(image)
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    codebook = ours.network.codebook
    index = torch.cdist(flat, codebook).argmin(1)
    quantised = codebook[index].view(BATCH, *z.shape[2:], -1).permute(0, 3, 1, 2)
    codes = (quantised.detach() - z).square().mean() + 0.25 * (quantised - z.detach()).square().mean()  # `legacy`, beta = 0.25
    recon = ours.network.decode(z + (quantised - z).detach(), quantise=False)
    nll, opinion = F.l1_loss(recon, image), -ours.discriminator(recon).mean()
    (nll + codes + 0.75 * lambda_of(nll, opinion, ours.network.last_layer) * opinion).backward()
    assert sum(float(terms[name]) for name in ("codebook", "commitment")) == pytest.approx(codes.item(), rel=1e-9)
    for name, parameter in ours.network.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-5, atol=1e-10), name  # type: ignore[arg-type]
