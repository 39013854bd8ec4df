"""The networks alone and the gradients of one training step, against diffusers and transformers on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from finished_model import text_product
from pipelines import NEGATIVE, PROMPTS, Pair, pipeline_folder
from torch import Tensor
from torch.nn import functional as F

from ldm.diffusion.batch import Cond, ImageBatch, Text
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.models.autoencoder import VQConfig
from ldm.models.unet import UNetConfig
from ldm.text.encoder import TextEncoder

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", LIMIT, ids=["float32", "float64"])
POSITIONS = [4, 9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("networks")
    return {target: pipeline_folder(root / target, target=target) for target in ("epsilon", "v")}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.std() > 1e-3
    assert float((ours - theirs).abs().max()) <= LIMIT[ours.dtype]


@DTYPES
@torch.no_grad()
def test_autoencoder(folders: dict[str, Path], dtype: torch.dtype) -> None:
    pair = Pair(folders["epsilon"], dtype)
    image, latent = draw(2, 3, 32, 40, dtype=dtype).clamp(-1, 1), draw(2, 4, 8, 10, dtype=dtype)
    mean, logvar = pair.family.codec.network.encode(image)
    theirs = pair.made.vae.encode(image).latent_dist
    near(mean, theirs.mean)
    near(logvar.clamp(-30, 20), theirs.logvar)
    near(pair.family.codec.moments(image)[0], 0.25 * theirs.mean)  # the scaling factor
    near(pair.family.codec.decode(latent), pair.made.vae.decode(latent / 0.25).sample)


@DTYPES
@torch.no_grad()
def test_vq_autoencoder(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = diffusers.VQModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=32,
        vq_embed_dim=5,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    theirs.quantize.embedding.weight.data.normal_()
    ours = VQConfig.from_diffusers(dict(theirs.config)).build().eval()
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    image = draw(2, 3, 16, 24, dtype=dtype)
    latent = theirs.encode(image).latents
    near(ours.encode(image), latent)
    near(ours.decode(latent), theirs.decode(latent).sample)


@DTYPES
@pytest.mark.parametrize("shape", ["sd1", "sd1-inpaint", "sd2", "sdxl"])
@torch.no_grad()
def test_unet(dtype: torch.dtype, shape: str) -> None:
    """The wiring of every published UNet at a small width."""
    common: dict[str, Any] = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 2, "sample_size": 8}
    attention, plain = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
    kinds = [attention, attention, plain]
    own: dict[str, Any] = {"cross_attention_dim": 12, "attention_head_dim": 2}
    if shape == "sd1-inpaint":
        own["in_channels"] = 9
    if shape == "sd2":
        own |= {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True}
    if shape == "sdxl":
        kinds = [plain, attention, attention]
        own |= {
            "attention_head_dim": (1, 2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2, 3),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
        }
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(
        **common, **own, down_block_types=tuple(d for d, _ in kinds), up_block_types=tuple(u for _, u in kinds[::-1])
    ).eval()
    ours = UNetConfig.from_diffusers(dict(theirs.config)).build().eval()
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, tokens, pooled = draw(2, 4, 8, 12, dtype=dtype), draw(2, 7, 12, dtype=dtype, seed=1), draw(2, 10, dtype=dtype, seed=2)
    image = draw(2, 5, 8, 12, dtype=dtype, seed=3) if shape == "sd1-inpaint" else None
    size = torch.tensor([[640, 480, 0, 32, 512, 512], [64, 64, 0, 0, 64, 64]]).float()
    t = torch.tensor([7.0, 981.0])
    added = {"text_embeds": pooled, "time_ids": size} if shape == "sdxl" else None
    wanted = theirs(x if image is None else torch.cat([x, image], 1), t, tokens, added_cond_kwargs=added).sample
    told = Cond(text=Text(tokens=tokens, mask=torch.ones(2, 7, dtype=torch.bool), pooled=pooled), size=size, image=image)
    near(ours(x, t, told), wanted)
    near(ours(x, t, told, ours.remember(told.text)), wanted)


@DTYPES
@torch.no_grad()
def test_text_states(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    text_product(tmp_path)
    encoder = TextEncoder.load(tmp_path)
    encoder.model.to(dtype)
    theirs = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", dtype=dtype).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    prompts = [*PROMPTS, NEGATIVE, "", "a red ring " * 30]
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
    found, wanted = encoder.encode(prompts), theirs(ids)
    near(found.tokens, wanted.last_hidden_state)
    assert found.pooled is not None
    near(found.pooled, wanted.pooler_output)


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_gradients_of_a_training_step(folders: dict[str, Path], target: Any) -> None:
    """The textbook's step: diffusers' UNet, text encoder, posterior, noise scheduler and mean squared error."""
    pair = Pair(folders[target], torch.float64)
    rng, caption = Rng(3, POSITIONS), tuple(PROMPTS)
    image = draw(2, 3, 32, 32, dtype=torch.float64, seed=5).clamp(-1, 1)
    size = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2).float()
    process = pair.family.process
    assert process == Process(target=target)
    family = pair.family.train().requires_grad_(True)
    family.config = replace(family.config, caption_dropout=0.0)
    terms, _ = family(ImageBatch(image=image, caption=caption, size=size, position=torch.tensor(POSITIONS)), rng)

    with torch.no_grad():
        posterior = pair.made.vae.encode(image).latent_dist
        x0 = 0.25 * (posterior.mean + posterior.std * rng.normal("posterior", posterior.mean.shape[1:]).double())
        ids = pair.made.tokenizer(
            PROMPTS, padding="max_length", max_length=pair.made.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        text = pair.made.text_encoder(ids).last_hidden_state
    t = process.schedule.draw(process.density.warp(rng.uniform("t")))
    eps = rng.normal("eps", x0.shape[1:]).double()
    scheduler = diffusers.DDPMScheduler.from_config(pair.made.scheduler.config)
    scheduler.alphas_cumprod = process.alpha_sigma(torch.arange(1000))[0] ** 2  # theirs is float32
    unet = pair.made.unet.train().requires_grad_(True)
    output = unet(scheduler.add_noise(x0, eps, t.long()), t.long(), text).sample
    wanted = F.mse_loss(output, eps if target == "epsilon" else scheduler.get_velocity(x0, eps, t.long()))

    assert abs(float(terms["denoising"].detach() - wanted.detach())) <= 1e-12
    terms["denoising"].backward()
    wanted.backward()
    theirs = dict(unet.named_parameters())
    ours = dict(family.denoiser.named_parameters())
    assert ours.keys() == theirs.keys()
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    assert largest > 1e-3
    for name, parameter in ours.items():
        assert parameter.grad is not None and theirs[name].grad is not None, name
        assert float((parameter.grad - theirs[name].grad).abs().max()) <= 1e-12, name
