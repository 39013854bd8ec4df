"""The U-Net's class embeddings against diffusers', in float64; taught to a base they change no bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Text
from ldm.models.denoiser import config_of
from ldm.models.dit import DiTConfig
from ldm.models.unet import UNetConfig

PLAIN = UNetConfig(channels=(16, 32), layers=1, attention=(False, True), heads=2, norm_groups=8, context_width=8)
KINDS = {"timestep": (0, torch.tensor([3.0, 400.0])), "table": (10, torch.tensor([3.0, 9.0])), "projection": (6, torch.rand(2, 6))}


@pytest.mark.parametrize("kind", KINDS)
def test_class_embeddings_are_those_of_diffusers(kind: str) -> None:
    width, vector = KINDS[kind]
    config = PLAIN.told_vector(kind, width)
    torch.manual_seed(0)
    ours = config.build().double().eval()
    said = config.to_diffusers()
    theirs: Any = diffusers.UNet2DConditionModel.from_config(said).double().eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t, words = torch.randn(2, 4, 8, 8).double(), torch.tensor([7.0, 900.0]), torch.randn(2, 5, 8).double()
    cond = Cond(text=Text(tokens=words, mask=torch.ones(2, 5, dtype=torch.bool)), vector=vector)
    labels = vector.long() if kind == "table" else vector
    with torch.no_grad():
        want = theirs(x, t, words, class_labels=labels.double() if kind == "projection" else labels).sample
        got = ours(x, t, cond)
        steps = ours.schedule(t, cond)
        assert torch.allclose(got, want, atol=1e-12)
        again = ours(x, t[1].expand(2), cond, None, steps[1])
        assert torch.allclose(again, ours(x, t[1].expand(2), cond), atol=1e-12)
    assert config_of(said) == config and ours.told_more
    with pytest.raises(ValueError, match=r"Cond\.vector is None"):
        ours(x, t, replace(cond, vector=None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_taught_a_vector_draws_the_same_bits(kind: str) -> None:
    width, vector = KINDS[kind]
    torch.manual_seed(0)
    base = PLAIN.build().eval()
    taught = base.taught_vector(PLAIN.told_vector(kind, width))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([7.0, 900.0])
    cond = Cond(text=Text(tokens=torch.randn(2, 5, 8), mask=torch.ones(2, 5, dtype=torch.bool)))
    with torch.no_grad():
        assert torch.equal(base(x, t, cond), taught(x, t, replace(cond, vector=vector)))


def test_mistakes_are_named_and_old_identities_stay() -> None:
    assert "class_embedding" not in PLAIN.identity() and PLAIN.to_diffusers()["class_embed_type"] is None
    with pytest.raises(UserError, match="class_width is 0 with class_embedding=table"):
        PLAIN.told_vector("table")
    with pytest.raises(UserError, match=r"network\.kind: got dit, which is told no vector"):
        DiTConfig().told_vector("timestep")
    with pytest.raises(UserError, match="class_embed_type is 'identity'"):
        config_of(PLAIN.to_diffusers() | {"class_embed_type": "identity"})
    with pytest.raises(UserError, match="projection_class_embeddings_input_dim is None"):
        config_of(PLAIN.to_diffusers() | {"class_embed_type": "projection"})
