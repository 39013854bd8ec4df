"""PSNR and SSIM against their definitions, written out plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from ldm.metrics.reconstruction import psnr, ssim


def pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    a = ndimage.gaussian_filter(rng.random(shape), (0, 0, 1, 1))
    return torch.from_numpy(a), torch.from_numpy(np.clip(a + 0.05 * rng.standard_normal(shape), 0, 1))


@pytest.mark.parametrize("gap", [0.5, 0.1, 0.001])
def test_psnr_of_a_constant_gap_is_known(gap):
    a = torch.full((2, 3, 8, 8), 0.2)
    assert psnr(a, a + gap).tolist() == pytest.approx([-20 * np.log10(gap)] * 2, rel=1e-4)


def test_psnr_is_of_each_image_by_itself_and_infinite_between_equal_ones():
    a, b = pair(0, 3, 3, 16, 16)
    expected = [10 * np.log10(1 / ((x - y) ** 2).mean()) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert psnr(a, b).tolist() == pytest.approx(expected)
    assert psnr(a, a).tolist() == [float("inf")] * 3
    assert psnr(a.half(), b.half()).dtype == torch.float64


def by_definition(a: np.ndarray, b: np.ndarray, size: int, sigma: float = 1.5) -> float:
    """Wang 2004, one window after the other, of one channel."""
    offset = np.arange(size) - (size - 1) / 2
    weight = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * sigma**2))
    weight /= weight.sum()
    found = []
    for i in range(a.shape[0] - size + 1):
        for j in range(a.shape[1] - size + 1):
            x, y = a[i : i + size, j : j + size], b[i : i + size, j : j + size]
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy, vxy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum(), (weight * (x - mx) * (y - my)).sum()
            first = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2)
            found.append(first * (2 * vxy + 0.03**2) / (vx + vy + 0.03**2))
    return float(np.mean(found))


def test_ssim_is_wang_s():
    a, b = pair(1, 2, 3, 20, 17)
    expected = [np.mean([by_definition(x, y, 11) for x, y in zip(p, q, strict=True)]) for p, q in zip(a.numpy(), b.numpy(), strict=True)]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-10)


def test_ssim_agrees_with_gaussian_filters():
    a, b = pair(2, 1, 1, 48, 48)

    def blur(x):
        return ndimage.gaussian_filter(x, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    x, y = a[0, 0].numpy(), b[0, 0].numpy()
    mx, my = blur(x), blur(y)
    xx, yy, xy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    expected = ((2 * mx * my + 1e-4) * (2 * xy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (xx + yy + 9e-4))).mean()
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-10)


def test_small_images_get_a_small_window():
    a, b = pair(3, 1, 3, 6, 9)
    assert ssim(a, b).item() == pytest.approx(np.mean([by_definition(x, y, 6) for x, y in zip(a[0].numpy(), b[0].numpy(), strict=True)]))


def test_ssim_is_one_for_equal_images_symmetric_and_falls_with_noise():
    a, b = pair(4, 2, 3, 24, 24)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    assert ssim(a, b).tolist() == pytest.approx(ssim(b, a).tolist())
    far = (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert (ssim(a, far) < ssim(a, b)).all() and (ssim(a, 1 - a) < 0).all()


def test_a_different_number_of_images_is_refused():
    a, b = pair(5, 3, 3, 12, 12)
    for metric in (psnr, ssim):
        with pytest.raises(ValueError):
            metric(a, b[:2])
