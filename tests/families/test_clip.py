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
from safetensors.torch import load_file

from ldm.diffusion.rng import Rng
from ldm.families.clip import Clip, ClipFamily
from ldm.families.family import Context, Product
from ldm.families.perceptual_loss import PerceptualClip
from ldm.models.image_tower import ImageTowerConfig
from ldm.text.encoder import TextEncoder

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
