"""Samplers: plain loops over a grid of noise levels, from pure noise to clean data.

Each is `sampler(denoise, x, alpha, sigma, rng, eta=, after_step=)`:

    denoise     (x, i) -> estimate of x0 from x = alpha[i] x0 + sigma[i] eps, for i in 0 .. n-1
    x           (B, ...) at noise level 0
    alpha       (n+1,), sigma (n+1,): the levels, from noisy to clean; the last is alpha 1, sigma 0
    rng         where the stochastic ones draw their noise, purpose "step{i}", each sample by its own address
    eta         how stochastic ddim is, 0 (not at all) to 1 (as ddpm); the others do not read it
    after_step  (x, i) -> x, called with what a step has reached at level i, 1 .. n; what it returns goes on
                (unipc calls it again with what it corrects)

All take any path: the variance preserving ones, cosine, and the flow; a grid may begin at pure noise (alpha = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ldm.diffusion.batch import sent
from ldm.diffusion.process import PURE_NOISE, Grid
from ldm.diffusion.rng import Rng

Denoise = Callable[[Tensor, int], Tensor]
AfterStep = Callable[[Tensor, int], Tensor] | None


class SamplerFunction(Protocol):
    """The shape of every sampler."""

    def __call__(
        self, denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None
    ) -> Tensor:
        """x at the clean end."""


def ddim(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None) -> Tensor:
    """Denoising diffusion implicit models (Song 2020, arXiv 2010.02502, eq. 12 and 16, for any alpha and sigma)."""
    a, s = alpha.tolist(), sigma.tolist()
    for i in range(len(a) - 1):
        x0 = denoise(x, i)
        shrink = s[i + 1] * a[i] / (s[i] * a[i + 1])
        fresh = eta * s[i + 1] * math.sqrt(max(1 - shrink**2, 0.0))  # eta 1: the deviation of the posterior q(x' | x, x0)
        kept = s[i + 1] * math.sqrt(1 - eta**2 + (eta * shrink) ** 2)  # root of s'^2 - fresh^2, without its cancellation
        x = a[i + 1] * x0 + kept / s[i] * (x - a[i] * x0)
        if fresh > 0:
            x = x + fresh * _noise(rng, i, x)
        x = _reached(after_step, x, i + 1)
    return x


def ddpm(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None) -> Tensor:
    """Ancestral sampling with the posterior's variance (Ho 2020, arXiv 2006.11239, eq. 6 and 7): ddim at eta = 1."""
    return ddim(denoise, x, alpha, sigma, rng, eta=1.0, after_step=after_step)


def ancestral(share: Callable[[], Tensor]) -> SamplerFunction:
    """ddpm with a variance that the network has learned.

    Args:
        share: (B, ...) how far, after `denoise` was called, the variance is on the way from the posterior's to the step's, in the
            logarithm (Nichol 2021, arXiv 2102.09672, eq. 15).
    """

    def run(
        denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None
    ) -> Tensor:
        a, s = alpha.tolist(), sigma.tolist()
        for i in range(len(a) - 1):
            x0 = denoise(x, i)
            shrink = s[i + 1] * a[i] / (s[i] * a[i + 1])
            x = a[i + 1] * x0 + s[i + 1] * shrink / s[i] * (x - a[i] * x0)
            if s[i + 1] > 0:
                least = s[i + 1] * math.sqrt(max(1 - shrink**2, 0.0))  # the posterior's deviation; the step's is s/s' times that
                x = x + least * (s[i] / s[i + 1]) ** share() * _noise(rng, i, x)
            x = _reached(after_step, x, i + 1)
        return x

    return run


def euler(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None) -> Tensor:
    """Euler steps of d(x/alpha) = eps d(sigma/alpha) (Karras 2022, arXiv 2206.00364): written out, ddim at eta = 0.

    On the flow path it is also Euler's step of dx = (eps - x0) d sigma.
    """
    return ddim(denoise, x, alpha, sigma, rng, eta=0.0, after_step=after_step)


def euler_a(
    denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None
) -> Tensor:
    """Euler down to sigma'^2/sigma, then fresh noise up to sigma' (k-diffusion's; sigma in units of alpha).

    The same step as ddpm's, in the form that its users know.
    """
    a, s = alpha.tolist(), sigma.tolist()
    for i in range(len(a) - 1):
        x0 = denoise(x, i)
        shrink = s[i + 1] * a[i] / (s[i] * a[i + 1])  # (sigma'/alpha') / (sigma/alpha), 0 from pure noise
        x = a[i + 1] * x0 + s[i + 1] * shrink / s[i] * (x - a[i] * x0)
        if s[i + 1] > 0:
            x = x + s[i + 1] * math.sqrt(1 - shrink**2) * _noise(rng, i, x)
        x = _reached(after_step, x, i + 1)
    return x


def heun(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None) -> Tensor:
    """Heun's second-order rule for dx = x0 d alpha + eps d sigma (Karras 2022, algorithm 1 without churn).

    One more evaluation per step, at the point that ddim predicts, but none at the clean end: 2n - 1 in all. In the
    coordinates alpha = 1 this is Karras' and diffusers' Heun, on the flow path it is FlowMatchHeun; on a variance
    preserving path the trapezoid lies over alpha as well, so that large sigma/alpha does no harm.
    """
    a, s = alpha.tolist(), sigma.tolist()
    for i in range(len(a) - 1):
        x0 = denoise(x, i)
        eps = (x - a[i] * x0) / s[i]
        guess = a[i + 1] * x0 + s[i + 1] * eps
        if s[i + 1] > 0:
            x0_next = denoise(guess, i + 1)
            eps_next = (guess - a[i + 1] * x0_next) / s[i + 1]
            x = x + (a[i + 1] - a[i]) / 2 * (x0 + x0_next) + (s[i + 1] - s[i]) / 2 * (eps + eps_next)
        else:
            x = guess
        x = _reached(after_step, x, i + 1)
    return x


def plms(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None) -> Tensor:
    """Pseudo linear multistep: ddim with eps from up to four past steps (Liu 2022, arXiv 2202.09778, eq. 9 and 12).

    Its first step is Heun-like and costs one more evaluation, as in latent diffusion and diffusers. From pure noise
    (sigma/alpha > 80) eps says nothing about x0: there it takes a ddim step and begins at the next point.
    """
    a, s = alpha.tolist(), sigma.tolist()
    past: list[Tensor] = []  # eps, newest first
    for i in range(len(a) - 1):
        x0 = denoise(x, i)
        eps = (x - a[i] * x0) / s[i]
        plain = a[i + 1] * x0 + s[i + 1] * eps
        if s[i] > PURE_NOISE * a[i]:
            x = plain
            x = _reached(after_step, x, i + 1)
            continue
        past = [eps, *past[:3]]
        if len(past) == 1 and s[i + 1] > 0:
            again = denoise(plain, i + 1)
            eps = (eps + (plain - a[i + 1] * again) / s[i + 1]) / 2
        elif len(past) == 2:
            eps = (3 * past[0] - past[1]) / 2
        elif len(past) == 3:
            eps = (23 * past[0] - 16 * past[1] + 5 * past[2]) / 12
        elif len(past) == 4:
            eps = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
        x = a[i + 1] / a[i] * (x - s[i] * eps) + s[i + 1] * eps
        x = _reached(after_step, x, i + 1)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None
) -> Tensor:
    """DPM-Solver++(2M): x0 extrapolated linearly in log(alpha/sigma) (Lu 2022, arXiv 2211.01095, algorithm 2)."""
    a, s = alpha.tolist(), sigma.tolist()
    last: Tensor | None = None
    for i in range(len(a) - 1):
        x0 = denoise(x, i)
        ahead = _extrapolate(a, s, i, x0, last)
        x = s[i + 1] / s[i] * x + (a[i + 1] - s[i + 1] * a[i] / s[i]) * ahead
        last = x0
        x = _reached(after_step, x, i + 1)
    return x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form: dpmpp_2m for the diffusion SDE (Lu 2022, arXiv 2211.01095, eq. 18)."""
    a, s = alpha.tolist(), sigma.tolist()
    last: Tensor | None = None
    for i in range(len(a) - 1):
        x0 = denoise(x, i)
        ahead = _extrapolate(a, s, i, x0, last)
        shrink = s[i + 1] * a[i] / (s[i] * a[i + 1])  # exp(-h)
        x = s[i + 1] / s[i] * shrink * x + a[i + 1] * (1 - shrink**2) * ahead
        if s[i + 1] > 0:
            x = x + s[i + 1] * math.sqrt(1 - shrink**2) * _noise(rng, i, x)
        last = x0
        x = _reached(after_step, x, i + 1)
    return x


def unipc(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao 2023, arXiv 2302.04867): dpmpp_2m, each step corrected on arrival.

    The evaluation at the predicted point serves the corrector and the next predictor: n evaluations in all.
    """
    a, s = alpha.tolist(), sigma.tolist()
    n = len(a) - 1
    before = x  # the corrected x of the last step
    x0s: list[Tensor] = []  # estimates of x0, newest first
    for i in range(n):
        x0 = denoise(x, i)
        if i > 0:
            x = _reached(after_step, _correct(a, s, i, before, x0, x0s), i)
        x0s = [x0, *x0s[:1]]
        before = x
        ahead = _extrapolate(a, s, i, x0, x0s[1] if len(x0s) > 1 else None)
        x = s[i + 1] / s[i] * x + (a[i + 1] - s[i + 1] * a[i] / s[i]) * ahead
        x = _reached(after_step, x, i + 1)
    return x


def lcm(denoise: Denoise, x: Tensor, alpha: Tensor, sigma: Tensor, rng: Rng, *, eta: float = 0.0, after_step: AfterStep = None) -> Tensor:
    """Multistep consistency sampling: all the way to x0, then up to the next level with fresh noise (Luo 2023, arXiv 2310.04378,
    algorithm 3).

    The boundary condition's share of x in x0, less than 1e-5 at every level that a distilled model knows, is left out.
    """
    a, s = alpha.tolist(), sigma.tolist()
    for i in range(len(a) - 1):
        x = a[i + 1] * denoise(x, i)
        if s[i + 1] > 0:
            x = x + s[i + 1] * _noise(rng, i, x)
        x = _reached(after_step, x, i + 1)
    return x


def _correct(a: list[float], s: list[float], i: int, x: Tensor, x0: Tensor, past: list[Tensor]) -> Tensor:
    """x at level i from x at level i-1, now that x0 at the predicted point of level i is known (UniC, eq. 9)."""
    h = _log_snr(a, s, i) - _log_snr(a, s, i - 1)
    whole = -math.expm1(-h)  # -B(-h), the weight of x0 over the whole step
    newest = past[0]
    if len(past) == 1:
        mean = (newest + x0) / 2
    else:
        ratio = (_log_snr(a, s, i - 2) - _log_snr(a, s, i - 1)) / h  # negative; -inf after a step from pure noise
        b1 = 1 / whole - 1 / h
        b2 = (1 - 2 * (1 / h - 1 / h**2 * whole)) / whole
        old = (b1 - b2) / (1 - ratio)
        mean = newest + old / ratio * (past[1] - newest) + (b1 - old) * (x0 - newest)
    return s[i] / s[i - 1] * x + a[i] * whole * mean


def _log_snr(a: list[float], s: list[float], i: int) -> float:
    """lambda = log(alpha/sigma), -inf at pure noise and inf at the clean end."""
    if a[i] == 0:
        return -math.inf
    return math.inf if s[i] == 0 else math.log(a[i] / s[i])


def _extrapolate(a: list[float], s: list[float], i: int, x0: Tensor, last: Tensor | None) -> Tensor:
    """x0 half a step ahead in lambda, from its last two estimates; plain x0 on the first and the last step."""
    if last is None or s[i + 1] == 0:
        return x0
    h, h_last = _log_snr(a, s, i + 1) - _log_snr(a, s, i), _log_snr(a, s, i) - _log_snr(a, s, i - 1)
    return x0 + 0.5 * h / h_last * (x0 - last)


def _noise(rng: Rng, i: int, x: Tensor) -> Tensor:
    return sent(rng.normal(f"step{i}", x.shape[1:]), x.device).to(x)


def _reached(after_step: AfterStep, x: Tensor, i: int) -> Tensor:
    return x if after_step is None else after_step(x, i)


@dataclass(frozen=True, slots=True)
class Sampler:
    """A sampler with the spacing it is at home on."""

    run: SamplerFunction
    spacing: str  # of ldm.diffusion.process.SPACINGS, unless the user asks for another
    steps: int | None = None  # that it is made for; None: the model's own number
    stochastic_by_eta: bool = False  # whether it reads eta

    def start(self, noise: Tensor, grid: Grid) -> Tensor:
        """x at the noisiest level from noise (B, ...) of unit variance, as if the unknown x0 were such noise too.

        On a variance preserving path that is the noise itself, wherever the grid begins.
        """
        return noise * math.hypot(float(grid.alpha[0]), float(grid.sigma[0]))


# The higher orders stand on Karras' spacing: on Gaussian data of deviation 0.3 (scaled_linear, 20 steps) dpmpp_2m ends
# 0.006 from the truth there and 0.12 on trailing, which leaves the last, longest step in log(sigma) to one evaluation.
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, "trailing"),
    "ddim": Sampler(ddim, "trailing", stochastic_by_eta=True),
    "plms": Sampler(plms, "trailing"),
    "euler": Sampler(euler, "linspace"),
    "euler_a": Sampler(euler_a, "linspace"),
    "heun": Sampler(heun, "karras"),
    "dpmpp_2m": Sampler(dpmpp_2m, "karras"),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, "karras"),
    "unipc": Sampler(unipc, "karras"),
    "lcm": Sampler(lcm, "lcm", 4),
}
