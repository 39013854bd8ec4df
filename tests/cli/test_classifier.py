"""Guidance by a classifier of noisy latents: against closed forms of Gaussians, and from a cache to pictures by its commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.diffusion.batch import MomentBatch
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.families.latent_diffusion.classifier_guidance import Classifier, says, train
from ldm.families.latent_diffusion.engine import Canvas
from ldm.models.noisy_classifier import NoisyClassifierConfig
from ldm.sampling.recipe import Recipe, read_recipe

SHAPE = (2, 4, 4)


def test_words_are_found_whole() -> None:
    assert says(["A Red circle", "reddish, blue", "red-blue"], ("red", "blue")).tolist() == [[True, False], [False, True], [True, True]]


@pytest.mark.slow
def test_it_learns_the_closed_form_of_two_gaussians() -> None:
    """x0 ~ N(+-m, s^2): the log-odds of x = alpha x0 + sigma eps are 2 alpha m sum(x) / (alpha^2 s^2 + sigma^2)."""
    m, s, process = 0.2, 0.5, Process()

    def batch(index: list[int], position: list[int]) -> MomentBatch:
        sign = torch.tensor([1.0 if i % 2 else -1.0 for i in index]).view(-1, 1, 1, 1)
        return MomentBatch(
            mean=(sign * m).expand(-1, *SHAPE),
            std=torch.full((len(index), *SHAPE), s),
            size=torch.zeros(len(index), 6),
            caption=tuple("high" if i % 2 else "low" for i in index),
            position=torch.tensor(position),
        )

    config = NoisyClassifierConfig(words=("high", "low"), latent_channels=2, channels=(16,))
    network = train(batch, 1000, process, config, images=60_000, batch=200, rate=3e-3)
    found = batch(list(range(400)), list(range(400)))
    assert found.std is not None
    x0 = found.mean + found.std * Rng(9, range(400)).normal("x0", SHAPE)
    for share in (0.02, 0.2, 0.4, 0.6):
        t = torch.full((400,), float(process.grid(1000).t[int(1000 * (1 - share))]))
        alpha, sigma = (float(value[0]) for value in process.alpha_sigma(t))
        x = (alpha * x0 + sigma * Rng(9, range(400)).normal("eps", SHAPE)).requires_grad_()
        odds = 2 * alpha * m * x.sum((1, 2, 3)) / (alpha**2 * s**2 + sigma**2)
        told = network(x, t)
        with torch.no_grad():
            assert float((told[:, 0].sigmoid() - odds.sigmoid()).abs().mean()) < 0.06
            assert float((told.sigmoid().sum(1) - 1).abs().mean()) < 0.08
        (gradient,) = torch.autograd.grad(torch.nn.functional.logsigmoid(told[:, 0]).sum(), x)
        (exact,) = torch.autograd.grad(torch.nn.functional.logsigmoid(odds).sum(), x)
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0)
        assert cosine > 0.8, (share, float(cosine))


def test_each_picture_is_guided_by_its_own_words() -> None:
    """With linear log-odds the shift of x0 is scale sigma^2/alpha (1 - sigmoid(odds)) slope, for the prompt's words alone."""
    process = Process()
    network = NoisyClassifierConfig(words=("red", "blue"), latent_channels=2, channels=(4,)).build()
    sums = torch.tensor([0.3, -0.2], dtype=torch.float32)
    network.forward = lambda x, t: x.sum((1, 2, 3))[:, None] * sums  # type: ignore[method-assign]
    grid, x = process.grid(10), Rng(0, range(2)).normal("x", SHAPE)
    canvas = Canvas((0, 1), grid, x, Rng(0, [0, 1]))
    edit = Classifier(network, "", {}).edit(["a RED ring", "blue and red"], 3.0)
    assert edit.guide is not None
    for i in (3, 7):
        a, s = float(grid.alpha[i]), float(grid.sigma[i])
        found = edit.guide(lambda x, i: 0 * x, canvas)(x, i)
        slope = (1 - (x.sum((1, 2, 3))[:, None] * sums).sigmoid()) * sums  # (B,W)
        shift = torch.stack([slope[0, 0], slope[1].sum()]) * 3 * s**2 / a
        assert torch.allclose(found, shift.view(-1, 1, 1, 1).expand_as(x), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="'a ring' says none of the words that it knows: red, blue"):
        Classifier(network, "", {}).edit(["a ring"], 1.0)


def test_from_a_cache_to_pictures(kl_model: Path, vq_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(10):
        Image.linear_gradient("L").resize((40, 36)).rotate(20 * number).convert("RGB").save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a small ring" if number % 2 else "a circle")
    assert main(["data", "encode", str(tmp_path), "--model", str(kl_model), "--out", str(tmp_path / "cache"), "--resolution", "32"]) == 0
    file = tmp_path / "words.safetensors"
    learn = ["classifier", str(tmp_path / "cache"), "--images", "64", "--batch", "16", "--out", str(file)]
    assert main([*learn, "--model", str(kl_model), "--words", "small,ring", "--seed", "1"]) == 0
    other = file.read_bytes()
    assert main([*learn, "--model", str(kl_model), "--words", "small,ring"]) == 0
    assert file.read_bytes() != other
    assert main([*learn, "--model", str(kl_model), "--words", "purple"]) == 2
    assert "'purple' is in no caption" in capsys.readouterr().err
    assert main([*learn, "--model", str(vq_model), "--words", "small"]) == 2

    def draw(name: str, *words: str) -> np.ndarray:
        plain = ["sample", "a small ring", "--model", str(kl_model), "--steps", "3", "--out", str(tmp_path / name)]
        assert main([*plain, *words]) == 0
        return np.asarray(Image.open(next((tmp_path / name).glob("*.png"))))

    guide = ["--classifier", str(file), "--classifier-scale"]
    plain, none, strong = draw("plain"), draw("none", *guide, "0"), draw("strong", *guide, "50")
    assert np.array_equal(plain, none) and not np.array_equal(plain, strong)
    picture = next((tmp_path / "strong").glob("*.png"))
    recipe = read_recipe(picture)
    assert isinstance(recipe, Recipe) and recipe.classifier_scale == 50 and len(recipe.classifier) == 64
    assert np.array_equal(draw("again", "--from", str(picture), "--classifier", str(file)), strong)
    again = ["sample", "--from", str(picture), "--model", str(kl_model), "--out", str(tmp_path / "no")]
    for words, said in (
        ([*again], "give its file by --classifier"),
        ([*again, "--classifier-scale", "2"], "no classifier; give --classifier FILE"),
        ([*again, "a red square", "--classifier", str(file)], "says none of the words"),
        ([*again, "--classifier", str(picture)], "make it by ldm classifier"),
        (["sample", "ring", "--model", str(vq_model), "--out", str(tmp_path / "no"), "--classifier", str(file)], "another autoencoder"),
    ):
        capsys.readouterr()
        assert main(words) == 2 and said in capsys.readouterr().err
