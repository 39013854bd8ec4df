"""Diffusion in pixels: nothing is lost, IFPipeline draws the same, errors are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from finished_model import STORY, TEXT, UNET, Pictures, t5_folder, text_product

from ldm.config.errors import UserError
from ldm.config.schema import plain
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Cosine, Flow
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily, load
from ldm.families.pixels import PixelAutoencoder
from ldm.families.pretrained import PretrainedText
from ldm.formats.assembly import assemble
from ldm.formats.part import load_part

SIDE = 16
NETWORK = UNET
CONFIG = LatentDiffusion(
    network=NETWORK,
    process=Process(schedule=Cosine(), target="v"),
    variance=LearnedVariance(),
    defaults=Defaults(steps=4, chunk=2, guidance=2.0, sampler="ddpm", threshold="dynamic"),
)


def products(root: Path, pixels: PixelAutoencoder = PixelAutoencoder()) -> dict[str, Product]:
    folder = root / "autoencoder"
    pixels.adopt(pixels.find("pixels", print), folder)
    return {"autoencoder": Product(folder, ""), "text": Product(text_product(root / "text"), "")}


def built(root: Path, config: LatentDiffusion, pixels: PixelAutoencoder = PixelAutoencoder()) -> LatentDiffusionFamily:
    torch.manual_seed(0)
    context = Context(data=Pictures(), val=Pictures(), resolution=SIDE, seed=0, total_images=1, products=products(root, pixels))
    family = config.build(context)
    assert isinstance(family, LatentDiffusionFamily)
    return family


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pixels")
    built(root, CONFIG).save(root / "diffusion")
    assemble(root / "text", root / "autoencoder", root / "diffusion", root / "model", STORY)
    return root / "model"


def test_pixels_come_back_to_the_bit_and_cost_nothing(model: Path) -> None:
    family = load(model)
    image = Pictures().load([0, 1], [0, 1], SIDE, 0, False).image
    latents, deviation = family.codec.moments(image)
    assert torch.equal(latents, image) and deviation is None and torch.equal(family.codec.decode(latents), image)
    assert (family.codec.factor, family.codec.bound) == (1, 1.0) and not list(family.codec.network.parameters())
    assert load_part(model / "vae")[1] == {}
    cost, held = PixelAutoencoder().encoding(SIDE, print)
    assert cost.training == 0 and held == 2 * 3 * SIDE**2 + 4 * 6


def test_the_hybrid_loss_teaches_the_variance_what_the_bound_says(tmp_path: Path) -> None:
    family = built(tmp_path, CONFIG)
    terms, _ = family.loss(Pictures().load([0, 1], [0, 1], SIDE, 0, False), Rng(0, [0, 1]))
    rows = family.denoiser.conv_out.weight
    parts = [torch.autograd.grad(terms[name], rows, retain_graph=True)[0] for name in ("denoising", "variance")]
    assert parts[0][:3].any() and not parts[0][3:].any()
    assert parts[1][3:].any() and not parts[1][:3].any()


def test_a_larger_scale_is_the_same_pictures_in_other_units(tmp_path: Path) -> None:
    family = built(tmp_path, CONFIG, PixelAutoencoder(scaling_factor=2.0))
    image = Pictures().load([0], [0], SIDE, 0, False).image
    assert torch.equal(family.codec.moments(image)[0], 2 * image) and family.codec.bound == 2.0
    family.save(tmp_path / "diffusion")
    assemble(tmp_path / "text", tmp_path / "autoencoder", tmp_path / "diffusion", tmp_path / "model", STORY)
    said = (tmp_path / "model" / "model_index.json").read_text()
    assert "DiffusionPipeline" in said and "IFPipeline" not in said  # which knows [-1,1] alone
    assert torch.equal(load(tmp_path / "model").codec.std, torch.full((1, 3, 1, 1), 0.5))


@pytest.mark.parametrize("threshold", ["none", "static", "dynamic"])
def test_pictures_do_not_depend_on_their_neighbours(model: Path, threshold: str) -> None:
    family, wanted = load(model), Wanted(threshold=threshold)
    prompts = ["a red circle", "a blue ring", "a green square"]
    whole = family.sample(prompts, [5, 6, 7], wanted)
    assert all(torch.equal(whole[i], family.sample(prompts[i : i + 1], [5 + i], wanted)[0]) for i in range(3))


def test_if_pipeline_opens_the_folder_and_draws_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load(model)
    ours = family.sample(["a red circle"], [7])
    theirs: Any = diffusers.IFPipeline.from_pretrained(model)
    rng = Rng(0, [7])
    noises = [rng.normal("init", (3, SIDE, SIDE))] + [rng.normal(f"step{i}", (3, SIDE, SIDE)) for i in range(3)]
    drawn = iter([*noises, torch.zeros(1, 3, SIDE, SIDE)])
    for module in ("pipelines.deepfloyd_if.pipeline_if", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *a, **k: next(drawn))
    told = family.text.encode(["a red circle"]).tokens, family.text.encode([""]).tokens
    words = {"prompt_embeds": told[0], "negative_prompt_embeds": told[1]}
    found = theirs(**words, num_inference_steps=4, guidance_scale=2.0, output_type="np").images[0]
    assert abs(torch.from_numpy(found) * 255 - ours[0].float()).max() <= 1
    assert theirs.scheduler.config.variance_type == "learned_range"
    # The lines of the card read the prompt themselves.
    ids = theirs.tokenizer(["a red circle"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == TEXT.max_tokens and torch.allclose(theirs.text_encoder(ids)[0], told[0], atol=1e-5)
    assert "IFPipeline" in (model / "README.md").read_text()


def test_a_t5_beside_pixels_reads_the_prompt_in_if_pipeline_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    t5_folder(tmp_path / "t5")
    text = PretrainedText(path=str(tmp_path / "t5"))
    text.adopt(text.find(text.path, print), tmp_path / "words")
    own = {**products(tmp_path), "text": Product(tmp_path / "words", "")}
    torch.manual_seed(0)
    family = CONFIG.build(Context(data=Pictures(), val=Pictures(), resolution=SIDE, seed=0, total_images=1, products=own))
    family.save(tmp_path / "diffusion")
    assemble(tmp_path / "words", tmp_path / "autoencoder", tmp_path / "diffusion", tmp_path / "model", STORY)
    ours = load(tmp_path / "model").sample(["a red circle"], [7])
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", watermarker=None)
    assert isinstance(theirs, diffusers.IFPipeline) and type(theirs.text_encoder).__name__ == "T5EncoderModel"
    rng = Rng(0, [7])
    noises = [rng.normal("init", (3, SIDE, SIDE))] + [rng.normal(f"step{i}", (3, SIDE, SIDE)) for i in range(3)]
    drawn = iter([*noises, torch.zeros(1, 3, SIDE, SIDE)])
    for module in ("pipelines.deepfloyd_if.pipeline_if", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *a, **k: next(drawn))
    found = theirs("a red circle", num_inference_steps=4, guidance_scale=2.0, output_type="np", clean_caption=False).images[0]
    assert abs(torch.from_numpy(found) * 255 - ours[0].float()).max() <= 1


def test_what_does_not_fit_is_said_in_a_line(model: Path, tmp_path: Path) -> None:
    from finished_model import finished_model

    latent = load(finished_model(tmp_path))
    with pytest.raises(UserError, match=r"threshold: got dynamic: .* draws in latents, which have no range"):
        latent.settings(Wanted(threshold="dynamic"))
    assert latent.settings(Wanted(threshold="none")).threshold == "" and load(model).settings().threshold == "dynamic"
    with pytest.raises(UserError, match="threshold: got 'high'; choose one of"):
        load(model).settings(Wanted(threshold="high"))
    flow = LatentDiffusion(process=Process(schedule=Flow(), target="flow"), variance=LearnedVariance())
    stage: Any = type("Stage", (), {"model": "diffusion", "latents": ""})()
    assert "models.diffusion.variance: a flow has no steps" in next(flow.check(stage, "stages.x", ""))
    plain_keys = LatentDiffusion().identity()
    assert "variance" not in plain_keys and "threshold" not in plain_keys and "threshold" not in LatentDiffusion().shown()["defaults"]
    assert plain(LatentDiffusion())["variance"] is None
