"""Latent consistency distillation: a base model's guided steps, learned by one that draws in a few (Luo 2023, arXiv 2310.04378)."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import NonNegative, Positive, PositiveFloat, config
from ldm.diffusion.batch import Cond, LatentBatch, cat, sent
from ldm.diffusion.process import LCM_LEVELS, Process
from ldm.diffusion.rng import Rng
from ldm.families.latent_diffusion.engine import Defaults
from ldm.formats.latent_codec import full
from ldm.models.denoiser import Denoiser, Network

SAMPLER, STEPS = "lcm", 4  # that a distilled model is made for


@config
class Consistency:
    """Distillation of the base model: from any noise level the network learns to say where the base's guided steps end.

    Its target is its own answer one level further on, to which a DDIM step of the frozen base leads.
    """

    guidance: tuple[NonNegative, NonNegative] = (1.0, 8.0)  # of the base's steps, drawn between the two; equal: the network is not told it
    skip: Positive = 1  # levels, of 50, that a step of the base leads further; the more, the sooner the clean end is known at the noisy one
    channels: Positive = 256  # width of the waves by which the network is told the scale
    huber: PositiveFloat = 1e-3  # where the loss turns from squared to absolute errors

    def __post_init__(self) -> None:
        low, high = self.guidance
        if low > high:
            raise UserError(f"guidance: got {list(self.guidance)}; the lower scale comes first")
        if self.told and self.channels % 2:
            raise UserError(f"channels: got {self.channels}; sines and cosines need an even number")

    @property
    def told(self) -> bool:
        """Whether the network is told the scale, and so draws with any of them."""
        return self.guidance[0] < self.guidance[1]

    def drawn(self) -> Defaults:
        """How the finished model is sampled: in four steps, without a second call for guidance."""
        low, high = self.guidance
        return Defaults(steps=STEPS, guidance=(low + high) / 2 if self.told else 1.0, sampler=SAMPLER)

    def told_by(self, network: Denoiser) -> Denoiser:
        """The same function by a network that can be told the scale.

        Raises:
            UserError: for a kind of network that cannot be.
        """
        return network.told_guidance(self.channels) if self.told and not network.config.reads_guidance else network

    def suits(self, network: Network) -> None:
        """Refuse a base that was distilled to be told the scale, where this is not to be.

        Raises:
            UserError: naming the fix.
        """
        if network.reads_guidance:
            raise UserError("models.diffusion.distill: the base model is distilled already; begin from the one that it was made of")


def errors(
    asked: Consistency, student: Denoiser, teacher: Denoiser, process: Process, latents: LatentBatch, unprompted: Cond, rng: Rng
) -> Tensor:
    """The pseudo-Huber distance (B,) of the student's answers one level apart (eq. 12 and 13, algorithm 1).

    Levels are those of the `lcm` spacing, and the step between them is DDIM's, by x0 = x0_uncond + scale (x0_cond - x0_uncond) of
    the teacher. Neither the teacher nor the target learns. The boundary condition's share of x, less than 1e-5 at all levels but the
    clean end, is left out, as in `ldm.diffusion.samplers.lcm`.

    Args:
        latents: x0 (B,c,h,w) with their prompts.
        unprompted: the same without prompts.
    """
    grid = process.grid(min(LCM_LEVELS, process.schedule.steps), SAMPLER)
    x0 = latents.x0
    place = x0.device
    alpha, sigma = (sent(values.float(), place) for values in (grid.alpha, grid.sigma))
    i = sent((rng.uniform("t") * len(grid.t)).long().clamp(max=len(grid.t) - 1), place)
    times = sent(grid.t, place)
    j = (i + asked.skip).clamp(max=len(times))  # where the base's step leads
    t, ahead = times[i], times[j.clamp(max=len(times) - 1)]
    noised = process.noise_at(x0, t, rng)
    low, high = asked.guidance
    scale = sent(low + (high - low) * rng.uniform("guidance").float(), place)
    cond = Cond(text=latents.cond.text, size=latents.cond.size, guidance=scale if asked.told else None)

    def row(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        return process.x0_from(full(student(x, t, cond)), x, t)

    with torch.no_grad():
        both, plain = torch.cat([t, t]), Cond(text=latents.cond.text, size=latents.cond.size)
        x = torch.cat([noised.x, noised.x])
        without, told = process.x0_from(full(teacher(x, both, cat([unprompted, plain]))), x, both).chunk(2)
        guided = without + row(scale) * (told - without)
        eps = (noised.x - row(alpha[i]) * guided) / row(sigma[i])
        further = row(alpha[j]) * guided + row(sigma[j]) * eps
        clean = row(j == len(times))
        target = torch.where(clean, guided, answer(further, ahead))
    difference = (answer(noised.x, t) - target).square()
    return ((difference + asked.huber**2).sqrt() - asked.huber).mean((1, 2, 3))
