"""A denoising network of another shape, added by one file and one name: read, trained, saved, reopened, drawn with, exported and costed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from finished_model import CAPTIONS, SIDE, STORY, Pictures, autoencoder_product, text_product
from patch_transformer import PatchesConfig, PatchTransformer, register

import ldm
from ldm.config import introspection, schema
from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.diffusion.rng import Rng
from ldm.families.draws import Running, Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily, load
from ldm.families.latent_diffusion.fine_tuning import LoraFamily, LowRank
from ldm.families.latent_diffusion.inpainting import Inpainting
from ldm.families.registry import exported as read_source
from ldm.formats.assembly import assemble
from ldm.formats.compvis_file import sayable
from ldm.formats.pipeline_folder import write_pipeline
from ldm.models import cost, denoiser
from ldm.models.unet import UNetConfig


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second member of the union, for these tests alone."""
    monkeypatch.setattr(denoiser, "Network", denoiser.Network)
    caches = (schema.adapter, introspection._hints_of)  # of types that were read before
    register()
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def products(tmp_path: Path) -> Path:
    text_product(tmp_path / "text")
    autoencoder_product(tmp_path / "autoencoder")
    return tmp_path


def context(products: Path, init: Path | None = None) -> Context:
    earlier = {name: Product(products / name, "") for name in ("text", "autoencoder")}
    continued = None if init is None else Product(init, "hash")
    data = Pictures()
    return Context(data=data, val=data, resolution=SIDE, seed=0, total_images=0, products=earlier, init=continued)


def trained(products: Path) -> LatentDiffusionFamily:
    """A family of it after some steps, whose loss has fallen."""
    torch.manual_seed(0)
    config = build({"network": {"kind": "patches"}, "caption_dropout": 0.0}, LatentDiffusion, "here")
    family = replace(config, defaults=Defaults(steps=4, chunk=2)).build(context(products))
    assert isinstance(family, LatentDiffusionFamily) and isinstance(family.denoiser, PatchTransformer)
    optimiser, data = torch.optim.AdamW(family.parameters(), lr=3e-3), Pictures().load(range(4), range(4), SIDE, 0, False)
    found = []
    for _ in range(20):
        terms, _ = family(data, Rng(0, data.position))
        optimiser.zero_grad()
        terms["denoising"].backward()
        optimiser.step()
        found.append(float(terms["denoising"].detach()))
    assert found[-1] < 0.9 * found[0]
    return family.eval()


def test_it_is_chosen_by_its_kind() -> None:
    read = build({"network": {"kind": "patches", "width": 16}}, LatentDiffusion, "here").network
    assert read == PatchesConfig(width=16)
    assert build({"network": {"kind": "unet", "layers": 1}}, LatentDiffusion, "here").network == UNetConfig(layers=1)
    assert build({}, LatentDiffusion, "here").network == UNetConfig()
    with pytest.raises(UserError, match=r"network\.kind.*'dit'.*patches"):
        build({"network": {"kind": "dit"}}, LatentDiffusion, "here")
    with pytest.raises(UserError, match=r"network\.layers"):
        build({"network": {"kind": "patches", "layers": 1}}, LatentDiffusion, "here")


def test_it_trains_is_saved_reopened_and_draws(products: Path) -> None:
    family = trained(products)
    family.save(products / "diffusion")
    assemble(products / "text", products / "autoencoder", products / "diffusion", products / "model", STORY)
    index = json.loads((products / "model" / "model_index.json").read_text())
    assert index["transformer"] == ["ldm", "PatchTransformer"] and "unet" not in index and index["_class_name"] == "DiffusionPipeline"
    for sampler in ("dpmpp_2m", "ddim"):
        plain = load(products / "model").sample(CAPTIONS[:3], settings=Wanted(sampler=sampler))
        wanted = ldm.load(products / "model").sample(CAPTIONS[:3], settings=Wanted(sampler=sampler))
        assert (plain.int() - wanted.int()).abs().max() <= 1  # in the form that only draws sums are taken in another order
        for running in (Running(), Running(low_memory=True)):
            made = load(products / "model", low_memory=running.low_memory)
            made.ready(products / "model", running, "fp32")
            assert torch.equal(made.sample(CAPTIONS[:3], settings=Wanted(sampler=sampler)), wanted)
    source = read_source(str(products / "model"))
    (products / "copy").mkdir()
    write_pipeline(source, products / "copy", "fp32", "", 10**9, lambda line: None)
    assert torch.equal(ldm.load(products / "copy").sample(CAPTIONS[:3]), ldm.load(products / "model").sample(CAPTIONS[:3]))
    with pytest.raises(UserError, match="patches has no place in a CompVis file"):
        sayable(source)


def test_it_is_continued_adapted_and_not_widened(products: Path) -> None:
    trained(products).save(products / "diffusion")
    config = LatentDiffusion(network=PatchesConfig())
    family = config.build(context(products, products / "diffusion"))
    assert isinstance(family, LatentDiffusionFamily) and torch.equal(family.denoiser.proj_in.bias, trained(products).denoiser.proj_in.bias)
    adapted = replace(config, adapt=LowRank(rank=2)).build(context(products, products / "diffusion"))
    assert isinstance(adapted, LoraFamily) and len(adapted.unet) == 2 * 8 * 2  # two blocks of eight projections, two matrices each
    with pytest.raises(UserError, match=r"another shape than diffusion\.network"):
        replace(config, network=PatchesConfig(depth=1)).build(context(products, products / "diffusion"))
    with pytest.raises(UserError, match="another shape"):
        replace(config, network=UNetConfig(channels=(32,), attention=(True,))).build(context(products, products / "diffusion"))
    with pytest.raises(UserError, match="PatchTransformer cannot be widened"):
        replace(config, inpaint=Inpainting()).build(context(products, products / "diffusion"))


def test_it_is_costed() -> None:
    network = PatchesConfig()
    parameters, found = cost.denoiser(network, 16, 16, 7)
    assert parameters == cost.count(network.build()) and found.forward > 0 and found.backward > found.forward
    _, recomputed = cost.denoiser(replace(network, checkpointing=True), 16, 16, 7)
    assert recomputed.activations < found.activations and recomputed.backward > found.backward


def test_its_configuration_survives_a_config_json() -> None:
    network = PatchesConfig(width=48, checkpointing=True)
    assert denoiser.config_of(network.to_diffusers()) == network
    assert denoiser.config_of({**network.to_diffusers(), "sample_size": 4, "_diffusers_version": "1"}) == network
    with pytest.raises(UserError, match="'layers' is not known here"):
        denoiser.config_of({**network.to_diffusers(), "layers": 2})
    with pytest.raises(
        UserError,
        match="'DiTTransformer2DModel'; a denoising network is one of UNet2DConditionModel, LDMUNet, UNet2DModel, PatchTransformer",
    ):
        denoiser.config_of({"_class_name": "DiTTransformer2DModel"})
