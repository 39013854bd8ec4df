"""Thresholding against diffusers' own, and each picture by itself."""

from __future__ import annotations

import diffusers
import torch

from ldm.diffusion.rng import Rng
from ldm.diffusion.thresholding import RATIO, thresholded


def test_dynamic_is_that_of_diffusers_at_any_scale_and_static_cuts() -> None:
    x = 1.4 * Rng(0, range(4)).normal("x", (3, 8, 8))
    x[3] /= 8  # lies in range: stays as it is
    theirs = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=RATIO, sample_max_value=1e6)
    for bound in (1.0, 2.5):
        found = thresholded(lambda x, i: x, "dynamic", bound)(x * bound, 0)
        assert torch.allclose(found, theirs._threshold_sample(x) * bound, atol=1e-6)
        assert torch.equal(found[3], x[3] * bound) and float(found.abs().max()) <= bound * (1 + 1e-6)
        assert torch.equal(found[:1], thresholded(lambda x, i: x, "dynamic", bound)(x[:1] * bound, 0))
    assert torch.equal(thresholded(lambda x, i: x, "static", 1.0)(x, 0), x.clamp(-1, 1))
