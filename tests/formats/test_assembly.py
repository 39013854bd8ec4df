"""A finished model opens in diffusers and transformers, and draws there what it draws here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import KL, SIDE, STORY, UNET, Pictures, autoencoder_product, diffusion_product, finished_model, text_product

from ldm.config.errors import UserError
from ldm.diffusion.process import Process
from ldm.diffusion.schedules import Flow, ScaledLinear
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.families.registry import exported as read_source
from ldm.formats.assembly import assemble
from ldm.formats.atomic import verify
from ldm.formats.latent_codec import load_codec
from ldm.formats.part import content_hash
from ldm.formats.pipeline_folder import write_pipeline

PROMPTS = ["a small red circle", "a large blue ring"]
PROCESSES = {
    "epsilon": Process(),
    "v": Process(target="v", schedule=ScaledLinear(zero_terminal_snr=True)),
    "flow": Process(target="flow", schedule=Flow(shift=2.0)),
}


def noise(family: Any) -> torch.Tensor:
    side = SIDE // family.factor
    return torch.randn(len(PROMPTS), family.codec.channels, side, side, generator=torch.Generator().manual_seed(5))


def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    found = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("name", ["epsilon", "v"])
def test_stable_diffusion_pipeline_draws_the_same_picture(name: str, tmp_path: Path) -> None:
    folder = finished_model(tmp_path, process=PROCESSES[name])
    family = load(folder)
    latents = noise(family)
    ours = family.sample(PROMPTS, [0, 0], Wanted(steps=20, guidance=4.0, sampler="ddim"), latents=latents, negative="a ring").numpy()
    drawn = pipeline(folder)(
        PROMPTS, negative_prompt=["a ring"] * 2, latents=latents, num_inference_steps=20, guidance_scale=4.0, output_type="np"
    )
    theirs = np.round(drawn.images * 255)
    assert ours.shape == theirs.shape == (2, SIDE, SIDE, 3)
    assert np.abs(ours - theirs).max() <= 1
    assert ours.std() > 5 and np.abs(ours[0].astype(int) - ours[1]).max() > 5  # pictures, and of their own prompts


def test_flow_opens_with_a_scheduler_that_the_pipeline_can_use(tmp_path: Path) -> None:
    folder = finished_model(tmp_path, process=PROCESSES["flow"])
    drawn = pipeline(folder)
    assert type(drawn.scheduler).__name__ == "UniPCMultistepScheduler"
    image = drawn(PROMPTS[0], num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    assert image.shape == (SIDE, SIDE, 3) and np.isfinite(image).all() and image.std() > 0
    assert load(folder).process == PROCESSES["flow"]


@pytest.mark.parametrize("name", PROCESSES)
def test_the_cards_lines_for_vq_draw_as_they_stand(name: str, tmp_path: Path) -> None:
    folder = finished_model(tmp_path, "vq", PROCESSES[name])
    card = (folder / "README.md").read_text()
    assert "StableDiffusionPipeline.from_pretrained" not in card
    lines = card.split("```python\n")[1].split("```")[0]
    told: dict[str, Any] = {}
    torch.manual_seed(3)
    exec(lines.replace("MODEL", str(folder)), told)
    image = told["image"]
    assert image.shape == (1, 3, SIDE, SIDE) and image.isfinite().all()
    if name == "flow":
        return
    torch.manual_seed(3)
    family = load(folder)
    latents = torch.randn(1, 3, SIDE // 4, SIDE // 4)
    ours = family.sample([STORY["prompt"]], [0], Wanted(sampler="ddim"), latents=latents)
    theirs = ((image[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0)
    # A latent on the border of two codes may fall on either side.
    assert ((ours[0].float() - theirs).abs() <= 1).float().mean() > 0.98


def test_the_cards_lines_for_kl_draw_as_they_stand(kl_model: Path) -> None:
    lines = (kl_model / "README.md").read_text().split("```python\n")[1].split("```")[0]
    told: dict[str, Any] = {}
    exec(lines.replace("MODEL", str(kl_model)), told)
    assert told["image"].size == (SIDE, SIDE)


def test_the_card_survives_any_prompt(tmp_path: Path, kl_model: Path) -> None:
    root = kl_model.parent
    prompt = 'a "quoted" {brace} \\ back\nslash'
    assemble(root / "text", root / "autoencoder", root / "diffusion", tmp_path / "model", {**STORY, "prompt": prompt})
    lines = (tmp_path / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert repr(prompt) in lines or json.dumps(prompt) in lines
    compile(lines, "card", "exec")


def test_every_part_opens_in_its_own_library(vq_model: Path) -> None:
    from diffusers import UNet2DConditionModel, VQModel
    from transformers import CLIPTextModel, CLIPTokenizer

    for made, part in ((VQModel, "vqvae"), (UNet2DConditionModel, "unet"), (CLIPTextModel, "text_encoder")):
        _, said = made.from_pretrained(vq_model / part, output_loading_info=True)
        assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), part
    tokenizer = CLIPTokenizer.from_pretrained(vq_model / "tokenizer")
    assert tokenizer.eos_token_id > 2 and tokenizer.model_max_length == 16
    index = json.loads((vq_model / "model_index.json").read_text())
    assert index["vqvae"] == ["diffusers", "VQModel"] and "vae" not in index


def test_the_runs_own_clip_lies_beside_the_parts(own_clip_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    text = own_clip_model.parent / "text"
    assert content_hash(own_clip_model / "clip") == content_hash(text / "clip")
    exported = tmp_path / "exported"
    exported.mkdir()
    write_pipeline(read_source(str(own_clip_model)), exported, "fp32", "", 10**9, lambda said: None)
    assert content_hash(exported / "clip") == content_hash(text / "clip")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_warning()
        library.enable_propagation()
    try:
        for folder in (own_clip_model, exported):
            pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
            assert type(pipe.text_encoder).__name__ == "CLIPTextModel"
    finally:
        for library in (diffusers_logging, transformers_logging):
            library.disable_propagation()
    said = [record.getMessage() for record in caplog.records]
    assert not [line for line in said if any(word in line for word in ("projection", "not used", "UNEXPECTED", "MISSING", "newly"))], said


def test_folded_latents_have_unit_variance(kl_model: Path) -> None:
    codec = load_codec(kl_model / "vae")
    assert codec.statistics.mean == (0.0,) * 4 and codec.statistics.std == (1.0,) * 4
    data = Pictures()
    image = data.load(range(len(data)), range(len(data)), SIDE, 0, False).image
    mean, std = codec.moments(image)
    assert std is not None
    total = (mean.var((0, 2, 3), unbiased=False) + std.square().mean((0, 2, 3))).sqrt()
    assert torch.allclose(total, torch.ones(4), atol=1e-3)
    assert torch.allclose(mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    before = load_codec(kl_model.parent / "autoencoder" / "vae")
    assert torch.allclose(before.moments(image)[0], mean, atol=1e-3)
    assert torch.allclose(before.decode(mean), codec.decode(mean), atol=1e-4)


def test_the_model_draws_what_its_products_drew(kl_model: Path) -> None:
    from ldm.families.family import Context, Product
    from ldm.families.latent_diffusion.engine import Defaults
    from ldm.families.latent_diffusion.family import LatentDiffusion

    root = kl_model.parent
    products = {name: Product(root / name, "") for name in ("text", "autoencoder")}
    context = Context(
        data=Pictures(), val=Pictures(), resolution=SIDE, seed=0, total_images=1, products=products, init=Product(root / "diffusion", "")
    )
    before = LatentDiffusion(network=UNET, defaults=Defaults(steps=4, chunk=2)).build(context)
    drawn = [family.sample(PROMPTS, [1, 2]).int() for family in (before, load(kl_model))]
    assert (drawn[0] - drawn[1]).abs().max() <= 1


def test_the_folder_is_whole_and_safe(kl_model: Path) -> None:
    names = set(verify(kl_model))
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".txt", ".md"}
    assert {"model_index.json", "ldm.json", "README.md", "scheduler/scheduler_config.json"} <= names
    record = json.loads((kl_model / "ldm.json").read_text())
    assert record["story"] == STORY and record["defaults"]["size"] == [SIDE, SIDE]
    assert json.loads((kl_model / "unet" / "config.json").read_text())["sample_size"] == SIDE // 8


def test_another_autoencoder_is_refused(tmp_path: Path, kl_model: Path) -> None:
    root, other = kl_model.parent, autoencoder_product(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="latents of another autoencoder"):
        assemble(root / "text", other, root / "diffusion", tmp_path / "model", STORY)
    assert not (tmp_path / "model").exists()

    swapped = tmp_path / "swapped"
    shutil.copytree(kl_model, swapped)
    shutil.rmtree(swapped / "vae")
    shutil.copytree(other / "vae", swapped / "vae")
    (swapped / "manifest.json").unlink()
    with pytest.raises(UserError, match="its autoencoder is not the one its UNet was trained with"):
        load(swapped)


def test_a_unet_of_our_own_is_not_said_to_open_elsewhere(tmp_path: Path) -> None:
    network = replace(UNET, coordinates=True)
    text, autoencoder = text_product(tmp_path / "text"), autoencoder_product(tmp_path / "autoencoder")
    diffusion = diffusion_product(tmp_path / "diffusion", text, autoencoder, Process(), network)
    assemble(text, autoencoder, diffusion, tmp_path / "model", STORY)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "With diffusers" not in card and "sample.py" in card
    assert load(tmp_path / "model").sample(PROMPTS, [0, 1], Wanted(steps=2)).shape == (2, SIDE, SIDE, 3)


def test_assembling_again_replaces_the_model_at_once(tmp_path: Path, kl_model: Path) -> None:
    root, target = kl_model.parent, tmp_path / "model"
    target.mkdir()
    (target / "left.over").write_text("")
    assemble(root / "text", root / "autoencoder", root / "diffusion", target, STORY)
    assert not (target / "left.over").exists() and [p.name for p in tmp_path.iterdir()] == ["model"]
    assert KL.latent_channels == load(target).codec.channels
