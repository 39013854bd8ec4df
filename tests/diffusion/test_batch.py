"""Batches that move: bytes become numbers, in whatever layout they come."""

from __future__ import annotations

import pytest
import torch

from ldm.diffusion.batch import IN_CACHE, ImageBatch, to_unit


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 3, 200, 131)])
def test_bytes_become_the_same_numbers_in_any_layout(shape: tuple[int, ...]) -> None:
    image = (torch.arange(torch.Size(shape).numel()) % 256).to(torch.uint8).view(shape)
    expected = image.float() / 127.5 - 1
    assert len(shape) == 4 and (image.numel() > 3 * IN_CACHE) == (shape[0] == 3)
    for laid in (image, image.to(memory_format=torch.channels_last), image.flip(3).flip(3), image[:, :, ::1]):
        found = to_unit(laid)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert expected.min() == -1 and expected.max() == 1


def test_a_batch_of_bytes_becomes_numbers_when_it_is_moved_and_stays_what_it_was() -> None:
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    batch = ImageBatch(image=image, caption=("a", "b"), size=torch.zeros(2, 6), position=torch.arange(2))
    moved = batch.to("cpu")
    assert moved.image.dtype == torch.float32 and moved.image.is_contiguous() and batch.image.dtype == torch.uint8
    assert torch.equal(moved.to("cpu").image, moved.image) and moved.caption == batch.caption
