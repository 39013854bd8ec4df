"""`--clip-skip N`, as web UIs count: diffusers' own pipeline is the oracle, whose number is one less."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.draws import Wanted
from ldm.sampling.recipe import Recipe, read_recipe
from ldm.text.encoder import TextEncoder


def test_states_are_those_of_diffusers(kl_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(kl_model, safety_checker=None)
    theirs_of = pipeline.text_encoder
    if not hasattr(theirs_of, "text_model"):  # where newer transformers have it flat, which diffusers does not know yet
        object.__setattr__(theirs_of, "text_model", SimpleNamespace(final_layer_norm=theirs_of.final_layer_norm))
    encoder = TextEncoder.load(kl_model)
    for ours, theirs in ((1, None), (2, 1), (1, 0)):
        wanted, _ = pipeline.encode_prompt("a small red circle", "cpu", 1, False, clip_skip=theirs)
        assert torch.allclose(encoder.encode(["a small red circle"], ours).tokens, wanted, atol=1e-6)
    assert not torch.equal(encoder.encode(["a"], 1).tokens, encoder.encode(["a"], 2).tokens)  # remembered apart


def test_it_is_in_the_recipe_and_followed(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "a small (red:1.2) circle", "--model", str(kl_model), "--steps", "2", "--out"]
    assert main([*words, str(tmp_path / "a"), "--clip-skip", "2"]) == 0
    assert main([*words, str(tmp_path / "b")]) == 0
    assert main([*words[:1], *words[2:], str(tmp_path / "c"), "--from", str(tmp_path / "a" / "00000_seed0.png")]) == 0
    a, b, c = (np.asarray(Image.open(tmp_path / name / "00000_seed0.png")) for name in "abc")
    assert (a == c).all() and (a != b).any()
    made = read_recipe(tmp_path / "a" / "00000_seed0.png")
    assert isinstance(made, Recipe) and made.clip_skip == 2 and "Clip skip: 2" in made.parameters()
    assert main([*words, str(tmp_path / "d"), "--clip-skip", "3"]) == 2
    assert "clip_skip: got 3, but this model's text encoder has 2 layers" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "d"), "--clip-skip", "0"]) == 2
    assert json.loads(Image.open(tmp_path / "b" / "00000_seed0.png").text["ldm"])["clip_skip"] == 1  # type: ignore[attr-defined]


def test_from_python(kl_model: Path) -> None:
    import ldm

    model = ldm.load(kl_model)
    one, two = (model.sample(["a red circle"], settings=Wanted(steps=1, clip_skip=skip)) for skip in (1, 2))
    assert not torch.equal(one, two)
    with pytest.raises(UserError, match="clip_skip"):
        model.sample(["a"], settings=Wanted(clip_skip=9))
