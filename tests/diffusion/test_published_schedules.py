"""The noise schedules of published models, by the values that their own code has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.config.schema import build
from ldm.diffusion.process import Process

STABLE: dict[str, Any] = {"kind": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def alpha_bar(schedule: dict[str, Any]) -> torch.Tensor:
    process = build({"schedule": schedule, "target": "epsilon"}, Process, "test")
    alpha, sigma = process.schedule.alpha_sigma(torch.arange(1000))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), atol=1e-12)
    return alpha**2


def test_stable_diffusion_s_schedule() -> None:
    found = alpha_bar(STABLE)
    assert [f"{float(found[t]):.8f}" for t in (0, 499, 999)] == ["0.99915000", "0.27766965", "0.00466010"]
    ratio = ((1 - found) / found).sqrt()
    assert f"{float(ratio[0]):.6f}" == "0.029167" and f"{float(ratio[-1]):.4f}" == "14.6146"
    assert f"{float(found[-1] / (1 - found[-1])):.6f}" == "0.004682"


def test_the_default_scaled_linear_is_stable_diffusion_s() -> None:
    assert torch.equal(alpha_bar({"kind": "scaled_linear"}), alpha_bar(STABLE))


@pytest.mark.parametrize(("end", "last"), [(0.0195, "0.00014230"), (0.0155, "0.00066867")])
def test_latent_diffusion_s_other_schedules(end: float, last: str) -> None:
    assert f"{float(alpha_bar({'kind': 'scaled_linear', 'beta_start': 0.0015, 'beta_end': end})[-1]):.8f}" == last


def test_diffusers_has_the_same_values() -> None:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.allclose(alpha_bar(STABLE).float(), peer.alphas_cumprod, rtol=2e-5)
