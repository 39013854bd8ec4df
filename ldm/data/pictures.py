"""Picture files from tensors: single images and grids."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ldm.config.errors import UserError


def to_uint8(images: Tensor) -> Tensor:
    """Images (N,3,H,W) in [-1,1] as bytes (N,H,W,3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def finished(images: Tensor) -> Tensor:
    """What a network drew, (N,3,H,W) in [-1,1], as bytes (N,H,W,3).

    Raises:
        UserError: if there are values that are no numbers, which would be black.
    """
    if not images.isfinite().all():
        raise UserError("model: the numbers of the network that makes the pixels are not finite; its weights may be damaged: copy it again")
    return to_uint8(images)


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Image grid of (N,H,W,3) uint8, row by row, as one picture (H',W',3) with white gaps of `gap` px."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    lines = -(-count // columns)
    sheet = torch.full((lines * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N,3,H,W) in [-1,1] as one PNG, whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    Image.fromarray(grid(to_uint8(images), columns).numpy()).save(temporary, format="PNG")
    temporary.replace(path)
