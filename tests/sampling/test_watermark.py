"""A text hidden in pixels: what it costs, what it outlives, and what it never claims."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ldm.config.errors import UserError
from ldm.sampling.watermark import MOST_BYTES, hide, seek

RNG = np.random.default_rng(0)


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(64, 64), (71, 133), (256, 256)])
def test_a_text_comes_back_and_the_picture_hardly_changes(size: tuple[int, int]) -> None:
    for seed, text in enumerate(("ldm", "é☃", "12345678")):
        picture = smooth(*size, seed)
        marked = hide(picture, text)
        assert seek(marked) == text and marked.dtype == np.uint8 and seek(picture) is None
        error = np.square(marked.astype(float) - picture).mean()
        assert 10 * np.log10(255**2 / error) > 41
        assert np.array_equal(hide(picture, text), marked)


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 255), (128, 128, 128)])
def test_flat_and_saturated_pictures_can_carry_one(colour: tuple[int, int, int]) -> None:
    picture = np.empty((64, 64, 3), np.uint8)
    picture[:] = colour
    assert seek(hide(picture, "flat")) == "flat"


def test_it_outlives_jpeg_of_quality_80_but_no_crop() -> None:
    for seed in range(5):
        marked = hide(smooth(128, 128, seed), "made by ldm")
        data = io.BytesIO()
        Image.fromarray(marked).save(data, "JPEG", quality=80)
        assert seek(np.asarray(Image.open(data))) == "made by ldm"
        assert seek(marked[3:, 5:]) is None


def test_nothing_is_found_where_nothing_is() -> None:
    for _ in range(100):
        assert seek(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)) is None
    assert seek(np.zeros((4, 4, 3), np.uint8)) is None


def test_what_does_not_fit_is_refused() -> None:
    whole, little = ("x" * 40, 512, f"1 to {MOST_BYTES}"), ("x" * 17, 64, "1 to 15")
    for text, side, expected in (("", 64, "0 bytes"), whole, little, ("x", 16, "nothing fits")):
        with pytest.raises(UserError, match=expected):
            hide(np.zeros((side, side, 3), np.uint8), text)
