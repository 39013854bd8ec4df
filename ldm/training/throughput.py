"""Throughput, MFU and time left: FLOPs of stages against the peak of devices."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ldm.config.errors import UserError

# Dense peaks in TFLOP/s of bfloat16 or float16 (of matrix units, sums in float32) and of float32 without TF32, and memory in GB,
# by makers' data sheets; names as torch.cuda.get_device_name gives them, the more special ones first. Of GeForce cards float32 is
# 2 x cores x boost clock, and half types with float32 sums twice that, as NVIDIA's white papers of GA102, AD102 and GB202 have it.
PEAKS: tuple[tuple[str, float, float, float], ...] = (
    (r"B200", 2250, 75, 180),
    (r"H200", 989, 67, 141),
    (r"H100 PCIe", 756, 51, 80),
    (r"H100 NVL", 835, 60, 94),
    (r"H100|GH200", 989, 67, 80),
    (r"A100.40GB|A100 40GB", 312, 19.5, 40),
    (r"A100", 312, 19.5, 80),
    (r"L40S", 362, 91.6, 48),
    (r"L40", 181, 90.5, 48),
    (r"L4", 121, 30.3, 24),
    (r"A10G?", 125, 31.2, 24),
    (r"A40", 150, 37.4, 48),
    (r"RTX 5090", 209.5, 104.8, 32),
    (r"RTX 5080", 112.6, 56.3, 16),
    (r"RTX 5070 Ti", 87.9, 43.9, 16),
    (r"RTX 5070", 61.7, 30.9, 12),
    (r"RTX 4090", 165, 82.6, 24),
    (r"RTX 4080", 97.5, 48.7, 16),
    (r"RTX 4070 Ti SUPER", 88.2, 44.1, 16),
    (r"RTX 4070 Ti", 80.2, 40.1, 12),
    (r"RTX 4070 SUPER", 71, 35.5, 12),
    (r"RTX 4070", 58.3, 29.1, 12),
    (r"RTX 4060 Ti", 44.1, 22.1, 8),
    (r"RTX 4060", 30.2, 15.1, 8),
    (r"RTX 3090", 71, 35.6, 24),
    (r"RTX 3080", 59.5, 29.8, 10),
    (r"RTX 3070", 40.6, 20.3, 8),
    (r"RTX 3060 Ti", 32.4, 16.2, 8),
    (r"RTX 3060", 25.5, 12.7, 12),
    (r"V100.32GB|V100 32GB", 125, 15.7, 32),
    (r"V100", 125, 15.7, 16),
    (r"T4", 65, 8.1, 16),
)


@dataclass(frozen=True)
class Card:
    """A graphics card by its maker's data sheet."""

    name: str
    half: float  # FLOP/s in bf16 or fp16
    single: float  # FLOP/s in fp32
    memory: float  # bytes

    def peak(self, precision: str) -> float:
        """FLOP/s in `fp32`, `bf16` or `fp16`."""
        return self.single if precision == "fp32" else self.half


@dataclass(frozen=True)
class Expected:
    """What one stage will do."""

    images: int
    flops: float  # of an image, backward pass and frozen parts included; 0: not known
    peak: float = 0.0  # FLOP/s of all devices in the stage's precision; 0: not known


def peak(device: str, precision: str) -> float:
    """FLOP/s of a device in `fp32`, `bf16` or `fp16`; 0 for one that is not in the table."""
    found = _card(device, device)
    return 0.0 if found is None else found.peak(precision)


def card(name: str) -> Card:
    """The card that someone calls so, in any case and with or without what its maker adds: h200, "RTX 4090", a100-40gb.

    Raises:
        UserError: for one that is not in the table.
    """
    said = re.sub(r"[\s_-]+", " ", name.upper()).strip()
    said = re.sub(r"^(NVIDIA |GEFORCE |TESLA )+", "", said)
    said = re.sub(r"(?<=\d) ?(TI|SUPER)\b", r" \1", said)
    found = _card(f"RTX {said}" if re.match(r"[345]0\d0\b", said) else said, name)
    if found is None:
        known = ", ".join(pattern.split("|")[-1].replace("?", "") for pattern, *_ in PEAKS)
        raise UserError(f"device: got {name!r}; known are {known}; of others say --peak, or --tflops")
    return found


def _card(device: str, name: str) -> Card | None:
    if re.search(r"\blaptop\b", device, re.IGNORECASE):  # other chips, under the same names
        return None
    for pattern, half, single, memory in PEAKS:
        if re.search(rf"\b({pattern})\b", device, re.IGNORECASE):
            return Card(name, 1e12 * half, 1e12 * single, 1e9 * memory)
    return None


def seconds_after(stage: str, images_per_s: float, expected: dict[str, Expected]) -> float:
    """How long the stages after this one take if they make as many FLOPs a second as this one does; 0: not known, or none."""
    here = expected.get(stage)
    if here is None or not here.flops or images_per_s <= 0:
        return 0.0
    later = list(expected)[list(expected).index(stage) + 1 :]
    return sum(expected[name].images * expected[name].flops for name in later) / (images_per_s * here.flops)
