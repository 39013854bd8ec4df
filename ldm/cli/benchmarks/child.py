"""Subprocess entry of benchmarks (cold start, peak memory): python -m ldm.cli.benchmarks.child TASK SIDE SIZE DEVICE [FOLDER FILE]."""

from __future__ import annotations

import resource
import sys
from typing import Any


def first_call(side: str, folder: str, file: str) -> None:
    """Open a model folder and call its UNet once; the result goes to a file."""
    if side == "ours":
        import torch

        from ldm.diffusion.batch import Cond, Text
        from ldm.families.registry import load

        family: Any = load(folder)
        x, states = _inputs(torch, family.denoiser.config.in_channels, family.denoiser.config.context_width)
        text = Text(tokens=states, mask=torch.ones(states.shape[:2], dtype=torch.bool))
        with torch.no_grad():
            result = family.denoiser(x, torch.tensor([500.0]), Cond(text=text))
    else:
        import torch
        from diffusers import StableDiffusionPipeline

        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        x, states = _inputs(torch, pipeline.unet.config.in_channels, pipeline.unet.config.cross_attention_dim)
        with torch.no_grad():
            result = pipeline.unet(x, torch.tensor(500), states).sample
    import numpy as np

    np.save(file, result.numpy())


def _inputs(torch: Any, channels: int, width: int) -> tuple[Any, Any]:
    x = torch.linspace(-2, 2, channels * 8 * 8).sin().view(1, channels, 8, 8)
    return x, torch.linspace(-1, 1, 77 * width).cos().view(1, 77, width)


def draw(side: str, size: str, device: str) -> Any:
    """Draw one picture in bf16; uint8 (1,H,W,3)."""
    import torch

    from ldm.cli.benchmarks.models import SD1, TINY, build_family, twin_pipeline
    from ldm.cli.benchmarks.sampling import drawers

    shape, steps = (TINY, 2) if size == "tiny" else (SD1, 10)
    family = build_family(shape, device).eval()
    noise = torch.randn(1, shape.autoencoder.latent_channels, shape.side, shape.side, generator=torch.Generator().manual_seed(0))
    if side == "ours":
        ours, _ = drawers(family, None, noise, "bf16", shape.pixels, steps)
        return ours(0)
    pipeline = twin_pipeline(family).to(device, torch.bfloat16)
    family.to("cpu")
    family.codec.to("cpu")
    _, theirs = drawers(family, pipeline, noise, "bf16", shape.pixels, steps)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return theirs(0)


def train(side: str, size: str, device: str) -> Any:
    """Two training steps in bf16 with recomputed activations, batch 1, ours with offload; the loss before the first."""
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    import torch

    from ldm.cli.benchmarks.models import SD1, TINY, build_family, moments
    from ldm.cli.benchmarks.rows import Setup
    from ldm.cli.benchmarks.training import DiffusersLoop, our_update
    from ldm.diffusion.rng import Rng

    shape = TINY if size == "tiny" else SD1
    shape = replace(shape, batch=1, unet=replace(shape.unet, checkpointing=True))
    family = build_family(shape, device)
    torch.manual_seed(1)
    batch = moments(shape)
    rng = Rng(0, batch.position)
    noised = family.process.noise(family.encode(batch.to(device), rng).x0, rng)
    if side == "ours":
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            loss = float(family.loss(batch.to(device), rng)[0]["denoising"])
        with tempfile.TemporaryDirectory() as folder:
            update = our_update(family, batch, "bf16", Setup(device=device, folder=Path(folder)), shape.pixels, offload=True)
            for _ in range(2):
                update()
        return loss
    loop = DiffusersLoop(family, batch, "bf16", device)
    loop.unet.enable_gradient_checkpointing()
    x0 = family.encode(batch.to(device), rng).x0
    with torch.no_grad():
        loss = float(loop.loss(noise=noised.target, t=noised.t.long(), latents=x0))
    for module in (family, *family.frozen()):
        module.to("cpu")
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        loop.step()
    return loss


TASKS = {"draw": draw, "train": train}


def compare(task: str, size: str, device: str) -> float:
    """Relative difference of what both sides make in a task."""
    import numpy as np

    ours, theirs = (np.asarray(TASKS[task](side, size, device), dtype=np.float64) for side in ("ours", "theirs"))
    return float(np.abs(ours - theirs).mean() / np.abs(theirs).mean())


def main(words: list[str]) -> None:
    """Do the task; the last word printed is the peak memory in bytes."""
    task, side, size, device = words[:4]
    if task == "first_call":
        first_call(side, *words[4:])
        return
    TASKS[task](side, size, device)
    if device == "cuda":
        import torch

        print(torch.cuda.max_memory_allocated())
        return
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(used if sys.platform == "darwin" else 1024 * used)


if __name__ == "__main__":
    main(sys.argv[1:])
