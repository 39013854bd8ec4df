"""The choice of a perceptual distance, and what an autoencoder does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import KL as NETWORK
from finished_model import SIDE, Pictures
from safetensors.torch import save_file

from ldm.config.errors import UserError
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL, Adversarial
from ldm.families.family import Context, Product
from ldm.families.perceptual_loss import PerceptualClip, PerceptualLpips, PerceptualNone
from ldm.formats.part import save_part
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.perceptual import VGG16, load_lpips

DATA = Pictures()
TOWER = ImageTowerConfig(channels=(8, 16), embedding=8, grid=2)


def context(text: Path) -> Context:
    return Context(data=DATA, val=DATA, resolution=SIDE, seed=0, total_images=10, products={"text": Product(text, "")})


def save_tower(product: Path, embedding: int) -> None:
    """A random image tower in the product of a CLIP, which says that its embedding is so wide."""
    config = {**TOWER.to_dict(), "embedding": embedding, "resolution": SIDE}
    save_part(config, {**TOWER.build().state_dict(), "logit_scale": torch.tensor(0.0)}, product / "clip" / "image_tower")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product with a random image tower."""
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    save_tower(folder, TOWER.embedding)
    return folder


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of random VGG16 convolutions and heads."""
    torch.manual_seed(0)
    state, before = {}, 3
    for i, (numbers, width) in enumerate(VGG16):
        for number in numbers:
            state[f"features.{number}.weight"] = torch.randn(width, before, 3, 3) * (2 / (9 * before)) ** 0.5
            state[f"features.{number}.bias"] = torch.zeros(width)
            before = width
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1)
    file = tmp_path_factory.mktemp("lpips") / "vgg.safetensors"
    save_file(state, file)
    return file


def test_each_choice_says_what_it_reads(text: Path) -> None:
    assert PerceptualNone().inputs() == PerceptualLpips(weights="x").inputs() == {} and PerceptualClip().inputs() == {"text": "text"}
    assert PerceptualNone().build(context(text)) is None


def test_lpips_is_weighted_and_frozen(text: Path, lpips: Path) -> None:
    made = PerceptualLpips(weights=str(lpips), weight=0.5).build(context(text))
    image = DATA.load([0, 1, 2, 3], [0, 1, 2, 3], SIDE, 0, False).image
    a, b = image.chunk(2)
    assert torch.allclose(made(a, b), 0.5 * load_lpips(lpips)(a, b)) and bool((made(a, b) > 0).all())
    assert not any(p.requires_grad for p in made.parameters()) and not made.distance.training
    with pytest.raises(UserError, match="there is no such file"):
        PerceptualLpips(weights="none.pth").build(context(text))


@pytest.mark.parametrize("kind", ["clip", "lpips"])
def test_it_joins_the_reconstruction_loss_and_never_learns(kind: str, text: Path, lpips: Path) -> None:
    choice: Any = PerceptualClip(weight=3.0) if kind == "clip" else PerceptualLpips(weights=str(lpips), weight=3.0)
    torch.manual_seed(0)
    family = KL(network=NETWORK, perceptual=choice, adversarial=Adversarial(weight=0)).build(context(text))
    data = DATA.load([0, 1], [0, 1], SIDE, 0, False)
    terms, gauges = family(data, Rng(0, data.position))
    assert torch.isclose(terms["reconstruction"].detach(), gauges["l1"] + gauges["perceptual"])
    assert float(gauges["perceptual"]) > 0
    torch.stack(list(terms.values())).sum().backward()
    [distance] = family.frozen()
    assert all(p.grad is None for p in distance.parameters())
    assert not {id(p) for p in family.parameters()} & {id(p) for p in distance.parameters()}
    assert all(name.startswith("network.") for name in family.state_dict())  # so no checkpoint stores it

    mean, logvar = family.network.encode(data.image)
    noise = Rng(0, data.position).normal("posterior", mean.shape[1:])
    recon = family.network.decode(mean + (0.5 * logvar).exp() * noise)
    expected = (recon - data.image).abs().mean() + distance(recon, data.image).mean()
    weights = list(family.network.decoder.parameters())
    for mine, theirs in zip([p.grad for p in weights], torch.autograd.grad(expected, weights), strict=True):
        assert mine is not None and torch.allclose(mine, theirs, rtol=1e-3, atol=1e-6)


def test_the_tower_of_another_shape_is_refused(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_tower(tmp_path, 9)
    with pytest.raises(UserError, match="the weights do not fit"):
        PerceptualClip().build(context(tmp_path))
