"""Benchmarks of sampling: ours beside diffusers' StableDiffusionPipeline, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count as numbers
from typing import Any, Literal

import numpy as np
import torch

from ldm.cli.benchmarks.models import CAPTIONS, SD1, SD2, TINY, ModelShape, build_family, counts, small, twin_pipeline
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.families.draws import PLAIN, Running, Wanted
from ldm.families.latent_diffusion.family import LatentDiffusionFamily

Precision = Literal["fp32", "bf16"]
MLPERF_SD2 = 3.45  # images/s on one H200, the evaluations of MLPerf Training 4.0
GUIDANCE = 7.5
LARGEST, MEAN = "largest difference in levels of 255", "mean difference in levels of 255"
# Fifty bf16 steps of an untrained network, whose guided predictions amplify every rounding.
TOLERANCE = {LARGEST: 1.0, MEAN: 6.0}


def steps(setup: Setup) -> int:
    """Denoising steps of a picture."""
    return 3 if setup.tiny else 50


def fifty_steps(setup: Setup) -> Iterator[Case]:
    """B7."""
    shape = small(setup.tiny)
    yield drawing(setup, shape, "small UNet and VAE, 256 px, fp32", "equal", "fp32", "fp32")
    yield drawing(setup, shape, "the same, both bf16", "equal", "bf16", "bf16")
    yield drawing(setup, shape, "the same, ours bf16, theirs fp32", "default", "bf16", "fp32")


def on_openvino(setup: Setup) -> Iterator[Case]:
    """B8: the forms that a model draws in; the first call, which converts the network, is not timed."""
    shape = small(setup.tiny)
    yield drawing(setup, shape, "small UNet and VAE, 256 px, fp32", "equal", "fp32", "fp32", running=Running(backend="openvino"))
    yield beside_torch(setup, shape)


def beside_torch(setup: Setup, shape: ModelShape) -> Case:
    """OpenVINO's drawing beside our own by torch."""
    noise = torch.randn(1, shape.autoencoder.latent_channels, shape.side, shape.side)
    sides = []
    for running in (Running(backend="openvino"), PLAIN):
        family = build_family(shape, setup.device).eval()
        family.ready(setup.folder, running, "fp32")
        sides.append(drawer(family, noise, "fp32", shape.pixels, steps(setup)))

    def check() -> float:
        first, second = (side(0).astype(float) for side in sides)
        return float(np.abs(first - second).max())

    return Case(
        name="the same, against our own torch",
        kind="equal",
        ours=_counting(sides[0]),
        theirs=_counting(sides[1]),
        check=check,
        tolerance=TOLERANCE[LARGEST],
        error=LARGEST,
        notes={"ours": "openvino, fp32", "theirs": "torch, fp32", "steps": steps(setup), "guidance": GUIDANCE, **counts(shape)},
    )


def sd1(setup: Setup) -> Iterator[Case]:
    """B9."""
    shape = TINY if setup.tiny else SD1
    yield drawing(setup, shape, "SD1.5, 512 px, both eager", "equal", "bf16", "bf16")
    yield drawing(setup, shape, "SD1.5, 512 px, both compiled", "equal", "bf16", "bf16", running=compiled(setup), compiled=True)


def sd2_record(setup: Setup) -> Iterator[Case]:
    """B10."""
    shape, images = (TINY, 2) if setup.tiny else (SD2, 16)
    yield drawing(setup, shape, "SD2, 512 px, 16 at a time", "record", "bf16", "bf16", images=images)
    if not setup.tiny:
        yield drawing(setup, shape, "the same, compiled", "record", "bf16", "bf16", images=images, running=compiled(setup))


def compiled(setup: Setup) -> Running:
    """As `--compile` draws; a compiler is no part of what a toy shows."""
    return Running(compiled=not setup.tiny)


def drawing(
    setup: Setup,
    shape: ModelShape,
    name: str,
    kind: Literal["equal", "default", "record"],
    ours: Precision,
    theirs: Precision,
    images: int = 1,
    compiled: bool = False,
    running: Running = PLAIN,
) -> Case:
    """One call that draws `images` pictures, text encoder and decoder included, ours in the form that `ldm sample` draws in."""
    family = build_family(shape, setup.device, chunk=images).eval()
    pipeline = twin_pipeline(family)
    error = LARGEST if (ours, theirs) == ("fp32", "fp32") else MEAN
    if theirs == "bf16":
        # Their own copy of the text encoder: ours stays in float32.
        pipeline.text_encoder = type(pipeline.text_encoder)(pipeline.text_encoder.config)
        pipeline.text_encoder.load_state_dict(family.text.model.state_dict())
        pipeline.to(setup.device, torch.bfloat16)
    family.ready(setup.folder, running, ours)
    if compiled:
        # A compiler is no part of what a toy shows.
        kwargs: dict[str, Any] = {"backend": "eager"} if setup.tiny else {"mode": "max-autotune", "fullgraph": True}
        pipeline.unet = torch.compile(pipeline.unet, **kwargs)
    noise = torch.randn(images, shape.autoencoder.latent_channels, shape.side, shape.side)
    ours_draw, theirs_draw = drawers(family, pipeline, noise, ours, shape.pixels, steps(setup))

    def check() -> float:
        difference = np.abs(ours_draw(0).astype(float) - theirs_draw(0).astype(float))
        return float(difference.max() if error == LARGEST else difference.mean())

    return Case(
        name=name,
        kind=kind,
        ours=_counting(ours_draw),
        theirs=None if kind == "record" else _counting(theirs_draw),
        check=check,
        tolerance=TOLERANCE[error],
        error=error,
        per_call=images,
        published=MLPERF_SD2 if kind == "record" and not setup.tiny else 0.0,
        notes={"ours": ours, "theirs": theirs, "steps": steps(setup), "guidance": GUIDANCE, "compiled": compiled, **counts(shape)},
    )


def drawers(
    family: LatentDiffusionFamily, pipeline: Any, noise: torch.Tensor, precision: Precision, pixels: int, steps: int
) -> tuple[Callable[[int], np.ndarray], Callable[[int], np.ndarray]]:
    """Both sides as functions of a number that is a part of the prompts, so that none is remembered; uint8 (N,H,W,3)."""

    def theirs(number: int) -> np.ndarray:
        weight = next(pipeline.vae.parameters())
        found = pipeline(
            prompts(len(noise), number),
            height=pixels,
            width=pixels,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            latents=noise.to(weight.device, weight.dtype),
            output_type="np",
        ).images
        return (found * 255).round().astype(np.uint8)

    return drawer(family, noise, precision, pixels, steps), theirs


def drawer(
    family: LatentDiffusionFamily, noise: torch.Tensor, precision: Precision, pixels: int, steps: int
) -> Callable[[int], np.ndarray]:
    """Our side of `drawers`."""
    wanted, images = Wanted(steps=steps, guidance=GUIDANCE, sampler="ddim", precision=precision), len(noise)

    def ours(number: int) -> np.ndarray:
        return np.asarray(family.sample(prompts(images, number), list(range(images)), wanted, size=(pixels, pixels), latents=noise))

    return ours


def prompts(images: int, number: int) -> list[str]:
    """So many prompts with a number in each."""
    return [f"{CAPTIONS[i % len(CAPTIONS)]} {number}" for i in range(images)]


def _counting(draw: Callable[[int], np.ndarray]) -> Callable[[], np.ndarray]:
    number = numbers(1)
    return lambda: draw(next(number))
