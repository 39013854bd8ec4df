"""Rows of the autoencoder alone: decoding and encoding beside diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.cli.benchmarks.models import KL_SD, TINY, count, distance, twin_autoencoder
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.models.inference import prepare

Way = Literal["decode", "encode"]
ERROR = "relative error of the result"


def decode(setup: Setup) -> Iterator[Case]:
    """B11."""
    yield from _cases(setup, "decode")


def encode(setup: Setup) -> Iterator[Case]:
    """B12."""
    yield from _cases(setup, "encode")


def _cases(setup: Setup, way: Way) -> Iterator[Case]:
    yield _case(setup, way, "equal", torch.float32, torch.float32, 1e-4)
    yield _case(setup, way, "equal", torch.bfloat16, torch.bfloat16, 5e-2)
    yield _case(setup, way, "default", torch.bfloat16, torch.float32, 5e-2)


def _case(setup: Setup, way: Way, kind: Literal["equal", "default"], ours: torch.dtype, theirs: torch.dtype, tolerance: float) -> Case:
    config = TINY.autoencoder if setup.tiny else KL_SD
    pixels = 32 if setup.tiny else 512 if setup.device == "cuda" else 128
    torch.manual_seed(0)
    network = config.build().eval().to(setup.device)
    peer = twin_autoencoder(network).eval().to(theirs)
    network = prepare(network.to(ours), channels_last=True)  # as drawing and encoding use it
    image = torch.rand(1, 3, pixels, pixels, device=setup.device) * 2 - 1
    latent = torch.randn(1, config.latent_channels, pixels // network.factor, pixels // network.factor, device=setup.device)

    @torch.no_grad()
    def our_side() -> Tensor:
        return network.decode(latent.to(ours)) if way == "decode" else network.encode(image.to(ours))[0]

    @torch.no_grad()
    def their_side() -> Tensor:
        if way == "decode":
            return peer.decode(latent.to(theirs), return_dict=False)[0]
        return peer.encode(image.to(theirs)).latent_dist.mean

    said = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    name = f"{way}, {pixels} px, {said[ours]}" if ours == theirs else f"{way}, {pixels} px, ours {said[ours]}, theirs {said[theirs]}"
    call: Callable[[], Any] = our_side
    return Case(
        name=name,
        kind=kind,
        ours=call,
        theirs=their_side,
        check=lambda: distance([our_side()], [their_side()]),
        tolerance=tolerance,
        error=ERROR,
        notes={"ours": said[ours], "theirs": said[theirs], "pixels": pixels, "parameters": count(config)},
    )
