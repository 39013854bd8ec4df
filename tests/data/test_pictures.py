"""Tensors as bytes, grids and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.pictures import grid, save_grid, to_uint8


def test_every_byte_comes_back_and_the_rest_is_clipped() -> None:
    levels = torch.arange(256).float() / 127.5 - 1
    assert torch.equal(to_uint8(levels.view(1, 1, 16, 16).expand(1, 3, 16, 16))[0, :, :, 0].flatten(), torch.arange(256).byte())
    beyond = torch.tensor([-3.0, 0.0, 7.0]).view(1, 3, 1, 1)
    assert to_uint8(beyond.half()).tolist() == [[[[0, 128, 255]]]]


@pytest.mark.parametrize(("count", "columns", "rows"), [(5, 3, 2), (2, 8, 1), (1, 1, 1), (4, 1, 4)])
@pytest.mark.parametrize("gap", [0, 3])
def test_a_grid_holds_every_picture_in_reading_order(count: int, columns: int, rows: int, gap: int) -> None:
    images = torch.arange(count).byte().view(-1, 1, 1, 1).expand(count, 4, 6, 3)
    sheet = grid(images, columns, gap)
    columns = min(columns, count)
    assert sheet.shape == (4 * rows + gap * (rows - 1), 6 * columns + gap * (columns - 1), 3)
    for i in range(count):
        top, left = i // columns * (4 + gap), i % columns * (6 + gap)
        assert bool((sheet[top : top + 4, left : left + 6] == i).all())
    assert int((sheet[..., 0] != 255).sum()) == count * 4 * 6  # white elsewhere


def test_files_are_whole(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    save_grid(images, tmp_path / "deep" / "a.png", 3)
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert np.array_equal(np.asarray(image), grid(to_uint8(images), 3).numpy())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.png"]
