"""Benchmarks of the UNet's training step and of the optimiser with EMA, beside diffusers' train_text_to_image.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.cli.benchmarks.models import (
    QUICKSTART,
    SD1,
    SD2,
    TINY,
    ModelShape,
    build_family,
    counts,
    distance,
    moments,
    small,
    twin_autoencoder,
    twin_unet,
)
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.diffusion.batch import MomentBatch
from ldm.diffusion.rng import Rng
from ldm.distributed.processes import Learners
from ldm.families.family import Context, Family, ParameterGroup
from ldm.families.latent_diffusion.family import LatentDiffusionFamily
from ldm.training import optim
from ldm.training.ema import Ema
from ldm.training.log import Log
from ldm.training.loop import Trainer
from ldm.training.optim import AdamW
from ldm.training.settings import Train

Precision = Literal["fp32", "bf16"]
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRADIENTS = "relative error of all gradients"
# bf16 keeps 8 bits, and the two sides add in different orders.
TOLERANCE = {("fp32", "fp32"): 1e-4, ("bf16", "bf16"): 5e-2, ("bf16", "fp32"): 5e-2}
LR, DECAY = 1e-4, 0.9999  # diffusers' defaults
MLPERF_SD2 = 129.4  # images/s on one H200, MLPerf Training 4.0


def both_fp32(setup: Setup) -> Iterator[Case]:
    """B1."""
    yield from _steps(setup, "fp32", "fp32", "equal")


def both_bf16(setup: Setup) -> Iterator[Case]:
    """B2."""
    yield from _steps(setup, "bf16", "bf16", "equal")


def as_shipped(setup: Setup) -> Iterator[Case]:
    """B3."""
    yield from _steps(setup, "bf16", "fp32", "default")


def tuned(setup: Setup) -> Iterator[Case]:
    """B26: the peer's loop as somebody writes it who knows where its time goes."""
    for precision in ("fp32", "bf16"):
        yield from _steps(setup, precision, precision, "equal", tuned=True)


def sd1_online(setup: Setup) -> Iterator[Case]:
    """B5: their step encodes pixels and captions, ours reads cached latents; ours as it is, and compiled."""
    shape = TINY if setup.tiny else SD1
    yield step(setup, shape, "SD1.5, 512 px", "bf16", "bf16", "equal", online=True)
    if not setup.tiny:  # a compiler is no part of what a toy shows
        yield step(setup, shape, "the same, ours compiled", "bf16", "bf16", "equal", online=True, compiled=True)


def sd2_record(setup: Setup) -> Iterator[Case]:
    """B6: no peer is timed, but the gradients are compared with diffusers'."""
    shape = TINY if setup.tiny else SD2
    yield step(setup, shape, "SD2, 512 px, batch 64", "bf16", "bf16", "record", published=MLPERF_SD2)
    if not setup.tiny:
        yield step(setup, shape, "the same, compiled", "bf16", "bf16", "record", published=MLPERF_SD2, compiled=True)


def _steps(setup: Setup, ours: Precision, theirs: Precision, kind: Literal["equal", "default"], tuned: bool = False) -> Iterator[Case]:
    said = f", both {ours}" * tuned
    yield step(setup, small(setup.tiny), f"small UNet, 32x32 latents, batch 8{said}", ours, theirs, kind, tuned=tuned)
    if not setup.tiny:
        yield step(setup, QUICKSTART, f"quickstart's UNet, 8x8 latents, batch 32{said}", ours, theirs, kind, tuned=tuned)


def step(
    setup: Setup,
    shape: ModelShape,
    name: str,
    ours: Precision,
    theirs: Precision,
    kind: Literal["equal", "default", "record"],
    online: bool = False,
    published: float = 0.0,
    compiled: bool = False,
    tuned: bool = False,
) -> Case:
    """One training step on the same latents, captions and weights; `compiled` is of ours, `tuned` of theirs."""
    family = build_family(shape, setup.device)
    batch = moments(shape)
    loop = DiffusersLoop(family, batch, theirs, setup.device, online, tuned)
    update = our_update(family, batch, ours, setup, shape.pixels, compile=compiled)
    published = 0.0 if setup.tiny else published

    def check() -> float:
        rng, here = Rng(0, batch.position), batch.to(setup.device)
        x0 = family.encode(here, rng).x0
        noised = family.process.noise(x0, rng)
        loop.loss(noise=noised.target, t=noised.t.long(), latents=x0).backward()
        expected = gradients(loop.unet)
        with torch.autocast(setup.device, DTYPE[ours], enabled=ours != "fp32"):
            terms, _ = family.loss(here, rng)
        terms["denoising"].backward()
        error = distance(gradients(family.denoiser), expected)
        if kind == "record":
            loop.release()
        return error

    return Case(
        name=name,
        kind=kind,
        ours=update,
        theirs=None if kind == "record" else loop.step,
        check=check,
        tolerance=TOLERANCE[ours, theirs],
        error=GRADIENTS,
        per_call=shape.batch,
        published=published,
        notes={"ours": ours, "theirs": theirs, "compiled": compiled, "tuned": tuned, **counts(shape)},
    )


def gradients(network: torch.nn.Module) -> list[Tensor]:
    """The gradients by the parameters' names, which are taken away."""
    taken = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    return [taken[name] for name in sorted(taken)]


def our_update(family: Family, batch: Any, precision: Precision, setup: Setup, pixels: int, **fields: Any) -> Callable[[], None]:
    """The update that `ldm.training.loop` makes of a batch: loss, gradients, clipping, optimiser and averages.

    Args:
        fields: of `trainer`.
    """
    nothing: Any = None
    made = trainer(family, precision, setup.folder, nothing, pixels, len(batch.position), **fields)
    model = made.processes.wrap(family)

    def update() -> None:
        made._update(model, batch)
        made.step += 1

    return update


def trainer(
    family: Family,
    precision: Precision,
    folder: Path,
    data: Any,
    pixels: int,
    batch: int,
    part: Literal["autoencoder", "diffusion"] = "diffusion",
    optim: AdamW = AdamW(lr=LR),
    **settings: Any,
) -> Trainer:
    """A stage of our training loop, with diffusers' learning rate and averages, that never ends.

    Args:
        settings: of the stage besides.
    """
    stage = Train(model=part, images=10**12, resolution=pixels, batch=batch, precision=precision, optim=optim, ema=DECAY, **settings)
    context = Context(data=data, val=data, resolution=pixels, seed=0, total_images=stage.images)
    log = Log(folder, console=False, write=False)
    return Trainer(stage, family, context, data=data, folder=folder, key="", workers=0, processes=Learners(), log=log)


class DiffusersLoop:
    """What diffusers' train_text_to_image.py does per step: noise, squared error, clipping, AdamW as torch makes it, EMAModel.

    Args:
        family: whose weights are copied.
        batch: the latents and captions of every step.
        online: encode pixels and captions in every step, as the script does; else both are taken from memory.
        tuned: torch's fused AdamW, clipping and averages by one call for all tensors, convolutions channels last in fp32 (in bf16 they
            are slower so), and no look at the loss; the script has none of these.
    """

    def __init__(
        self,
        family: LatentDiffusionFamily,
        batch: MomentBatch,
        precision: Precision,
        device: str,
        online: bool = False,
        tuned: bool = False,
    ) -> None:
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.device, self.dtype = device, DTYPE[precision]
        self.tuned = tuned
        self.unet = twin_unet(family).train()
        if tuned and precision == "fp32":
            self.unet.to(memory_format=torch.channels_last)
        self.scheduler = DDPMScheduler.from_config(family.process.scheduler_config(), clip_sample=False)
        self.optimizer: Any = torch.optim.AdamW(self.unet.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, fused=tuned)
        self.ema: Any = EMAModel(self.unet.parameters(), decay=DECAY, foreach=tuned)
        self.latents = batch.mean.to(device)
        self.states = family.text.encode(list(batch.caption)).tokens
        self.vae = None
        if online:
            self.vae = twin_autoencoder(family.codec.network).eval().requires_grad_(False).to(self.dtype)  # type: ignore[arg-type]
            self.text = family.text.model
            self.ids = family.text.tokens(list(batch.caption))[0].to(device)
            side = batch.mean.shape[-1] * family.factor
            self.pixels = torch.rand(len(batch.mean), 3, side, side, device=device).mul_(2).sub_(1)

    def loss(self, noise: Tensor | None = None, t: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        """The squared error of the predicted noise, of what is drawn here unless it is given."""
        states = self.states
        if self.vae is not None and latents is None:
            with torch.no_grad():
                latents = self.vae.encode(self.pixels.to(self.dtype)).latent_dist.sample().float() * self.vae.config.scaling_factor
        elif latents is None:
            latents = self.latents
        if self.vae is not None:
            with torch.no_grad(), torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                states = self.text(self.ids).last_hidden_state
        noise = torch.randn_like(latents) if noise is None else noise
        if t is None:
            t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(latents),), device=self.device).long()
        noisy = self.scheduler.add_noise(latents, noise, t)
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.unet(noisy, t, states, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise.float(), reduction="mean")

    def step(self) -> float:
        """One update, with the two looks at the loss that the script takes."""
        loss = self.loss()
        seen = 0.0 if self.tuned else loss.detach().repeat(len(self.latents)).mean().item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0, foreach=self.tuned or None)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return seen if self.tuned else seen + loss.detach().item()

    def release(self) -> None:
        """Let go of everything, where nothing is timed."""
        del self.unet, self.optimizer, self.ema
        self.vae = None


UPDATES = 10  # compared; EMAModel's first update forgets the start altogether, ours keeps a tenth


def optimiser_and_ema(setup: Setup) -> Iterator[Case]:
    """B14."""
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    network = small(setup.tiny).unet.build()
    ours = list(network.parameters())
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a) * 1e-3
        b.grad = a.grad.clone()
    # Weight decay of biases and norms differs by choice, by less than the tolerance; the check is for the arithmetic.
    optimizers = optim.build(AdamW(lr=LR), [ParameterGroup("model", ours)])
    average = Ema(ours, DECAY)
    peer = torch.optim.AdamW(theirs, lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    their_average = EMAModel(theirs, decay=DECAY)
    average.updates = their_average.optimization_step = 9

    def our_side() -> None:
        for optimizer in optimizers:
            optimizer.step()
        average.update()

    def their_side() -> None:
        peer.step()
        their_average.step(theirs)

    def check() -> float:
        for _ in range(UPDATES):
            our_side()
            their_side()
        weights = distance([p.detach() for p in ours], [p.detach() for p in theirs])
        return max(weights, distance(average.averages, their_average.shadow_params))

    parameters = sum(p.numel() for p in ours)
    yield Case(
        name=f"{parameters / 1e6:.1f} M parameters, fp32",
        kind="equal",
        ours=our_side,
        theirs=their_side,
        check=check,
        tolerance=1e-4,
        error=f"relative error of weights and averages after {UPDATES} updates",
        unit="update",
        notes={"parameters": parameters, "tensors": len(ours)},
    )
