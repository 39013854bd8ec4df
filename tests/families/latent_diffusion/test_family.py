"""Latent diffusion: what is learned, what is drawn, and that both depend on addresses alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import CAPTIONS, SIDE, TEXT, UNET, Pictures, autoencoder_product, diffusion_product, text_product
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, ImageBatch, MomentBatch, rows
from ldm.diffusion.process import MinSnr, Process
from ldm.diffusion.rng import Rng
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily, load
from ldm.families.latent_diffusion.masked_loss import MaskedLoss
from ldm.formats.latent_codec import autoencoder_folder
from ldm.text.encoder import TextEncoder, small_clip_text
from ldm.text.prompt_syntax import Piece
from ldm.text.weighted import encode

DEFAULTS = Defaults(steps=3, chunk=2)
DATA = Pictures()


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a text encoder, of two autoencoders and of a UNet on the first."""
    root = tmp_path_factory.mktemp("products")
    text_product(root / "text")
    autoencoder_product(root / "autoencoder")
    autoencoder_product(root / "vq", "vq")
    diffusion_product(root / "diffusion", root / "text", root / "autoencoder", Process())
    return root


def made(root: Path, autoencoder: str = "autoencoder", init: Path | None = None, **fields: Any) -> LatentDiffusionFamily:
    given = {name: Product(root / folder, "") for name, folder in (("text", "text"), ("autoencoder", autoencoder))}
    context = Context(
        data=DATA, val=DATA, resolution=SIDE, seed=0, total_images=100, products=given, init=None if init is None else Product(init, "")
    )
    torch.manual_seed(1)
    return LatentDiffusion(**{"network": UNET, "defaults": DEFAULTS, **fields}).build(context)


def batch(*positions: int) -> ImageBatch:
    index = [p % len(DATA) for p in positions]
    return DATA.load(index, positions, SIDE, 0, False)


def loss(family: LatentDiffusionFamily, data: ImageBatch | MomentBatch) -> Tensor:
    terms, _ = family(data, Rng(7, data.position))
    return torch.stack(list(terms.values())).sum()


class Listener(nn.Module):
    """A network that says nothing and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.told: list[tuple[Tensor, Tensor, Cond]] = []

    told_more = False
    config, joins = UNET, 0

    def remember(self, text: Any) -> None:
        return None

    def schedule(self, t: Tensor, cond: Cond) -> list[None]:
        return [None] * len(t)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, memory: None = None, step: None = None) -> Tensor:
        self.told.append((x, t, cond))
        return x * self.scale


# Learning


@pytest.mark.parametrize("target", ["epsilon", "v"])
def test_the_loss_is_the_weighted_squared_error_of_the_prediction(products: Path, target: Any) -> None:
    process = Process(target=target, weighting=MinSnr())
    family, data = made(products, process=process, caption_dropout=0.0), batch(0, 5, 9)
    mean, std = family.codec.moments(data.image)
    assert std is not None
    x0 = mean + std * Rng(7, data.position).normal("posterior", mean.shape[1:])
    noised = process.noise(x0, Rng(7, data.position))
    cond = Cond(text=family.text.encode(data.caption), size=data.size)
    error = (family.denoiser(noised.x, noised.t, cond) - noised.target).square()
    expected = sum(noised.weight[i] * error[i].mean() for i in range(3)) / 3
    assert torch.isclose(loss(family, data), expected, rtol=1e-5)


def test_a_batch_is_the_mean_of_its_parts_and_repeats_to_the_bit(products: Path) -> None:
    family, data = made(products, caption_dropout=0.5), batch(0, 1, 2, 3, 14, 15)
    whole = loss(family, data)
    assert torch.equal(whole, loss(family, data))
    parts = torch.stack([loss(family, rows(data, start, start + 2)) for start in (0, 2, 4)])
    assert torch.isclose(whole, parts.mean(), rtol=1e-5)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(whole, loss(family, data))


def test_captions_are_dropped_by_address_and_at_the_set_share(products: Path) -> None:
    family = made(products, caption_dropout=0.25)
    family.denoiser = Listener()
    positions = range(400)
    seen = []
    for start in range(0, 400, 50):
        loss(family, batch(*positions[start : start + 50]))
        seen.append(family.denoiser.told[-1][2].text.tokens)
    empty = family.text.encode([""])
    dropped = (torch.cat(seen) == empty.tokens).flatten(1).all(1)
    assert torch.equal(dropped, Rng(7, positions).uniform("caption_dropout") < 0.25)
    assert 70 <= int(dropped.sum()) <= 130
    loss(family, batch(*range(7, 390, 3)))  # other neighbours
    again = (family.denoiser.told[-1][2].text.tokens == empty.tokens).flatten(1).all(1)
    assert torch.equal(again, dropped[7:390:3])
    told = family.denoiser.told[-1][2].text
    assert torch.equal(told.mask[again][0], empty.mask[0]) and torch.equal(told.pooled[again][0], empty.pooled[0])


def test_all_captions_dropped_is_the_loss_of_empty_captions(products: Path) -> None:
    data = batch(0, 1, 2)
    always, never = made(products, caption_dropout=1.0), made(products, caption_dropout=0.0)
    assert torch.equal(loss(always, data), loss(never, replace(data, caption=("",) * 3)))
    assert not torch.equal(loss(always, data), loss(never, data))


@pytest.mark.parametrize("autoencoder", ["autoencoder", "vq"])
def test_cached_moments_teach_the_same(products: Path, autoencoder: str) -> None:
    family, data = made(products, autoencoder), batch(0, 1, 2)
    mean, std = family.codec.moments(data.image)
    assert (std is None) == (autoencoder == "vq")
    cached = MomentBatch(mean=mean, std=std, caption=data.caption, size=data.size, position=data.position)
    assert torch.equal(loss(family, data), loss(family, cached))
    halves = MomentBatch(
        mean=mean.half(), std=None if std is None else std.half(), caption=data.caption, size=data.size, position=data.position
    )
    assert torch.isclose(loss(family, data), loss(family, halves), rtol=1e-2)


def test_the_masked_loss_learns_what_the_mask_leaves(products: Path) -> None:
    data, plain = batch(0, 1, 2), made(products, caption_dropout=0.0)
    family = made(products, caption_dropout=0.0, masked_loss=MaskedLoss())
    whole = torch.ones(3, 1, *data.image.shape[2:])
    assert torch.equal(loss(family, replace(data, mask=whole)), loss(plain, data))
    assert float(loss(family, replace(data, mask=0 * whole))) == 0
    left, right = whole.clone(), whole.clone()
    left[..., whole.shape[3] // 2 :], right[..., : whole.shape[3] // 2] = 0, 0
    halves = loss(family, replace(data, mask=left)) + loss(family, replace(data, mask=right))
    assert torch.isclose(halves, loss(plain, data), rtol=1e-5)
    mean, std = family.codec.moments(data.image)
    small = torch.nn.functional.avg_pool2d(left, family.factor)
    cached = MomentBatch(mean=mean, std=std, caption=data.caption, size=data.size, position=data.position, mask=small)
    assert torch.isclose(loss(family, cached), loss(family, replace(data, mask=left)), rtol=1e-5)
    assert made(products).config.identity() == made(products, masked_loss=None, caption_chunks=1).config.identity()
    assert family.config.identity()["masked_loss"] == {"unmasked": 0.0, "normalise": False}


def test_captions_of_several_chunks_are_told_whole(products: Path) -> None:
    family = made(products, caption_dropout=0.5, caption_chunks=3)
    family.denoiser = Listener()
    room = family.text.room
    long = next(text for n in range(1, 40) if len(family.text.words(text := "red circle " * n)) > room)
    data = replace(batch(*range(8)), caption=(long, "a red circle") * 4)
    loss(family, data)
    told = family.denoiser.told[-1][2].text
    assert told.tokens.shape[1] == 3 * family.text.max_tokens
    drawn = encode(family.text, [[Piece(text)] for text in (*data.caption, "")], 3).tokens
    dropped = Rng(7, range(8)).uniform("caption_dropout") < 0.5
    for row in range(8):
        assert torch.equal(told.tokens[row], drawn[8] if dropped[row] else drawn[row])
    assert len(family.text.words(long)) <= 3 * room and family.cut_captions([long]) is None
    assert made(products).cut_captions([long]) is not None


def test_only_the_unet_learns(products: Path) -> None:
    family = made(products)
    assert {id(p) for p in family.parameters()} == {id(p) for p in family.denoiser.parameters()}
    assert all(name.startswith("denoiser.") for name in family.state_dict())
    loss(family, batch(0, 1)).backward()
    assert all(p.grad is not None for p in family.denoiser.parameters())
    assert not any(p.requires_grad for module in family.frozen() for p in module.parameters())


def test_the_loss_falls(products: Path) -> None:
    family, data = made(products), batch(0, 1, 2, 3)
    optimiser = torch.optim.AdamW(family.parameters(), lr=3e-3)
    found = []
    for _ in range(30):
        optimiser.zero_grad()
        value = loss(family, data)
        value.backward()
        optimiser.step()
        found.append(float(value.detach()))
    assert found[-1] < 0.7 * found[0]


# Continuing


def test_an_earlier_stage_is_continued_with_its_weights(products: Path) -> None:
    family = made(products, init=products / "diffusion")
    other = made(products)
    stored = LatentDiffusion(network=UNET)
    assert family.config.process == stored.process
    from ldm.formats.part import load_part

    state = load_part(products / "diffusion" / "unet")[1]
    assert all(torch.equal(value, state[name]) for name, value in family.denoiser.state_dict().items())
    assert not all(torch.equal(value, state[name]) for name, value in other.denoiser.state_dict().items())
    assert all(p.requires_grad for p in family.denoiser.parameters())


def test_another_autoencoder_or_shape_is_not_continued(products: Path, tmp_path: Path) -> None:
    autoencoder_product(tmp_path / "autoencoder", seed=1)
    shutil.copytree(products / "text", tmp_path / "text")
    with pytest.raises(UserError, match="latents of another autoencoder"):
        made(tmp_path, init=products / "diffusion")
    with pytest.raises(UserError, match=r"another shape than diffusion\.network"):
        made(products, init=products / "diffusion", network=replace(UNET, layers=2))
    with pytest.raises(UserError, match="no autoencoder here"):
        autoencoder_folder(products / "text")


# Drawing


def test_a_picture_does_not_depend_on_its_neighbours(products: Path) -> None:
    family = made(products)
    prompts, seeds = list(CAPTIONS[:5]), [3, 1, 4, 1, 5]
    whole = family.sample(prompts, seeds, Wanted(sampler="ddpm"))
    assert whole.shape == (5, SIDE, SIDE, 3) and whole.dtype == torch.uint8
    for i in range(5):
        assert torch.equal(whole[i], family.sample([prompts[i]], [seeds[i]], Wanted(sampler="ddpm"))[0])
    turned = family.sample(prompts[::-1], seeds[::-1], Wanted(sampler="ddpm"))
    assert torch.equal(turned.flip(0), whole)
    assert not torch.equal(whole[0], family.sample(prompts[:1], [4], Wanted(sampler="ddpm"))[0])
    assert family.sample([], []).shape == (0, SIDE, SIDE, 3)


def test_given_noise_stands_in_for_the_seeds(products: Path) -> None:
    family = made(products)
    noise = Rng(0, [8, 9, 10]).normal("init", (4, 4, 4))
    given = family.sample(CAPTIONS[:3], [0, 0, 0], Wanted(sampler="ddim"), latents=noise)
    assert torch.equal(given, family.sample(CAPTIONS[:3], [8, 9, 10], Wanted(sampler="ddim")))


def test_without_a_negative_prompt_guidance_starts_from_the_dropped_caption(products: Path) -> None:
    family = made(products, caption_dropout=1.0)
    family.denoiser = Listener()
    loss(family, batch(0, 1))
    dropped = family.denoiser.told[-1][2].text.tokens
    family.sample(CAPTIONS[:2], [0, 1], Wanted(guidance=3.0))
    told = family.denoiser.told[-1][2]
    assert torch.equal(told.text.tokens[:2], dropped)
    assert torch.equal(told.text.tokens[2:], family.text.encode(CAPTIONS[:2]).tokens)
    assert told.size.tolist() == [[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 4
    family.sample(CAPTIONS[:2], [0, 1], Wanted(guidance=3.0), negative="a ring")
    assert torch.equal(family.denoiser.told[-1][2].text.tokens[0], family.text.encode(["a ring"]).tokens[0])
    family.sample(CAPTIONS[:2], [0, 1], Wanted(guidance=1.0), negative="a ring")
    assert len(family.denoiser.told[-1][0]) == 2  # no guidance, no second half


def test_steps_are_told_and_the_unet_goes_on_learning(products: Path) -> None:
    family = made(products)
    family.train()
    told: list[tuple[int, int]] = []
    family.sample(CAPTIONS[:3], [0, 1, 2], Wanted(steps=4), on_step=lambda done, of: told.append((done, of)))
    assert told == [(i + 1, 8) for i in range(8)]
    assert family.denoiser.training and not family.codec.network.training


def test_any_multiple_of_the_factor_can_be_drawn(products: Path) -> None:
    family = made(products)
    assert family.sample(["a ring"], [0], size=(24, 48)).shape == (1, 24, 48, 3)
    for size in ((30, 32), (32, 20), (0, 32)):
        with pytest.raises(UserError, match=r"size: got .* multiples of 8"):
            family.sample(["a ring"], [0], size=size)


def test_mistakes_are_named(products: Path) -> None:
    family = made(products)
    for words, said in {
        "sampler": "sampler: got 'nosuch'; choose one of ddpm",
        "spacing": "spacing: got 'nosuch'; choose one of trailing",
    }.items():
        with pytest.raises(UserError, match=said):
            family.sample(["a"], [0], Wanted(**{words: "nosuch"}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="steps: got 1001"):
        family.sample(["a"], [0], Wanted(steps=1001))
    with pytest.raises(UserError, match="sampler: got 'x'"):
        Defaults(sampler="x")
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        family.sample(["a", "b"], [0])


def test_previews_are_pictures_of_the_captions(products: Path) -> None:
    family, data = made(products), batch(0, 1, 2)
    shown = family.preview(data, seed=5)
    drawn = family.sample(list(data.caption), [5, 6, 7]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(shown, drawn)
    shares = [family.preview(batch(0), seed=5), family.preview(batch(1, 2), seed=6)]  # as two processes draw them
    assert family.preview_by_sample and torch.equal(shown, torch.cat(shares))


# Folders


def test_a_finished_model_loads_as_it_was(kl_model: Path) -> None:
    family = load(kl_model)
    assert family.defaults["size"] == (SIDE, SIDE) and family.defaults["steps"] == 4 and family.defaults["chunk"] == 2
    assert not family.training and len(family.content_hash) == 64
    assert torch.equal(family.sample(["a ring"], [0]), load(str(kl_model)).sample(["a ring"], [0]))


def test_a_stable_diffusion_folder_draws_what_its_pipeline_draws(products: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    parts = {
        "vae": AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            scaling_factor=0.4,
            sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "unet": UNet2DConditionModel(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            sample_size=8,
        ),
        "text_encoder": CLIPTextModel.from_pretrained(products / "text" / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(products / "text" / "tokenizer"),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="trailing",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=True,
        ),
    }
    pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    family = load(tmp_path / "model")
    assert family.defaults["size"] == (16, 16) and family.defaults["guidance"] == 7.5
    noise = torch.randn(1, 4, 8, 8)
    ours = family.sample(["a red ring"], [0], Wanted(steps=10, sampler="ddim"), latents=noise)[0].float()
    theirs = pipeline("a red ring", num_inference_steps=10, latents=noise, output_type="pt").images[0].permute(1, 2, 0) * 255
    assert (ours - theirs.round()).abs().max() <= 1


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


SCHEDULER, WEIGHTS = "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "record": (lambda m: (m / "ldm.json").write_text("{"), "ldm.json is not readable JSON"),
    "defaults": (lambda m: edit(m / "ldm.json", defaults={"size": [32, 32], "steps": "many"}), "ldm.json: .*steps.*many"),
    "size": (lambda m: edit(m / "ldm.json", defaults={"size": "large"}), "ldm.json: .*size.*large"),
    "scheduler": (lambda m: (m / SCHEDULER).unlink(), "scheduler_config.json is missing"),
    "schedule": (lambda m: edit(m / SCHEDULER, beta_start="x"), "scheduler_config.json: .*x"),
    "unet": (lambda m: truncate(m / WEIGHTS), "truncated or not a safetensors file"),
    "vae": (
        lambda m: edit(m / "vae/config.json", _class_name="AutoencoderTiny"),
        "AutoencoderKL, VQModel, AutoencoderDC, LDMPixels or LDMPalette was expected",
    ),
    "shape": (lambda m: edit(m / "unet/config.json", layers_per_block=2), r"unet/config\.json: its bytes differ"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_one_clear_line(kl_model: Path, tmp_path: Path, damage: str) -> None:
    spoil, words = DAMAGE[damage]
    model = tmp_path / "model"
    shutil.copytree(kl_model, model)
    spoil(model)
    with pytest.raises(UserError, match=words) as caught:
        load(model)
    assert "\n" not in str(caught.value)


def test_statistics_that_cannot_be_read_are_named(vq_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(vq_model, model)
    file = model / "vqvae" / "latents.json"
    for text, words in {"{": "not readable JSON", '{"mean": [0], "std": [1]}': "latents.json", "[]": "object was expected"}.items():
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            load(model)


def test_a_text_encoder_of_another_width_is_refused(kl_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(kl_model, model)
    shutil.rmtree(model / "text_encoder")
    (model / "manifest.json").unlink()
    tokenizer = TextEncoder.load(kl_model).tokenizer
    TextEncoder(small_clip_text(replace(TEXT, width=16), tokenizer), tokenizer).save(model)
    with pytest.raises(UserError, match="the text encoder is 16 wide, but the UNet expects 32"):
        load(model)
