"""Muon's update: semi-orthogonal, alike in both precisions, and computed in the one that the processor has."""

from __future__ import annotations

import pytest
import torch

from ldm.training import optim
from ldm.training.optim import orthogonalise

SHAPES = [(16, 16), (16, 40), (40, 16), (16, 160), (160, 16)]


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one_and_directions_stay(shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "computed_in", lambda precision, device: kind)
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrix, 5)
    assert found.dtype == (torch.float32 if kind == "fp32" else torch.bfloat16)
    # A square random matrix has singular values near 0, which five rounds do not bring up all the way.
    values = torch.linalg.svdvals(found.double())
    low, high = (0.6, 1.3) if shape[0] != shape[1] else (0.0, 1.3)
    assert low < values.min() and values.max() < high
    left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    aligned = left.mT @ found.double() @ right.mT  # diagonal where the singular vectors are kept
    rest = aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))
    assert rest.abs().max() < (1e-4 if kind == "fp32" else 0.08)


def test_the_precision_is_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(optim, "computed_in", lambda precision, device: asked.append((precision, device)) or "fp32")
    assert orthogonalise(torch.eye(4), 5).dtype == torch.float32
    assert asked == [("bf16", "cpu")]
