"""The checker: reads what was drawn, at every size, and believes neither noise nor blobs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ldm.data.scenes.checker import read, reads_back
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.spec import PAIR_DEV, PAIR_TEST, SIDE, TIERS, Specs, draw_specs


def pictures(tier: str, n: int, pixels: int = 0, split: str = "train") -> tuple[Specs, np.ndarray]:
    specs = draw_specs(tier, split, 0, np.arange(n))
    return specs, to_bytes(render(specs, pixels or TIERS[tier].pixels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tier", "pixels", "least"),
    [
        ("one", 32, 1.0),
        ("one", 64, 1.0),
        ("T0", 32, 0.985),
        ("T0", 64, 0.99),
        ("T1", 32, 0.97),
        ("T1", 64, 0.98),
        ("T2", 64, 0.96),
        ("T2", 128, 0.96),
        ("T2", 96, 0.96),
        ("T3", 128, 0.95),
        ("T3", 256, 0.93),
    ],
)
def test_nearly_all_scenes_are_read_back_perfectly_before_any_certification(tier, pixels, least):
    specs, images = pictures(tier, 40 if pixels > 128 else 120, pixels)
    assert reads_back(specs, images).mean() >= least


def test_held_out_pairs_are_read_as_well_as_seen_ones():
    specs, images = pictures("T0", 240, split="held-out")
    assert reads_back(specs, images).mean() >= 0.985
    found = read(images)
    pairs = set(zip(found.colour.tolist(), found.shape.tolist(), strict=True))
    assert pairs >= set(PAIR_DEV + PAIR_TEST)


def test_places_and_sizes_are_exact_to_a_third_of_a_pixel():
    specs, images = pictures("T0", 120)
    found = read(images)
    assert np.array_equal(found.image, np.arange(120)) and found.valid.all()
    assert np.abs(found.x - specs.x[:, 0]).max() < 0.7 / 32 and np.abs(found.y - specs.y[:, 0]).max() < 0.7 / 32
    assert np.sqrt(np.mean((found.x - specs.x[:, 0]) ** 2)) < 0.33 / 32
    assert np.abs(found.side / specs.side[:, 0] - 1).mean() < 0.05
    assert (found.iou > 0.72).all()


def test_reading_does_not_depend_on_the_type_of_the_numbers_or_on_neighbours():
    _, images = pictures("T2", 24)
    whole = read(images)
    as_floats = read(images.astype(np.float64) / 255)
    for name in ("image", "colour", "shape", "size", "cell", "valid", "tone", "texture"):
        assert np.array_equal(getattr(whole, name), getattr(as_floats, name))
    alone = read(images[7:8])
    at = whole.objects(7)
    assert np.array_equal(alone.shape, whole.shape[at]) and np.allclose(alone.x, whole.x[at])


def test_a_wrong_picture_is_not_read_back():
    specs, images = pictures("T1", 40)
    assert reads_back(specs, images).mean() > 0.9
    there = specs.shape >= 0
    for name, many in {"colour": 8, "shape": 6, "size": 3, "cell": 9, "tone": 3, "texture": 3}.items():
        values = (getattr(specs, name) + 1) % many
        other = replace(specs, **{name: np.where(there, values, -1) if values.ndim == 2 else values})
        assert not reads_back(other, images).any(), name
    assert not reads_back(specs, np.roll(images, 1, axis=0)).any()
    assert not reads_back(replace(specs, x=specs.x[:, ::-1].copy()), images).all()


def test_noise_flat_colour_and_empty_images_hold_no_objects():
    rng = np.random.default_rng(0)
    noise = read(rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8))
    assert not noise.valid.any()
    red = np.zeros((2, 32, 32, 3), np.uint8)
    red[..., 0] = 220
    assert not read(red).valid.any() and len(read(red).image) == 0
    gray = read(np.full((2, 64, 64, 3), 120, np.uint8))
    assert gray.valid.all() and len(gray.image) == 0 and gray.tone.tolist() == [1, 1] and gray.texture.tolist() == [0, 0]


def test_colour_that_no_object_explains_makes_an_image_invalid():
    specs, images = pictures("T0", 30)
    images = images.copy()
    rows = np.where(specs.y[:, 0] < 0.5, 27, 0)
    for image, row in zip(images, rows.tolist(), strict=True):
        image[row : row + 5] = (220, 30, 30)
    found = read(images)
    assert (~found.valid).mean() > 0.9


def test_the_area_of_a_disc_gives_its_size():
    place = (np.arange(128) + 0.5) / 128
    column, row = np.meshgrid(place, place)
    for size, side in enumerate(SIDE):
        disc = np.hypot(column - 0.5, row - 0.5) < side / np.sqrt(np.pi)
        image = np.where(disc[..., None], (0.13, 0.28, 0.88), 0.9)[None]
        found = read(image)
        assert found.size.tolist() == [size] and found.shape.tolist() == [0] and found.colour.tolist() == [5] and found.cell.tolist() == [4]


def test_other_shapes_of_arrays_are_refused_and_no_images_give_no_reading():
    for shape in ((2, 3, 32, 32), (2, 32, 48, 3), (32, 32, 3), (1, 8, 8, 3)):
        with pytest.raises(ValueError, match="square RGB"):
            read(np.zeros(shape, np.uint8))
    assert len(read(np.zeros((0, 32, 32, 3), np.uint8)).valid) == 0
