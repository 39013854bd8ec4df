"""Fréchet distance against closed forms and a matrix root, and the fixed features against plain loops and recorded values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg, ndimage, signal

from ldm.data.scenes.render import render
from ldm.data.scenes.source import prompts
from ldm.metrics.frechet import FILTERS, SIDE, distance, features, standardise, weights

GOLDEN_SUMS = [-11.3807664103, 3.1658596419, 11.597709891]
GOLDEN = [0.38456141, 0.56988274, 0.17959679, 0.43278405, 0.24175881, 0.12027836]


def exactly(mean: NDArray, covariance: NDArray, n: int, seed: int) -> NDArray:
    """n points whose sample mean and covariance are just these."""
    raw = np.random.default_rng(seed).standard_normal((n, len(mean)))
    raw -= raw.mean(0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def covariance(size: int, seed: int) -> NDArray:
    root = np.random.default_rng(seed).standard_normal((size, 2 * size))
    return root @ root.T / size


def images(n: int = 6, side: int = SIDE) -> torch.Tensor:
    """Waves in [-1,1] that need no random numbers."""
    i, c, y, x = np.ogrid[:n, :3, :side, :side]
    return torch.from_numpy(np.sin(6.4 * (i + 1) * (x + 0.5) / side + 12.8 * (c + 1) * (y + 0.5) / side + i)).float()


def test_the_distance_of_gaussians_with_axes_in_common_is_known():
    s, t = np.array([4.0, 1.0, 0.25, 9.0]), np.array([1.0, 1.0, 2.25, 4.0])
    gap = np.array([1.0, -2.0, 0.0, 0.5])
    a, b = exactly(np.zeros(4), np.diag(s), 50, 0), exactly(gap, np.diag(t), 70, 1)
    assert distance(a, b) == pytest.approx((gap**2).sum() + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum())


@pytest.mark.parametrize("size", [2, 7, 20])
def test_the_distance_agrees_with_a_matrix_root(size):
    m, n = np.random.default_rng(size).standard_normal((2, size))
    s, t = covariance(size, 1), covariance(size, 2)
    expected = ((m - n) ** 2).sum() + np.trace(s + t - 2 * np.real(linalg.sqrtm(s @ t)))
    assert distance(exactly(m, s, 64, 3), exactly(n, t, 80, 4)) == pytest.approx(expected)


def test_fewer_points_than_features_do_no_harm():
    """A turn of the axes and features that are always zero change nothing, so the singular case follows from the regular one."""
    a, b = exactly(np.zeros(5), covariance(5, 0), 12, 0), exactly(np.ones(5), covariance(5, 1), 12, 1)
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((40, 40)))[0]
    wide = [np.pad(x, ((0, 0), (0, 35))) @ turn for x in (a, b)]
    assert distance(*wide) == pytest.approx(distance(a, b))


def test_the_distance_is_zero_from_itself_symmetric_and_moves_with_the_mean():
    a, b = (np.random.default_rng(i).standard_normal((30, 6)) for i in range(2))
    assert distance(a, a) == pytest.approx(0, abs=1e-9)
    assert distance(a, b) == pytest.approx(distance(b, a))
    assert distance(a, a + 3) == pytest.approx(9 * 6)
    with pytest.raises(ValueError, match="two images"):
        distance(a, b[:1])


def test_a_feature_is_the_mean_and_deviation_of_plain_correlations():
    x = images(1)[0].double().numpy()
    expected: list[float] = []
    for weight in weights():
        kernel = weight.numpy()
        maps = [sum(signal.correlate2d(x[c], kernel[k, c], "same")[::2, ::2] for c in range(len(x))) for k in range(len(kernel))]
        x = np.maximum(np.stack(maps), 0)
        expected += [*x.mean((1, 2)), *x.std((1, 2))]
    assert features(images(1))[0] == pytest.approx(np.array(expected), abs=1e-9)


def test_features_stay_what_they_are():
    """Distances of different versions are comparable only while these values stand."""
    found = features(images(2))
    assert found.shape == (2, 2 * sum(FILTERS)) and found.dtype == np.float64
    assert [float(w.sum()) for w in weights()] == pytest.approx(GOLDEN_SUMS, abs=1e-9)
    assert found[1, [0, 30, 60, 100, 150, 191]] == pytest.approx(GOLDEN, abs=1e-6)


def test_features_depend_on_each_image_alone_and_on_any_size():
    many = images(4).repeat(70, 1, 1, 1)  # more than are read at a time
    assert np.abs(features(many)[-4:] - features(images(4))).max() < 1e-9
    fine, coarse = features(images(4, 128)), features(images(4))
    assert np.abs(fine - coarse).mean() < 0.5 * coarse.std(0).mean()


def test_standardised_features_have_the_reference_as_their_unit():
    rng = np.random.default_rng(0)
    a, b = rng.normal(5, 3, (40, 8)), rng.normal(5, 3, (30, 8))
    a[:, 2] = b[:, 2] = 0.1 * 3  # the same everywhere, but for the rounding of its mean
    b[0, 2] += 0.5
    first, second = standardise(a, b)
    kept = np.arange(8) != 2
    assert first[:, kept].mean(0) == pytest.approx(0, abs=1e-12) and first[:, kept].std(0) == pytest.approx(1)
    assert second[:, kept] == pytest.approx((b[:, kept] - a[:, kept].mean(0)) / a[:, kept].std(0))
    assert np.abs(first[:, 2]).max() < 1e-9 and second[0, 2] == pytest.approx(0.5)


def test_real_images_are_nearer_to_real_ones_than_spoilt_ones_are_and_nearer_the_more_there_are():
    real = render(prompts("T0", 240, seed=3).specs, 32)

    def measured(n: int, made: NDArray) -> tuple[float, float]:
        a, b, c = standardise(*(features(torch.from_numpy(x) * 2 - 1) for x in (real[:n], real[n : 2 * n], made[:n])))
        return distance(b, c), distance(a, b)

    soft = ndimage.gaussian_filter(real, (0, 0, 2, 2))
    noisy = np.clip(real + 0.1 * np.random.default_rng(0).standard_normal(real.shape, np.float32), 0, 1)
    for spoilt in (soft, noisy):
        found, floor = measured(120, spoilt)
        assert found > 1.5 * floor
    others, floor = measured(40, real[200:])
    assert floor / 2 < others < 2 * floor and measured(120, soft)[1] < 0.8 * floor
