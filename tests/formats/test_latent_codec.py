"""Frozen autoencoders with their latent statistics, in folders of ours and of diffusers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import KL, SIDE, VQ, Pictures

from ldm.config.errors import UserError
from ldm.families.autoencoder import measure
from ldm.formats.latent_codec import STATISTICS, LatentCodec, Statistics, load_codec, save_codec
from ldm.models.autoencoder import VQConfig

CPU = torch.device("cpu")


def network(config: Any) -> Any:
    torch.manual_seed(0)
    return config.build().eval()


@pytest.mark.parametrize("config", [KL, VQ, VQConfig(channels=(8, 16), layers=1, norm_groups=4, latent_channels=3, code_channels=5)])
def test_statistics_are_those_of_drawn_latents(config: Any) -> None:
    made, data = network(config), Pictures(70)  # more than one round of 64
    found = measure(made, data, SIDE, 0, CPU)
    image = data.load(range(70), range(70), SIDE, 0, False).image
    with torch.no_grad():
        if isinstance(config, VQConfig):
            latents = made.encode(image).double()
        else:
            mean, logvar = made.encode(image)
            latents = torch.cat([mean + (0.5 * logvar).exp() * torch.randn_like(mean) for _ in range(50)]).double()
    assert torch.allclose(torch.tensor(found.mean).double(), latents.mean((0, 2, 3)), atol=5e-3)
    assert torch.allclose(torch.tensor(found.std).double(), latents.std((0, 2, 3)), rtol=2e-2)
    assert (found.images, found.resolution) == (70, SIDE)
    codec = LatentCodec(made, found)
    assert len(found.mean) == codec.channels and codec.factor == 2 ** (len(config.channels) - 1)
    centre, spread = codec.moments(image)
    assert (spread is None) == isinstance(config, VQConfig) and centre.shape[1] == codec.channels
    assert codec.reconstruct(image).shape == image.shape


def test_no_more_images_are_measured_than_asked_for() -> None:
    class Counted(Pictures):
        def __init__(self) -> None:
            super().__init__(200)
            self.asked: list[int] = []

        def load(self, index: Sequence[int], *words: Any) -> Any:
            self.asked += index
            return super().load(index, *words)

    data = Counted()
    assert measure(network(VQ), data, SIDE, 0, CPU, images=70).images == 70
    assert data.asked == list(range(70))


@pytest.mark.parametrize("config", [KL, VQ])
def test_a_codec_comes_back_from_its_folder(config: Any, tmp_path: Path) -> None:
    made = network(config)
    statistics = measure(made, Pictures(), SIDE, 0, CPU)
    save_codec(tmp_path / "vae", made, statistics)
    codec = load_codec(tmp_path / "vae")
    assert codec.statistics == statistics and len(codec.hash) == 64
    image = Pictures().load([0, 1], [0, 1], SIDE, 0, False).image
    assert torch.equal(codec.reconstruct(image), LatentCodec(made, statistics).reconstruct(image))
    assert not any(p.requires_grad for p in codec.parameters())
    assert "mean" not in codec.state_dict()
    file = tmp_path / "vae" / STATISTICS
    file.write_text(json.dumps({**json.loads(file.read_text()), "images": 1}))
    assert load_codec(tmp_path / "vae").hash != codec.hash  # other statistics are another autoencoder


def test_a_scaling_factor_stands_for_statistics(tmp_path: Path) -> None:
    made = network(KL)
    save_codec(tmp_path / "vae", made, Statistics((0.0,) * 4, (1.0,) * 4, 1, 1))
    (tmp_path / "vae" / STATISTICS).unlink()
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5, "shift_factor": 0.25}))
    codec = load_codec(tmp_path / "vae")
    image = Pictures().load([0], [0], SIDE, 0, False).image
    mean, logvar = made.encode(image)
    centre, spread = codec.moments(image)
    assert spread is not None and torch.allclose(centre, (mean - 0.25) * 0.5, atol=1e-6)
    assert torch.allclose(spread, (0.5 * logvar).exp() * 0.5, atol=1e-6)
    assert torch.allclose(codec.decode(centre), made.decode(mean), atol=1e-5)


@pytest.mark.parametrize(
    "values", [{"mean": [0, 0], "std": [1, 1]}, {"std": [1, 1, 1, 0]}, {"mean": [0, 0, 0, float("nan")]}, {"std": "none"}, {"images": None}]
)
def test_statistics_that_make_no_sense_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    save_codec(tmp_path / "vae", network(KL), Statistics((0.0,) * 4, (1.0,) * 4, 1, 1))
    file = tmp_path / "vae" / STATISTICS
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with pytest.raises(UserError, match=r"latents\.json: "):
        load_codec(tmp_path / "vae")


@pytest.mark.parametrize("config", [KL, VQ], ids=["kl", "vq"])
@torch.no_grad()
def test_large_pictures_go_through_one_at_a_time_and_in_stripes(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(config)
    codec = LatentCodec(made, measure(made, Pictures(), SIDE, 0, CPU))
    image = Pictures().load(range(3), range(3), 64, 0, False).image
    calls: list[tuple[int, bool]] = []
    plain = made.decode
    monkeypatch.setattr(made, "decode", lambda z, way=None: calls.append((len(z), way is not None)) or plain(z, way))
    found = {}
    for tile in (0, 512, 64, 63):
        codec.tile = tile
        found[tile] = [*codec.moments(image)]
        found[tile].append(codec.decode(found[tile][0]))
    assert calls == [(3, False), (3, False), *[(1, False)] * 3, *[(1, True)] * 3]
    for tile in (512, 64, 63):
        for a, b in zip(found[tile], found[0], strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_picture_that_learns_is_decoded_at_once() -> None:
    codec = LatentCodec(network(KL), Statistics((0.0,) * 4, (1.0,) * 4, 0, 0))
    codec.tile = 16
    latent = torch.randn(1, 4, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(codec.decode(latent).square().sum(), latent)
    assert gradient.isfinite().all() and gradient.any()
