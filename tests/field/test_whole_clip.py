"""A run's own CLIP with a vision transformer: one folder that transformers opens, and everything that reads a tower reads it too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import CAPTIONS, KL, SIDE, TEXT, Pictures, autoencoder_product, diffusion_product
from painters import Painter
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from ldm.config.errors import UserError
from ldm.config.schema import build, load, plain
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL as Autoencoder
from ldm.families.clip import Clip, ClipFamily
from ldm.families.family import Context, Product
from ldm.families.perceptual_loss import PerceptualClip
from ldm.families.tokens.family import Tokens
from ldm.formats.assembly import assemble
from ldm.metrics.bench import Bench
from ldm.metrics.clip_score import ClipScore
from ldm.metrics.extractors import OwnFeatures
from ldm.metrics.judges import ClipJudge, OwnJudge
from ldm.models.embeddings import COORDINATES
from ldm.models.token_transformer import TokenTransformerConfig
from ldm.models.vision_tower import VisionTowerConfig
from ldm.runs.run import Run
from ldm.text.own_clip import OwnClip
from ldm.text.pretrained import load_pretrained

DATA = Pictures()
TOWER = VisionTowerConfig(patch=8, width=24, layers=3, heads=2)
CONFIG = Clip(text=TEXT, tower=TOWER, vocabulary=560)
ROWS = list(range(6))


def context(**fields: Any) -> Context:
    return Context(**{"data": DATA, "val": DATA, "resolution": SIDE, "seed": 0, "total_images": 100, **fields})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the products it was made of; the CLIP has learned for a few steps."""
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    family = CONFIG.build(context())
    optimiser = torch.optim.AdamW([p for p in family.parameters() if p.requires_grad], lr=3e-3)
    data, losses = DATA.load(ROWS, ROWS, SIDE, 0, False), []
    for _ in range(6):
        optimiser.zero_grad()
        terms, _ = family(data, Rng(0, data.position))
        terms["contrastive"].backward()
        optimiser.step()
        losses.append(terms["contrastive"].item())
    assert losses[-1] < 0.8 * losses[0] and isinstance(family, ClipFamily)
    counted = CONFIG.footprint(type("Stage", (), {})(), SIDE, {}, print).learned["image tower"]  # type: ignore[arg-type]
    learn = [*family.tower.parameters(), family.projection.weight, family.logit_scale]
    assert counted == sum(p.numel() for p in learn if p.requires_grad)
    family.eval().save(root / "text")
    text, autoencoder = root / "text", autoencoder_product(root / "autoencoder")
    assemble(text, autoencoder, diffusion_product(root / "diffusion", text, autoencoder, Process()), root / "model", {"name": "Tiny"})
    return root


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "model" / "clip"


@pytest.fixture(scope="module")
def theirs(folder: Path) -> CLIPModel:
    model, said = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values())  # nothing is missing, left over or of another shape
    return model.eval()


def ids(folder: Path) -> torch.Tensor:
    return CLIPTokenizer.from_pretrained(folder)(list(CAPTIONS), padding="max_length", return_tensors="pt").input_ids


def pictures() -> torch.Tensor:
    """(6,3,H,W) in [-1,1], as 8-bit files hold them."""
    return (DATA.load(ROWS, ROWS, SIDE, 0, False).image * 127.5 + 127.5).round() / 127.5 - 1


@pytest.mark.parametrize(("kind", "near"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_transformers_gives_the_same_embeddings_and_score(folder: Path, theirs: CLIPModel, kind: torch.dtype, near: float) -> None:
    clip, image = OwnClip.load(folder), pictures().to(kind)
    for network in (theirs, *clip.networks()):
        network.to(kind)
    clip.logit_scale = clip.logit_scale.to(kind)
    with torch.no_grad():
        found = theirs(input_ids=ids(folder), pixel_values=image)
        torch.testing.assert_close(clip.embed_images(image), found.image_embeds, rtol=0, atol=near)
        torch.testing.assert_close(clip.embed_captions(CAPTIONS), found.text_embeds, rtol=0, atol=near)
        torch.testing.assert_close(clip.logits(image, CAPTIONS), found.logits_per_image, rtol=0, atol=100 * near)
        cosine = found.logits_per_image[:, :6].diagonal() / theirs.logit_scale.exp()
        torch.testing.assert_close(clip.score(image, CAPTIONS[:6]), (100 * cosine).clamp(min=0), rtol=0, atol=100 * near)
        embeds = theirs.get_image_features(image).pooler_output
    torch.testing.assert_close(clip.embedded(image), embeds, rtol=1e-4, atol=1e-4)  # as long as decoders are told it
    theirs.float()


def test_its_sides_open_alone_and_its_processor_prepares_pictures_as_here(folder: Path, theirs: CLIPModel) -> None:
    text, said = CLIPTextModelWithProjection.from_pretrained(folder, output_loading_info=True)
    vision, seen = CLIPVisionModelWithProjection.from_pretrained(folder, output_loading_info=True)
    assert not (said["missing_keys"] or said["mismatched_keys"] or seen["missing_keys"] or seen["mismatched_keys"])
    processor, clip = CLIPImageProcessor.from_pretrained(folder), OwnClip.load(folder)
    eight = [picture.permute(1, 2, 0).numpy() for picture in (pictures() * 127.5 + 127.5).round().byte()]
    values = processor(images=eight, return_tensors="pt").pixel_values
    torch.testing.assert_close(values, pictures(), rtol=0, atol=1e-6)
    normalize = torch.nn.functional.normalize
    with torch.no_grad():
        torch.testing.assert_close(normalize(vision(values).image_embeds, dim=-1), clip.embed_images(pictures()), rtol=0, atol=1e-5)
        embeds = normalize(text(ids(folder)).text_embeds, dim=-1)
        torch.testing.assert_close(embeds, clip.embed_captions(CAPTIONS), rtol=0, atol=1e-5)
        large = processor(images=[one.repeat(2, 0).repeat(3, 1) for one in eight], return_tensors="pt").pixel_values
        ours = clip.embed_images(pictures().repeat_interleave(2, 2).repeat_interleave(3, 3))
        theirs_large = normalize(vision(large).image_embeds, dim=-1)
    assert large.shape == (6, 3, SIDE, SIDE) and torch.cosine_similarity(theirs_large, ours).min() > 0.999  # Pillow rounds to 8 bits


def test_judges_and_features_agree(root: Path, folder: Path, theirs: CLIPModel) -> None:
    eight = (pictures() * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1)
    own, any_clip = OwnJudge.load(root / "model"), ClipJudge.load(folder)
    assert own.scores(eight, CAPTIONS[:6]) == pytest.approx(any_clip.scores(eight, CAPTIONS[:6]), abs=1e-5)
    for judge in (own, any_clip):
        table = judge.similarities(eight, CAPTIONS[:6])
        assert table.diagonal().tolist() == pytest.approx(judge.scores(eight, CAPTIONS[:6]), abs=1e-5)
    with torch.no_grad():
        logits = theirs(input_ids=ids(folder), pixel_values=pictures()).logits_per_image
    torch.testing.assert_close(any_clip.similarities(eight, CAPTIONS), logits / theirs.logit_scale.exp().item(), rtol=0, atol=1e-5)
    features = OwnFeatures(path=str(root / "model")).load(torch.device("cpu")).features(pictures())
    torch.testing.assert_close(torch.from_numpy(features).float(), own.clip.embed_images(pictures()), rtol=0, atol=1e-6)


def test_a_clip_score_tells_how_many_captions_are_found_again(root: Path, folder: Path) -> None:
    data = ScenesSource(tier="one", val=12).build("val")
    bench = Bench(Painter("one", count=24), data, SIDE, 0, torch.device("cpu"), None, lambda *line: None)
    own, any_clip = (ClipScore(path=path, images=12).run(bench) for path in (root / "model", folder))
    assert own["protocol"]["clip"] == "the own CLIP of model" and any_clip["protocol"]["clip"] == "clip"
    assert {name: own[name] for name in ("score", "real")} == pytest.approx({name: any_clip[name] for name in ("score", "real")}, abs=0.01)
    real = bench.real(12)
    told = list(dict.fromkeys(real.caption))
    likest = OwnClip.load(folder).logits(((real.image + 1) * 127.5).round() / 127.5 - 1, told).argmax(1)
    assert own["retrieval_real"] == pytest.approx(sum(told[k] == c for k, c in zip(likest, real.caption, strict=True)) / 12, abs=1e-4)
    assert set(ClipScore(path=folder).names(True)) <= set(own) and own["protocol"]["captions"] == len(told)


def test_the_pipelines_own_text_encoder_is_plain(root: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    found = StableDiffusionPipeline.from_pretrained(root / "model", safety_checker=None)
    assert type(found.text_encoder) is CLIPTextModel
    assert not [line for line in caplog.records if line.name.startswith(("transformers", "diffusers"))]
    _, said = CLIPTextModel.from_pretrained(root / "model" / "text_encoder", output_loading_info=True)
    assert not any(said.values())
    alone, beside = load_pretrained(str(folder)), load_pretrained(str(root / "model"))  # as another model's text encoder
    assert torch.equal(alone.encode(CAPTIONS[:3]).tokens, beside.encode(CAPTIONS[:3]).tokens)


def test_a_perceptual_loss_reads_its_maps(root: Path) -> None:
    product = Product(root / "text", "")
    distance: Any = PerceptualClip(weight=2.0).build(context(products={"text": product}))
    a, b = pictures()[:2].requires_grad_(), pictures()[2:4]
    assert distance(a, a).abs().max() == 0 and bool((distance(a, b) > 0).all())
    (slope,) = torch.autograd.grad(distance(a, b)[0], a)
    assert bool(slope[0].abs().sum() > 0) and not slope[1].any()
    config = Autoencoder(network=KL, perceptual=PerceptualClip())
    stage: Any = type("Stage", (), {"checkpointing": None})()
    counted = config.footprint(stage, SIDE, {"text": CONFIG}, print)
    assert counted.frozen["perceptual"] == sum(p.numel() for p in distance.parameters())


def test_a_captioner_attends_to_its_places(root: Path) -> None:
    network = TokenTransformerConfig(width=16, layers=1, heads=2, size_channels=4)
    config = Tokens(reads="image", writes="caption", order="causal", network=network)
    family: Any = config.build(context(products={"text": Product(root / "text", "")}))
    stage: Any = type("Stage", (), {"latents": "", "also": ()})()
    counted = config.footprint(stage, SIDE, {"text": CONFIG}, lambda said: None)
    assert counted.frozen["image tower"] == sum(p.numel() for p in family._tower[0].parameters())
    states, pooled = family._seen([""] * 6, DATA.load(ROWS, ROWS, SIDE, 0, False))
    assert states.shape == (6, (SIDE // 8) ** 2, 24 + COORDINATES) and pooled.shape == (6, 24)
    terms, _ = family(DATA.load(ROWS, ROWS, SIDE, 0, False), Rng(0, ROWS))
    assert torch.isfinite(terms["tokens"])


def test_the_convolutional_tower_stays_the_usual_one() -> None:
    assert "kind" not in Clip().identity()["tower"] and CONFIG.identity()["tower"]["kind"] == "vit"  # finished stages stay finished
    said = build({"tower": {"kind": "conv", "channels": [8, 16]}}, Clip, "x")
    assert build({"tower": {"channels": [8, 16]}}, Clip, "x") == said
    assert build(plain(CONFIG), Clip, "x") == CONFIG
    assert load(Path("configs/dalle2.yaml"), ["models.text.tower=vit"], Run).models["text"] == replace(
        load(Path("configs/dalle2.yaml"), [], Run).models["text"], tower=VisionTowerConfig()
    )
    values = {
        "data": {"kind": "scenes", "tier": "one"},
        "models": {"text": {"kind": "clip", "tower": {"kind": "vit", "patch": 5}}},
        "stages": {"text": {"kind": "train", "model": "text", "resolution": 32, "images": 8}},
    }
    with pytest.raises(UserError, match=r"stages.text.resolution: got 32; text needs a multiple of 5"):
        build(values, Run, "run.yaml")
