"""Learned variance of the reverse steps (Nichol 2021, arXiv 2102.09672, IDDPM; ADM, Imagen): the network says, value by value, how much
noise a step adds, between the posterior's variance and that of the step forward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ldm.config.schema import NonNegative, config
from ldm.diffusion.process import Process
from ldm.diffusion.schedules import Flow


@config
class LearnedVariance:
    """The hybrid loss: squared error, which the mean learns from, and the variational bound, which the variance learns from (eq. 16)."""

    weight: NonNegative = 1e-3  # lambda, of the bound summed over all steps, in bits per value


def refusal(process: Process) -> str:
    """Why a process has no variance to learn; empty where it has."""
    return "a flow has no steps with a variance; choose another process.schedule, or leave variance out" if flows(process) else ""


def flows(process: Process) -> bool:
    """Whether its path has no table of steps."""
    return isinstance(process.schedule, Flow)


def share_of(said: Tensor) -> Tensor:
    """How far the variance is, in its logarithm, on the way from the posterior's (0) to the step's (1), of what a network says."""
    return (said + 1) / 2


def variational(process: Process, x0: Tensor, x0_said: Tensor, t: Tensor, share: Tensor, half_bin: float | None) -> Tensor:
    """The bound's term of each sample (B,), in nats per value: KL of the posterior from the network's step (IDDPM, eq. 5 and 6).

    Args:
        x0: (B, ...) the data.
        x0_said: (B, ...) what the network takes it to be; gradients stop here, the squared error teaches it.
        t: (B,) rows of the schedule.
        share: (B, ...) as `share_of` gives it.
        half_bin: half the distance of two values that the data may have, for the last step's likelihood; None: that step does not count.
    """
    x0_said = x0_said.detach()
    first = t < 0.5

    def shaped(value: Tensor) -> Tensor:
        return value.float().view(-1, *[1] * (x0.dim() - 1))

    def log_variances(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the posterior and of the step forward from row t, and the posterior mean's weight of x0."""
        (a, s), (a_next, s_next) = process.alpha_sigma(t), process.alpha_sigma((t - 1).clamp(min=0))
        beta = 1 - (a / a_next) ** 2
        posterior = beta * (s_next / s) ** 2
        return posterior.log(), beta.log(), a_next * beta / s**2

    low, high, weight = log_variances(torch.where(first, torch.ones_like(t), t))
    # The last step forward has no posterior variance; the one before lends it, as in the paper's code.
    high = torch.where(first, 2 * process.alpha_sigma(t)[1].log(), high)
    low, high, weight = shaped(low), shaped(high), shaped(weight)
    said = share * high + (1 - share) * low
    miss = x0 - x0_said
    kl = 0.5 * (said - low - 1 + (low - said).exp() + (weight * miss).square() * (-said).exp())
    last = torch.zeros_like(kl) if half_bin is None else -_log_likelihood(miss, said, x0, half_bin)
    return torch.where(shaped(first) > 0, last, kl).flatten(1).mean(1)


def _log_likelihood(miss: Tensor, log_variance: Tensor, x0: Tensor, half_bin: float) -> Tensor:
    """Of a value's bin under a Gaussian; the outermost bins reach to infinity (Ho 2020, eq. 13)."""
    inverse = (-0.5 * log_variance).exp()
    above = torch.special.ndtr((miss + half_bin) * inverse)
    below = torch.special.ndtr((miss - half_bin) * inverse)
    edge = 255 * half_bin  # the outermost value
    mass = torch.where(x0 < -edge + half_bin, above, torch.where(x0 > edge - half_bin, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def bits(process: Process, weight: float) -> float:
    """What a term of the bound counts in the hybrid loss: lambda times the number of steps, in bits."""
    return weight * process.schedule.steps / math.log(2)
