"""Precision conversion of weights (fp32, fp16, bf16), checked against their float32 source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.config.counts import plural
from ldm.config.errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a written component with its float32 source."""

    part: str
    tensors: int
    bytes: int
    max_error: float  # largest absolute difference of a weight from its source; 0 at the same precision

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.part}: {plural(self.tensors, 'tensor')}, {size_text(self.bytes)}, read back: max abs error {self.max_error:.3g}"


def size_text(count: int) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{max(0, 3 - len(str(int(count // factor))))}f} {unit}"
    return plural(count, "byte")


def stored_bytes(state: Mapping[str, Tensor]) -> int:
    """What tensors take on disk."""
    return sum(value.numel() * value.element_size() for value in state.values())


def mapped(files: Iterable[Path]) -> dict[str, Tensor]:
    """Memory-mapped tensors of safetensors files that only this process knows yet, so that memory need not hold a model twice.

    Raises:
        UserError: if one cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file}: cannot be read back ({error}); nothing was kept, export again") from None
    return state


def rounded(part: str, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of a part in the precision `name`; whole numbers stay what they are.

    Raises:
        UserError: naming the first weight that is not finite, or too large for the precision.
    """
    dtype, found = DTYPES[name], {}
    for key, value in state.items():
        if not value.is_floating_point():
            found[key] = value
            continue
        made = value.to(dtype)
        if not made.isfinite().all():
            if not value.isfinite().all():
                raise UserError(f"{part}: {key} holds values that are not finite; this model is broken, take an earlier one")
            largest, limit = value.abs().max().item(), torch.finfo(dtype).max
            raise UserError(f"{part}: {key} reaches {largest:.6g}, but {name} ends at {limit:.6g}; export it with --dtype bf16 or fp32")
        found[key] = made
    return found


def compared(part: str, source: Mapping[str, Tensor], found: Mapping[str, Tensor], name: str, where: str) -> Comparison:
    """What was read back from disk, after every value was compared with the float32 source.

    Args:
        part: what the weights are of, for messages.
        source: float32 weights.
        found: the same names, in the precision `name`.
        where: the file or folder that was read, for messages.

    Raises:
        UserError: naming the first weight that is missing, left over, of another shape or type, or further from its
            source than rounding to the precision explains.
    """
    largest = 0.0
    if different := source.keys() ^ found.keys():
        raise UserError(f"{where}: {part}: {min(different)} is missing or left over when read back; nothing was kept, export again")
    for key, value in source.items():
        back = found[key]
        wanted = DTYPES[name] if value.is_floating_point() else value.dtype
        if back.dtype != wanted or back.shape != value.shape:
            raise UserError(
                f"{where}: {part}: {key} came back as {back.dtype} {list(back.shape)}, not {wanted} {list(value.shape)}; "
                "nothing was kept, export again".replace("torch.", "")
            )
        error = (back.float() - value.float()).abs()
        if not (error <= _bound(value.float(), wanted)).all():  # also where an error is not a number
            raise UserError(f"{where}: {part}: {key} came back different by {error.max().item():.3g}; nothing was kept, export again")
        largest = max(largest, error.max().item() if error.numel() else 0.0)
    return Comparison(part, len(found), stored_bytes(found), largest)


def _bound(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbouring numbers: what rounding to the nearest may change. None where nothing is rounded."""
    if dtype not in (torch.float16, torch.bfloat16):
        return torch.zeros_like(value)
    limits = torch.finfo(dtype)
    # Numbers lie equally spaced between powers of two, and below the smallest normal one.
    _, exponent = torch.frexp(value.abs().clamp_min(limits.smallest_normal))
    return torch.ldexp(torch.full_like(value, limits.eps / 4), exponent)
