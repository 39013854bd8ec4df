"""Throughput, MFU and time left: FLOPs of stages against the peak of devices."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Dense peaks in TFLOP/s of bfloat16 or float16 (of matrix units, sums in float32) and of float32 without TF32, by makers' data sheets;
# names as torch.cuda.get_device_name gives them, the more special ones first.
PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"B200", 2250, 75),
    (r"H200", 989, 67),
    (r"H100 PCIe", 756, 51),
    (r"H100 NVL", 835, 60),
    (r"H100|GH200", 989, 67),
    (r"A100", 312, 19.5),
    (r"L40S", 362, 91.6),
    (r"L40", 181, 90.5),
    (r"L4", 121, 30.3),
    (r"A10", 125, 31.2),
    (r"A40", 150, 37.4),
    (r"RTX 4090", 165, 82.6),
    (r"RTX 3090", 71, 35.6),
    (r"V100", 125, 15.7),
    (r"T4", 65, 8.1),
)


@dataclass(frozen=True)
class Expected:
    """What one stage will do."""

    images: int
    flops: float  # of an image, backward pass and frozen parts included; 0: not known
    peak: float = 0.0  # FLOP/s of all devices in the stage's precision; 0: not known


def peak(device: str, precision: str) -> float:
    """FLOP/s of a device in `fp32`, `bf16` or `fp16`; 0 for one that is not in the table."""
    for name, half, single in PEAKS:
        if re.search(rf"\b({name})\b", device):
            return 1e12 * (single if precision == "fp32" else half)
    return 0.0


def seconds_after(stage: str, images_per_s: float, expected: dict[str, Expected]) -> float:
    """How long the stages after this one take if they make as many FLOPs a second as this one does; 0: not known, or none."""
    here = expected.get(stage)
    if here is None or not here.flops or images_per_s <= 0:
        return 0.0
    later = list(expected)[list(expected).index(stage) + 1 :]
    return sum(expected[name].images * expected[name].flops for name in later) / (images_per_s * here.flops)
