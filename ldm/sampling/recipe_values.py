"""Names and bounds of a recipe's values, for all that reads them: options, axes, our recipes and other programs'."""

from __future__ import annotations

from typing import Any

from ldm.config.options import bounds
from ldm.families.draws import Wanted

NAMES = {  # our samplers under the names that other programs know
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
SCHEDULES = {"karras": "Karras", "exponential": "Exponential"}  # and of spacings
SPACINGS = ("trailing", "leading", "linspace", *SCHEDULES, "lcm")
MAX_SEED = 2**53  # as far as every reader of JSON counts exactly
MAX_SIDE = 8192  # px
LIMITS: dict[str, tuple[float, float]] = bounds(Wanted) | {  # of a recipe's numbers, both allowed
    "guidance_from": (0, 1),
    "guidance_to": (0, 1),
    "seed": (0, MAX_SEED),
    "variation_seed": (0, 2 * MAX_SEED),
    "variation": (0, 1),
    "share": (0, 1),
    "width": (1, MAX_SIDE),
    "height": (1, MAX_SIDE),
    "strength": (0, 1),
    "cross_replace": (0, 1),
    "self_replace": (0, 1),
    "hires": (1, 8),
    "hires_strength": (0, 1),
    "classifier_scale": (0, 1000),
}
WHOLE = ("steps", "seed", "variation_seed", "width", "height", "clip_skip", "top_k", "stop_after")


def number_of(name: str, said: Any) -> int | float | None:
    """The value of a recipe's number; None where it is none or out of bounds."""
    low, high = LIMITS[name]
    try:
        value = int(said) if name in WHOLE and not isinstance(said, float) else float(said)
    except (TypeError, ValueError, OverflowError):
        return None
    if isinstance(said, bool) or not low <= value <= high or (name in WHOLE and value != int(value)):
        return None
    return int(value) if name in WHOLE else float(value)
