"""Noise schedules: which alpha and sigma belong to which t, and how diffusers' scheduler_config.json names them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.foreign import short, typed
from ldm.config.schema import PositiveFloat, Steps, config

DISTILLED = "LCMScheduler"  # diffusers' class for models that were distilled for few steps
FLOW_STEPS = 1000  # a flow's sigma in [0,1] is told to the network as t = 1000 sigma, as diffusers does


class Discrete(ABC):
    """The mathematics shared by the schedules that are tables of `steps` noise levels with alpha^2 + sigma^2 = 1.

    t counts table rows from 0 (nearly clean) to steps - 1; between rows alpha and sigma follow the chord, drawn back to
    the unit circle, which is smooth, can be inverted in closed form and stays finite where alpha is 0.
    """

    __slots__ = ()
    steps: int
    zero_terminal_snr: bool

    @abstractmethod
    def betas(self) -> np.ndarray:
        """beta (steps,): the share of variance that each step replaces by noise."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma of t, same shape, float64."""
        alpha, sigma = _table(self, t.device)
        t = t.to(alpha.dtype).clamp(0, self.steps - 1)
        low = t.floor().long().clamp(max=max(self.steps - 2, 0))
        high = (low + 1).clamp(max=self.steps - 1)
        part = t - low
        a = alpha[low] * (1 - part) + alpha[high] * part
        s = sigma[low] * (1 - part) + sigma[high] * part
        norm = torch.hypot(a, s)
        return a / norm, s / norm

    def draw(self, u: Tensor) -> Tensor:
        """t of u in [0,1): every table row has the same share."""
        return (u * self.steps).floor().clamp(max=self.steps - 1)

    def nearest(self, row: np.ndarray) -> np.ndarray:
        """Rows that exist: whole numbers, because the network has seen no others."""
        return np.round(row)

    def time(self, row: np.ndarray) -> np.ndarray:
        """t of table rows: the rows themselves."""
        return row

    def time_at(self, ratio: np.ndarray) -> np.ndarray:
        """t (fractional) where sigma/alpha is `ratio`; the inverse of `alpha_sigma`."""
        alpha, sigma = (v.numpy() for v in _table(self, torch.device("cpu")))
        with np.errstate(divide="ignore"):
            low = np.searchsorted(sigma / alpha, ratio, side="right") - 1
        low = low.clip(0, max(self.steps - 2, 0))
        high = np.minimum(low + 1, self.steps - 1)
        slope = (sigma[high] - sigma[low]) - ratio * (alpha[high] - alpha[low])
        return (low + (ratio * alpha[low] - sigma[low]) / slope).clip(0, self.steps - 1)


@config
class Linear(Discrete):
    """beta rises linearly (Ho 2020, arXiv 2006.11239)."""

    kind: Literal["linear"] = "linear"
    steps: Steps = 1000  # noise levels
    beta_start: PositiveFloat = 1e-4  # variance replaced by noise in the first step
    beta_end: PositiveFloat = 0.02  # ... and in the last
    zero_terminal_snr: bool = False  # rescale so that the last step is pure noise (Lin 2023, arXiv 2305.08891)

    def __post_init__(self) -> None:
        _check_betas(self.beta_start, self.beta_end)

    def betas(self) -> np.ndarray:
        """beta (steps,)."""
        return np.linspace(self.beta_start, self.beta_end, self.steps)


@config
class ScaledLinear(Discrete):
    """The root of beta rises linearly: latent and Stable Diffusion (CompVis call it "linear")."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    steps: Steps = 1000  # noise levels
    beta_start: PositiveFloat = 0.00085  # variance replaced by noise in the first step
    beta_end: PositiveFloat = 0.012  # ... and in the last
    zero_terminal_snr: bool = False  # rescale so that the last step is pure noise (Lin 2023, arXiv 2305.08891)

    def __post_init__(self) -> None:
        _check_betas(self.beta_start, self.beta_end)

    def betas(self) -> np.ndarray:
        """beta (steps,)."""
        return np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps) ** 2


@config
class Cosine(Discrete):
    """alpha^2 follows a squared cosine, beta at most 0.999 (Nichol 2021, arXiv 2102.09672)."""

    kind: Literal["cosine"] = "cosine"
    steps: Steps = 1000  # noise levels
    zero_terminal_snr: bool = False  # rescale so that the last step is pure noise (Lin 2023, arXiv 2305.08891)

    def betas(self) -> np.ndarray:
        """beta (steps,)."""
        alpha_bar = np.cos((np.arange(self.steps + 1) / self.steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


@config
class Flow:
    """The straight path x = (1 - sigma) x0 + sigma eps with t = 1000 sigma (rectified flow, arXiv 2209.03003)."""

    kind: Literal["flow"] = "flow"
    shift: PositiveFloat = 1.0  # more than 1: noisier t in training and sampling (Esser 2024, arXiv 2403.03206, eq. 23)

    @property
    def steps(self) -> int:
        """Noise levels that a sampling grid may have."""
        return FLOW_STEPS

    @property
    def zero_terminal_snr(self) -> bool:
        """The path ends in pure noise."""
        return True

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma of t, same shape, float64."""
        sigma = (t.to(precise(t.device)) / FLOW_STEPS).clamp(0, 1)
        return 1 - sigma, sigma

    def draw(self, u: Tensor) -> Tensor:
        """t of u in [0,1), shifted."""
        return FLOW_STEPS * self.shift * u / (1 + (self.shift - 1) * u)

    def nearest(self, row: np.ndarray) -> np.ndarray:
        """Rows that exist: any, because t is continuous."""
        return row

    def time(self, row: np.ndarray) -> np.ndarray:
        """t of rows 0 (nearly clean) to 999 (pure noise), shifted."""
        u = (row + 1) / FLOW_STEPS
        return FLOW_STEPS * self.shift * u / (1 + (self.shift - 1) * u)

    def time_at(self, ratio: np.ndarray) -> np.ndarray:
        """t where sigma/alpha is `ratio`."""
        return FLOW_STEPS * ratio / (1 + ratio)


def _check_betas(start: float, end: float) -> None:
    if not start <= end < 1:
        raise UserError(f"beta_start and beta_end: got {start} and {end}; wanted beta_start <= beta_end < 1")


def precise(device: torch.device) -> torch.dtype:
    """The finest floating point of a device: float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


@lru_cache(maxsize=32)
def _table(schedule: Linear | ScaledLinear | Cosine, device: torch.device) -> tuple[Tensor, Tensor]:
    """alpha and sigma (steps,) of a schedule on a device; computed once, in float64."""
    alpha = np.sqrt(np.cumprod(1 - schedule.betas()))
    if schedule.zero_terminal_snr and schedule.steps > 1:
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))  # Lin 2023, algorithm 1
    sigma = np.sqrt(1 - alpha**2)
    dtype = precise(device)
    return torch.from_numpy(alpha).to(device, dtype), torch.from_numpy(sigma).to(device, dtype)


# diffusers' names

_BETA_SCHEDULE = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
_LATENT_BETAS = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")


def to_scheduler_config(schedule: Linear | ScaledLinear | Cosine | Flow, target: str, distilled: bool = False) -> dict[str, Any]:
    """A scheduler_config.json with which StableDiffusionPipeline samples a model of this schedule and target.

    DDIM for the discrete schedules, or LCM where the model was `distilled` for few steps; UniPC on flow sigmas for the flow, because
    FlowMatchEulerDiscreteScheduler lacks the scale_model_input and init_noise_sigma that this pipeline calls.
    """
    if isinstance(schedule, Flow):
        return {
            "_class_name": "UniPCMultistepScheduler",
            "num_train_timesteps": FLOW_STEPS,
            "use_flow_sigmas": True,
            "flow_shift": schedule.shift,
            "prediction_type": _PREDICTION[target],
        }
    betas = {} if isinstance(schedule, Cosine) else {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return {
        "_class_name": DISTILLED if distilled else "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_schedule": _BETA_SCHEDULE[schedule.kind],
        **betas,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "prediction_type": _PREDICTION[target],
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # read by "leading" only, where the pipeline insists on it
        "set_alpha_to_one": True,  # the clean end is clean
        "clip_sample": False,  # latents have no range
    }


def from_scheduler_config(
    values: Mapping[str, Any], where: str = "scheduler_config.json"
) -> tuple[Linear | ScaledLinear | Cosine | Flow, str]:
    """The schedule and target of a scheduler_config.json of any diffusers class; absent fields mean its defaults.

    Fields that only say how to sample (spacing, clipping, solver) are left to the sampler.

    Raises:
        UserError: naming the field that says something no schedule here can.
    """
    name = str(values.get("_class_name", ""))
    matching = name.startswith("FlowMatch")
    if values.get("trained_betas") is not None:
        raise UserError(f"{where}: trained_betas is not supported; only named schedules are")
    if values.get("use_dynamic_shifting"):
        raise UserError(f"{where}: use_dynamic_shifting=true is not supported; give one shift")
    if name.startswith(("EDM", "CosineDPM", "VQDiffusion", "ScoreSde", "KarrasVe")):
        raise UserError(f"{where}: _class_name {name} is not supported; its schedule has no like here")
    said = values.get("prediction_type")
    said = said if said not in (None, "") else ("flow_prediction" if matching else "epsilon")
    targets = {theirs: ours for ours, theirs in _PREDICTION.items()}
    if not isinstance(said, str) or said not in targets:
        known = ", ".join(targets)
        raise UserError(f"{where}: prediction_type {short(said)} is not supported; known: {known}")
    target = targets[said]
    if matching or values.get("use_flow_sigmas"):
        shift = values.get("shift", 1.0) if matching else values.get("flow_shift", 1.0)
        return typed({"shift": shift}, Flow, where, {} if matching else {"shift": "flow_shift"}), target
    kind = values.get("beta_schedule", "linear")
    steps, zero = values.get("num_train_timesteps", 1000), values.get("rescale_betas_zero_snr") or False
    names = {"steps": "num_train_timesteps", "zero_terminal_snr": "rescale_betas_zero_snr"}
    if kind == "squaredcos_cap_v2":
        return typed({"steps": steps, "zero_terminal_snr": zero}, Cosine, where, names), target
    if kind not in ("linear", "scaled_linear"):
        known = ", ".join(_BETA_SCHEDULE.values())
        raise UserError(f"{where}: beta_schedule {short(kind)} is not supported; known: {known}")
    start, end = (0.00085, 0.012) if name in _LATENT_BETAS else (1e-4, 0.02)
    made: type[Linear] | type[ScaledLinear] = Linear if kind == "linear" else ScaledLinear
    betas = {"beta_start": values.get("beta_start", start), "beta_end": values.get("beta_end", end)}
    return typed({"steps": steps, "zero_terminal_snr": zero, **betas}, made, where, names), target
