"""Our vision transformer beside transformers' CLIPVisionModelWithProjection: embeddings, maps, gradients, and what it begins with."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.config.errors import UserError
from ldm.models.vision_tower import AS_THEY_ARE, MEAN, STD, Pixels, VisionShape, VisionTower, VisionTowerConfig

SHAPE = VisionShape(
    hidden_size=24, intermediate_size=40, projection_dim=10, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
)
SMALL = VisionTowerConfig(patch=4, width=16, layers=2, heads=2)


def pair(**more: object) -> tuple[VisionTower, CLIPVisionModelWithProjection]:
    torch.manual_seed(0)
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**SHAPE.to_dict(), **more})).double().eval()
    ours = VisionShape.from_dict(theirs.config.to_dict(), Pixels(), "config.json").build().double()
    ours.load_state_dict({name: value for name, value in theirs.state_dict().items() if "position_ids" not in name})
    return ours, theirs


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)).double() * 2 - 1


def normalised(image: torch.Tensor) -> torch.Tensor:
    """As CLIPImageProcessor does it with the published mean and deviation."""
    mean, std = (torch.tensor(one, dtype=torch.float64).view(3, 1, 1) for one in (MEAN, STD))
    return ((image + 1) / 2 - mean) / std


@pytest.mark.parametrize("more", [{}, {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-3, "image_size": 18}])
def test_embeddings_maps_and_gradients_are_those_of_transformers(more: dict[str, object]) -> None:
    ours, theirs = pair(**more)
    image = picture(3, 3, ours.config.image_size, ours.config.image_size)
    found, wanted = ours(image), theirs(normalised(image), output_hidden_states=True)
    unit = torch.nn.functional.normalize(wanted.image_embeds, dim=-1)
    torch.testing.assert_close(found, unit, rtol=0, atol=1e-12)
    for own, states in zip(ours.features(image), wanted.hidden_states, strict=False):
        torch.testing.assert_close(own.flatten(2).transpose(1, 2), states[:, 1:], rtol=0, atol=1e-12)
    (found * torch.arange(10)).sum().backward()
    (unit * torch.arange(10)).sum().backward()
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name).grad, value.grad, rtol=1e-10, atol=1e-10)


def test_larger_pictures_have_more_patches_and_smaller_ones_are_enlarged() -> None:
    ours, theirs = pair()
    image = picture(2, 3, 24, 20)
    with torch.no_grad():
        wanted = theirs.vision_model(normalised(image), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        for own, states in zip(ours.features(image), wanted, strict=False):
            assert own.shape[-2:] == (6, 5)
            torch.testing.assert_close(own.flatten(2).transpose(1, 2), states[:, 1:], rtol=0, atol=1e-12)
        small = picture(2, 3, 8, 8)
        large = torch.nn.functional.interpolate(small, (16, 16), mode="bicubic", antialias=True)
        assert torch.equal(ours(small), ours(large)) and ours.config.places(8) == 16 and ours.config.places(24) == 36
        assert ours.features(picture(1, 3, 11, 33))[0].shape[-2:] == (4, 12)


def test_it_begins_as_transformers_does_but_for_a_last_layer_that_keeps_lengths() -> None:
    shape = VisionTowerConfig(patch=8, width=128, layers=4, heads=4).shape(32)
    torch.manual_seed(0)
    ours, theirs = shape.build().begin(), CLIPVisionModelWithProjection(CLIPVisionConfig(**shape.to_dict()))
    for name, value in theirs.named_parameters():
        own = ours.get_parameter(name)
        assert own.shape == value.shape
        if not name.startswith(("visual_projection", "vision_model.post_layernorm")):
            assert own.requires_grad and float(own.detach().std()) == pytest.approx(float(value.detach().std()), rel=0.35, abs=1e-6), name
    assert ours.keeps_length and not pair()[0].keeps_length
    theirs.load_state_dict(ours.state_dict(), strict=False)
    length = theirs(torch.randn(4, 3, 32, 32)).image_embeds.norm(dim=1)
    torch.testing.assert_close(length, torch.full((4,), 128**0.5), rtol=1e-4, atol=0)
    learns = [name for name, value in ours.named_parameters() if not value.requires_grad]
    assert learns == ["vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias", "visual_projection.weight"]


def test_pictures_are_seen_as_they_are_and_each_alone() -> None:
    torch.manual_seed(0)
    tower, image = SMALL.shape(16).build().begin(), torch.randn(3, 3, 16, 16, requires_grad=True)
    assert tower.config.pixels == AS_THEY_ARE and tower._fitted(image) is image
    (slope,) = torch.autograd.grad(tower(image)[1].square().sum() + tower(image)[1, 0], image)
    assert slope[1].abs().sum() > 0 and slope[[0, 2]].abs().sum() == 0
    with torch.autocast("cpu", torch.bfloat16):
        last, embedding = tower.seen(image)
    assert embedding.dtype == torch.float32 and last.shape == (3, 16, 4, 4)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match="heads 3 does not divide width 16"):
        VisionTowerConfig(width=16, heads=3)
    with pytest.raises(UserError, match="image_size 8 is less than one patch of 16"):
        VisionShape(image_size=8, patch_size=16)
    with pytest.raises(UserError, match="4096 is more than 1024 patches of 1 px"):
        VisionShape(image_size=4096, patch_size=1)
