"""Diffusion process, how data becomes noise and what the network must say about it: x = alpha(t) x0 + sigma(t) eps, and its inverses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, NonNegative, PositiveFloat, config
from ldm.diffusion.batch import Noised, sent
from ldm.diffusion.rng import Rng
from ldm.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear, from_scheduler_config, to_scheduler_config

Schedule = Annotated[Linear | ScaledLinear | Cosine | Flow, BY_KIND]
Target = Literal["epsilon", "v", "x0", "flow"]
SPACINGS = ("trailing", "leading", "linspace", "karras", "exponential", "lcm")
LCM_LEVELS = 50  # that latent consistency models are distilled on
PURE_NOISE = 80.0  # sigma/alpha beyond which x is noise for every purpose (EDM's sigma_max, arXiv 2206.00364)

# Weights and densities: which t matter, and how often they are drawn


@config
class UniformWeight:
    """Every t counts alike, in the units of the target."""

    kind: Literal["uniform"] = "uniform"


@config
class MinSnr:
    """Squared error of x0 weighted by min(snr, gamma), told in the units of the target (Hang 2023, arXiv 2303.09556).

    epsilon: min(snr, gamma) / snr; v: min(snr, gamma) / (snr + 1); x0: min(snr, gamma).
    """

    kind: Literal["min_snr"] = "min_snr"
    gamma: PositiveFloat = 5.0  # the signal-to-noise ratio above which cleaner images count no more


Weighting = Annotated[UniformWeight | MinSnr, BY_KIND]


@config
class UniformTime:
    """Every t is drawn alike."""

    kind: Literal["uniform"] = "uniform"

    def warp(self, u: Tensor) -> Tensor:
        """u of this density from uniform u in [0,1)."""
        return u


@config
class LogitNormal:
    """The logit of t is normal: middling t come most (Esser 2024, arXiv 2403.03206, eq. 19)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0  # more than 0: noisier
    std: PositiveFloat = 1.0  # spread of the logit

    def warp(self, u: Tensor) -> Tensor:
        """u of this density from uniform u in [0,1)."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u)).clamp(max=1 - 1e-9)


@config
class Power:
    """Noisy t come more often: density (power + 1) u^power."""

    kind: Literal["power"] = "power"
    power: NonNegative = 1.0  # 0: uniform

    def warp(self, u: Tensor) -> Tensor:
        """u of this density from uniform u in [0,1)."""
        return u ** (1 / (self.power + 1))


Density = Annotated[UniformTime | LogitNormal | Power, BY_KIND]


# Targets: every one is linear in (x0, eps), so every inverse is linear in (x, output)


def target_of(target: Target, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with target = p x0 + q eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    pairs = {"epsilon": (zero, one), "v": (-sigma, alpha), "x0": (one, zero), "flow": (-one, one)}
    return pairs[target]


def x0_of(target: Target, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with x0 = p x + q output; infinite where the target says nothing about x0 (epsilon at alpha = 0)."""
    p, q = target_of(target, alpha, sigma)
    if target == "x0":
        return q, p  # by Cramer's rule too, but that divides 0 by 0 at sigma = 0
    determinant = alpha * q - sigma * p
    return q / determinant, -sigma / determinant


def eps_of(target: Target, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) with eps = p x + q output; infinite where the target says nothing about eps (x0 at sigma = 0)."""
    p, q = target_of(target, alpha, sigma)
    determinant = alpha * q - sigma * p
    return -p / determinant, alpha / determinant


@dataclass(frozen=True, slots=True)
class Grid:
    """The noise levels that a sampler visits, from noisy to clean."""

    t: Tensor  # (n,) float32, the time the network is told
    alpha: Tensor  # (n+1,) float64 on the CPU, last entry 1
    sigma: Tensor  # (n+1,) float64 on the CPU, last entry 0


@config
class Process:
    """How data becomes noise, what the network predicts and which t matter."""

    schedule: Schedule = ScaledLinear()  # alpha(t) and sigma(t)
    target: Target = "epsilon"  # what the network predicts; v: alpha eps - sigma x0, flow: eps - x0
    weighting: Weighting = UniformWeight()  # weight of a sample's squared error
    density: Density = UniformTime()  # how often each t is drawn in training
    offset_noise: NonNegative | None = None  # share of noise that is equal all over a channel (about 0.05); null: the base model's, else 0

    def __post_init__(self) -> None:
        flow = isinstance(self.schedule, Flow)
        if flow and self.target not in ("flow", "x0"):
            raise UserError(f"target: got {self.target!r} with schedule.kind=flow; that path needs target=flow or x0")
        if not flow and self.target == "flow":
            raise UserError("target: got 'flow' with a discrete schedule; set schedule.kind=flow, or target=v")
        if self.schedule.zero_terminal_snr and self.target == "epsilon":
            raise UserError(
                "target: got 'epsilon' with schedule.zero_terminal_snr=true; the last step is pure noise, from "
                "which epsilon cannot tell x0; set target=v (or x0), or zero_terminal_snr=false"
            )

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma (B,) of t (B,), float64."""
        return self.schedule.alpha_sigma(t)

    def noise(self, x0: Tensor, rng: Rng) -> Noised:
        """Noised data with their targets and weights; t and eps are drawn for each sample by its address.

        With `offset_noise` s, eps is N(0, 1) for every value plus s N(0, 1) for every channel, so that the model learns to move
        a whole picture's brightness (Guttenberg 2023, "Diffusion with Offset Noise").

        Args:
            x0: (B, ...) of unit variance.
        """
        return self.noise_at(x0, self.schedule.draw(self.density.warp(rng.uniform("t"))), rng)

    def noise_at(self, x0: Tensor, t: Tensor, rng: Rng) -> Noised:
        """As `noise`, at the given t (B,)."""
        t = sent(t.to(torch.float32), x0.device)
        eps = sent(rng.normal("eps", x0.shape[1:]), x0.device).to(x0)
        if self.offset_noise:
            whole = sent(rng.normal("offset", x0.shape[1:2]), x0.device).to(x0)
            eps = eps + self.offset_noise * whole.view(*whole.shape, *[1] * (x0.dim() - 2))
        alpha, sigma = self.alpha_sigma(t)
        x = _mix(alpha, x0, sigma, eps)
        p, q = target_of(self.target, alpha, sigma)
        return Noised(x=x, t=t, target=_mix(p, x0, q, eps), weight=self.weight(t).float())

    def weight(self, t: Tensor) -> Tensor:
        """The weight (B,) of the squared error of the target at t (B,), float64."""
        alpha, sigma = self.alpha_sigma(t)
        if isinstance(self.weighting, UniformWeight):
            return torch.ones_like(alpha)
        snr = (alpha / sigma) ** 2  # infinite at sigma = 0, which min() takes
        if self.target == "epsilon":
            return (self.weighting.gamma / snr).clamp(max=1)  # min(snr, gamma) / snr
        _, gain = x0_of(self.target, alpha, sigma)  # an error of the output is this much error of x0
        return snr.clamp(max=self.weighting.gamma) * gain**2

    def x0_from(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean data (B, ...) that the network's output at x (B, ...) and t (B,) says."""
        p, q = x0_of(self.target, *self.alpha_sigma(t))
        return _mix(p, x, q, output)

    def eps_from(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise (B, ...) that the network's output at x (B, ...) and t (B,) says; x0 targets need sigma > 0."""
        p, q = eps_of(self.target, *self.alpha_sigma(t))
        return _mix(p, x, q, output)

    def grid(self, steps: int, spacing: str = "trailing") -> Grid:
        """`steps` noise levels from noisy to clean, and the clean end.

        trailing: from the noisiest on, evenly (Lin 2023, table 2); leading: Stable Diffusion's 1, 21, ..., which stops
        short of the noisiest; linspace: both ends of the table; karras: evenly in (sigma/alpha)^(1/7), t fractional
        (Karras 2022, arXiv 2206.00364, eq. 5). Where the table goes beyond sigma/alpha = 80, Karras' even part begins
        there, after one step from the noisiest t: it would spend half its steps where x is all but pure noise;
        exponential: the same, evenly in log(sigma/alpha); lcm: out of the 50 evenly spaced levels that latent consistency
        models know (Luo 2023, arXiv 2310.04378).

        Raises:
            UserError: on an unknown spacing or more steps than noise levels.
        """
        rows = self.schedule.steps
        if not 1 <= steps <= rows:
            raise UserError(f"steps: got {steps}; this process has 1 to {rows} of them")
        back = np.arange(steps)[::-1].astype(np.float64)
        if spacing == "trailing":
            t = self.schedule.time(self.schedule.nearest((back + 1) * rows / steps) - 1)
        elif spacing == "leading":
            stride = rows // steps
            t = self.schedule.time(back * stride + (1 if (steps - 1) * stride + 1 < rows else 0))
        elif spacing == "linspace":
            t = self.schedule.time(self.schedule.nearest(np.linspace(rows - 1, 0, steps)))
        elif spacing in ("karras", "exponential"):
            t = self._by_ratio(steps, spacing == "exponential")
        elif spacing == "lcm":
            known = min(LCM_LEVELS, rows)
            if steps > known:
                raise UserError(f"steps: got {steps}; lcm's spacing has 1 to {known} of them")
            places = known - np.floor(np.linspace(0, known, steps, endpoint=False))
            t = self.schedule.time(places * (rows // known) - 1)
        else:
            raise UserError(f"spacing: got {spacing!r}; choose one of {', '.join(SPACINGS)}")
        times = torch.from_numpy(np.ascontiguousarray(t)).float()
        alpha, sigma = self.alpha_sigma(times)  # of the rounded float32 t, so that x0_from agrees with the grid
        one = torch.ones(1, dtype=alpha.dtype)
        return Grid(t=times, alpha=torch.cat([alpha, one]), sigma=torch.cat([sigma, 0 * one]))

    def _by_ratio(self, steps: int, exponential: bool) -> np.ndarray:
        ends = self.schedule.time(np.array([self.schedule.steps - 1.0, 0.0]))
        alpha, sigma = self.alpha_sigma(torch.from_numpy(ends))
        top, bottom = (sigma / alpha).tolist()
        beyond = top > PURE_NOISE
        count = steps - beyond
        ramp = np.linspace(0, 1, count) if count > 1 else np.zeros(count)
        top = min(top, PURE_NOISE)
        if exponential:
            ratio = np.exp(np.log(top) * (1 - ramp) + np.log(bottom) * ramp)
        else:
            ratio = (top ** (1 / 7) * (1 - ramp) + bottom ** (1 / 7) * ramp) ** 7
        return np.concatenate([ends[:1], self.schedule.time_at(ratio)] if beyond else [self.schedule.time_at(ratio)])

    def scheduler_config(self, distilled: bool = False) -> dict[str, Any]:
        """What diffusers' scheduler_config.json must say so that its pipelines sample this process, `distilled` for few steps or not."""
        return to_scheduler_config(self.schedule, self.target, distilled)

    @classmethod
    def from_scheduler_config(cls, values: Mapping[str, Any], where: str = "scheduler_config.json") -> Process:
        """The process of a diffusers scheduler_config.json, the file `where`.

        Raises:
            UserError: naming the field that says something no schedule here can.
        """
        schedule, target = from_scheduler_config(values, where)
        return cls(schedule=schedule, target=cast(Target, target))


def _mix(p: Tensor, a: Tensor, q: Tensor, b: Tensor) -> Tensor:
    """p a + q b, the float64 coefficients (B,) rounded once, at least to float32."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    p, q = (c.to(dtype).view(-1, *[1] * (a.dim() - 1)) for c in (p, q))
    return p * a + q * b
