"""Stable Diffusion 1 at its full size with random weights, against diffusers on the very same tensors.

Left out unless asked for: `python -m pytest -m large -s tests/parity`, with 7 GB of free memory. Prints what it measures.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion.batch import Cond, Text
from ldm.models.autoencoder import KLConfig
from ldm.models.unet import UNetConfig

pytestmark = [pytest.mark.large, pytest.mark.timeout(1800)]
LIMIT = 1e-5


def timed(name: str, run: Callable[[], Tensor]) -> Tensor:
    start = time.monotonic()
    with torch.no_grad():
        found = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
    print(f"{name}: {time.monotonic() - start:.1f} s, peak {peak:.2f} GiB, {torch.get_num_threads()} threads")
    return found


def compare(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
    wanted, found = timed(f"{name}, diffusers", theirs), timed(f"{name}, ours", ours)
    error = float((found - wanted).abs().max())
    print(f"{name}: max error {error:.1e}, of values to {float(wanted.abs().max()):.2f}")
    assert error <= LIMIT and wanted.std() > 1e-2


def test_unet() -> None:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64).eval()
    with torch.device("meta"):
        ours = UNetConfig.from_diffusers(dict(theirs.config)).build().eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    x, tokens, t = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768), torch.tensor([501.0])
    cond = Cond(text=Text(tokens=tokens, mask=torch.ones(1, 77, dtype=torch.bool)))
    compare("UNet of 64x64 latents", lambda: ours(x, t, cond), lambda: theirs(x, t, tokens).sample)


def test_decoder() -> None:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()
    with torch.device("meta"):
        ours = KLConfig.from_diffusers(dict(theirs.config)).build().eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    latent = torch.randn(1, 4, 64, 64)
    compare("decoder to 512x512", lambda: ours.decode(latent), lambda: theirs.decode(latent).sample)
