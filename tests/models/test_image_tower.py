import pytest
import torch

from ldm.models.image_tower import ImageTowerConfig

SMALL = ImageTowerConfig(channels=(8, 16), embedding=12, grid=2)


def test_embeddings_have_unit_length_whatever_the_size_of_the_image():
    tower = SMALL.build()
    for height, width in ((32, 32), (20, 36)):
        embedding = tower(torch.randn(3, 3, height, width))
        assert embedding.shape == (3, 12)
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(3))


def test_features_are_the_maps_after_every_stage():
    maps = SMALL.build().features(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 16, 16), (2, 16, 8, 8)]


def test_places_are_not_averaged_away():
    torch.manual_seed(0)
    tower, image = SMALL.build(), torch.zeros(1, 3, 32, 32)
    image[..., :16, :16] = 1
    assert (tower(image) - tower(image.flip(2, 3))).abs().max() > 1e-3


def test_no_image_touches_the_embedding_of_another():
    torch.manual_seed(0)
    tower, image = SMALL.build(), torch.randn(3, 3, 16, 16, requires_grad=True)
    (slope,) = torch.autograd.grad(tower(image)[1].sum(), image)
    assert slope[1].abs().sum() > 0 and slope[[0, 2]].abs().sum() == 0


def test_embeddings_stay_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert SMALL.build()(torch.randn(1, 3, 16, 16)).dtype == torch.float32


def test_its_configuration_survives_saving():
    values = SMALL.to_dict()
    assert values.pop("_class_name") == "ImageTower"
    assert ImageTowerConfig(**{**values, "channels": tuple(values["channels"])}) == SMALL


@pytest.mark.parametrize("grid", [1, 4])
def test_the_head_reads_a_grid_of_places(grid):
    tower = ImageTowerConfig(channels=(8,), grid=grid).build()
    assert tower.head.in_features == 8 * grid**2
