"""The small CLIP: its loss by hand, what it learns, and that its parts serve the next stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import CAPTIONS, SIDE, TEXT, Pictures
from safetensors.torch import load_file, save_file

from ldm.config.errors import UserError
from ldm.diffusion.rng import Rng
from ldm.families.clip import Clip, ClipFamily
from ldm.families.family import Context, Product
from ldm.families.perceptual_loss import PerceptualClip
from ldm.families.pretrained import PretrainedText
from ldm.formats.part import content_hash
from ldm.models.image_tower import ImageTowerConfig
from ldm.text.encoder import TextEncoder
from ldm.text.own_clip import OwnClip
from ldm.text.pretrained import load_pretrained

DATA = Pictures()
TOWER = ImageTowerConfig(channels=(8, 16), embedding=24, grid=2)
CONFIG = Clip(text=TEXT, tower=TOWER, vocabulary=560)


def context(**fields: Any) -> Context:
    return Context(**{"data": DATA, "val": DATA, "resolution": SIDE, "seed": 0, "total_images": 100, **fields})


@pytest.fixture
def family() -> ClipFamily:
    torch.manual_seed(0)
    return CONFIG.build(context())


def batch(count: int) -> Any:
    return DATA.load(range(count), range(count), SIDE, 0, False)


def test_the_loss_is_the_symmetric_cross_entropy(family: ClipFamily) -> None:
    data = batch(6)
    terms, gauges = family(data, Rng(0, data.position))
    text = TextEncoder(family.text_model, family.tokenizer)
    words = family.projection(text.forward_train(data.caption, torch.device("cpu")))
    pictures = family.tower(data.image)
    cosine = torch.nn.functional.cosine_similarity(pictures[:, None], words[None], dim=-1)
    logits = cosine / 0.07
    expected = sum(torch.logsumexp(logits[i], 0) + torch.logsumexp(logits[:, i], 0) - 2 * logits[i, i] for i in range(6)) / 12
    assert torch.isclose(terms["contrastive"], expected, rtol=1e-5)
    assert gauges["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    assert 0 <= float(gauges["match_in_batch"]) <= 1 and not gauges["logit_scale"].requires_grad


@pytest.mark.slow
def test_two_processes_contrast_all_pairs(family: ClipFamily, tmp_path: Path) -> None:
    worker = Path(__file__).with_name("clip_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, worker, str(rank), "2", tmp_path], env=environment) for rank in range(2)]
    assert [process.wait(timeout=280) for process in started] == [0, 0]
    shared = load_file(tmp_path / "found.safetensors")
    data = batch(6)
    family(data, Rng(0, data.position))[0]["contrastive"].backward()
    for name, p in family.named_parameters():
        assert p.grad is not None and torch.allclose(shared[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_every_parameter_learns(family: ClipFamily) -> None:
    data = batch(4)
    terms, _ = family(data, Rng(0, data.position))
    terms["contrastive"].backward()
    assert all(p.grad is not None for p in family.parameters())
    assert family.logit_scale.grad is not None and float(family.logit_scale.grad.abs()) > 0


def test_the_temperature_is_bounded(family: ClipFamily) -> None:
    with torch.no_grad():
        family.logit_scale.fill_(9.0)
    data = batch(3)
    _, gauges = family(data, Rng(0, data.position))
    assert float(gauges["logit_scale"]) == pytest.approx(100)


def test_it_learns_to_retrieve(family: ClipFamily) -> None:
    data = batch(12)
    before = family.finish(context())
    optimiser = torch.optim.AdamW(family.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        family(data, Rng(0, data.position))[0]["contrastive"].backward()
        optimiser.step()
    found = family.finish(context())
    assert found["retrieval_of"] == 12 and before["retrieval_at_1"] < 0.6 < 0.9 <= found["retrieval_at_1"]


def test_equal_captions_are_equally_right(family: ClipFamily) -> None:
    class Twins(Pictures):
        def captions(self, index: Any, position: Any, seed: int) -> list[str]:
            return [CAPTIONS[0]] * len(index)

    assert family.finish(context(val=Twins(5)))["retrieval_at_1"] == 1.0


def test_the_vocabulary_comes_from_the_captions(family: ClipFamily) -> None:
    assert len(family.tokenizer("a small red circle")["input_ids"]) == 6
    assert len(family.tokenizer("quixotic")["input_ids"]) > 4


def test_the_saved_towers_serve_the_next_stages(family: ClipFamily, tmp_path: Path) -> None:
    family.eval().save(tmp_path)
    text = TextEncoder.load(tmp_path)
    pooled = TextEncoder(family.text_model, family.tokenizer).encode(["a red ring"]).pooled
    again = text.encode(["a red ring"]).pooled
    assert pooled is not None and again is not None and torch.equal(pooled, again)
    assert not any(p.requires_grad for p in text.model.parameters())

    distance = PerceptualClip(weight=2.0).build(context(products={"text": Product(tmp_path, "")}))
    a, b = batch(2).image, batch(4).image[2:]
    plain = PerceptualClip().build(context(products={"text": Product(tmp_path, "")}))
    assert distance(a, a).abs().max() == 0 and bool((distance(a, b) > 0).all()) and distance(a, b).shape == (2,)
    assert torch.allclose(distance(a, b), 2 * plain(a, b))
    maps = zip(distance.distance.tower.features(a), family.tower.features(a), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in maps)
    assert not any(p.requires_grad for p in distance.parameters())


def test_the_whole_clip_comes_back(family: ClipFamily, tmp_path: Path) -> None:
    with torch.no_grad():
        family.logit_scale.fill_(9.0)  # beyond its bound
    family.eval().save(tmp_path)
    clip = OwnClip.load(tmp_path / "clip")
    data = batch(5)
    with torch.no_grad():
        text = TextEncoder(family.text_model, family.tokenizer)
        words = torch.nn.functional.normalize(family.projection(text.encode(data.caption).pooled), dim=-1)
        cosine = family.tower(data.image) @ words.T
    assert torch.allclose(clip.logits(data.image, data.caption), 100 * cosine, atol=1e-4)
    assert torch.allclose(clip.similarity(data.image, data.caption), cosine.diagonal(), atol=1e-6)
    both = [*data.caption, *data.caption[::-1]]
    scores, sides = clip.score(torch.cat([data.image] * 2), both), torch.cat([cosine.diagonal(), cosine.flip(1).diagonal()])
    assert torch.allclose(scores, (100 * sides).clamp(min=0), atol=1e-4) and bool((scores >= 0).all())


def test_transformers_opens_the_text_side(family: ClipFamily, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    family.eval().save(tmp_path)
    clip = OwnClip.load(tmp_path / "clip")
    model, said = CLIPTextModelWithProjection.from_pretrained(tmp_path / "clip", output_loading_info=True)
    assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = CLIPTokenizer.from_pretrained(tmp_path / "clip")(CAPTIONS, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, clip.text.tokens(CAPTIONS)[0])
    clip.text.model.double(), clip.projection.double()
    with torch.no_grad():
        theirs = model.eval().double()(ids).text_embeds  # (N,E)
        assert (clip.projection(clip.text.encode(CAPTIONS).pooled) - theirs).abs().max() < 1e-6
        unit = theirs / theirs.norm(dim=-1, keepdim=True)
        assert (clip.embed_captions(CAPTIONS) - unit).abs().max() < 1e-6
        image = batch(12).image
        hessel = 100 * torch.nn.functional.cosine_similarity(clip.tower(image).double(), unit[:12]).clamp(min=0)
    assert (clip.score(image, CAPTIONS[:12]) - hessel).abs().max() < 1e-5

    _, said = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    alone = load_pretrained(str(tmp_path / "clip"), 77, 0)  # as another model's text encoder
    assert torch.equal(alone.encode(CAPTIONS[:3]).tokens, TextEncoder.load(tmp_path).encode(CAPTIONS[:3]).tokens)


def test_pictures_of_any_size_are_seen_as_in_training(family: ClipFamily, tmp_path: Path) -> None:
    family.eval().save(tmp_path)
    clip = OwnClip.load(tmp_path / "clip")
    image = batch(3).image
    wide = torch.cat([torch.full_like(image, -1)[..., :5], image, torch.ones_like(image)[..., :5]], dim=3)
    assert torch.equal(clip.embed_images(wide), clip.embed_images(image))
    large = torch.nn.functional.interpolate(image, scale_factor=2.0, mode="bilinear")
    assert torch.nn.functional.cosine_similarity(clip.embed_images(large), clip.embed_images(image)).min() > 0.999


@pytest.mark.parametrize(
    ("file", "name"), [("", "text_projection.weight"), ("image_tower", "logit_scale"), ("image_tower", "stages.0.0.bias")]
)
def test_a_clip_with_a_weight_missing_is_refused(family: ClipFamily, tmp_path: Path, file: str, name: str) -> None:
    family.eval().save(tmp_path)
    weights = next((tmp_path / "clip" / file).glob("*.safetensors"))
    save_file({key: value for key, value in load_file(weights).items() if key != name}, weights)
    with pytest.raises(UserError) as caught:
        OwnClip.load(tmp_path / "clip")
    assert str(weights.parent) in str(caught.value) and name.removeprefix("text_projection.") in str(caught.value)


def test_a_run_that_begins_with_a_model_takes_its_clip_along(own_clip_model: Path, tmp_path: Path) -> None:
    given = PretrainedText(path=str(own_clip_model))
    given.adopt(given.find(given.path, lambda said: None), tmp_path / "text")
    assert content_hash(tmp_path / "text" / "clip") == content_hash(own_clip_model / "clip")
