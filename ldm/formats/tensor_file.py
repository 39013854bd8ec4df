"""Safetensors reader into owned memory: each byte is read once, so a model needs no more memory than its weights.

The library's own `load` holds a file twice, and its mapped files die with a file that is cut short meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.files import require_regular

KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
DIMENSIONS = 64  # of a tensor, at most
HEADER = 2**25  # bytes at most; the format's description has 100 MB
TENSORS = 2**16  # in one file; Stable Diffusion XL has 2,600
LARGEST = 2**48  # product of a tensor's sides, those of 0 left out


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, each in storage of its own, and the texts in its header.

    Raises:
        OSError: as the file system says.
        ValueError: saying what is wrong with the file.
    """
    return _read_all(file)[:2]


def read_summed(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file and the SHA-256 sum of the whole file, from one reading of it.

    Raises:
        OSError, ValueError: as `read_tensors`.
    """
    tensors, _, header, order = _read_all(file)
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    for name in order:  # they lie one behind the other, and fill the file
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return tensors, digest.hexdigest()


def _read_all(file: Path) -> tuple[dict[str, Tensor], dict[str, str], bytes, list[str]]:
    """As `read_tensors`, with the header's bytes, and the names in the order of the file."""
    require_regular(file)
    with FileIO(file) as opened:  # unbuffered: large reads go straight into the tensors
        size = file.stat().st_size
        header, values, texts = _header(opened, size)
        length = len(header)
        wanted = {name: _described(name, value) for name, value in values.items()}
        found: dict[str, Tensor] = {}
        places: list[tuple[Tensor, int]] = []
        place = 0
        for name, (kind, shape, start, stop) in sorted(wanted.items(), key=lambda item: item[1][2:]):
            if start != place or 8 + length + stop > size:
                raise ValueError(f"{ascii(name)[:100]}: its place, {start} to {stop}, does not fit its shape or the file")
            found[name], place = _empty(shape, kind), stop
            if stop > start:  # tensors without numbers have nothing to read
                places.append((found[name], 8 + length + start))
        if 8 + length + place != size:
            raise ValueError(f"{size - 8 - length - place} bytes too many")
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as readers:
            list(readers.map(lambda part: _fill(opened.fileno(), *part), places))
    return {name: found[name] for name in wanted}, texts, header, [name for name in found if found[name].numel()]


def read_texts(file: Path) -> dict[str, str]:
    """The texts in a safetensors file's header.

    Raises:
        OSError: as the file system says.
        ValueError: saying what is wrong with the header.
    """
    require_regular(file)
    with FileIO(file) as opened:
        return _header(opened, file.stat().st_size)[2]


def _header(opened: FileIO, size: int) -> tuple[bytes, dict[str, Any], dict[str, str]]:
    """Its bytes, what it says of each tensor, and its texts."""
    length = int.from_bytes(_read(opened, 8), "little")
    if not 2 <= length <= min(HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    raw = _read(opened, length)
    if (count := raw.count(b'"data_offsets"')) > TENSORS:
        raise ValueError(f"{count:,} tensors; at most {TENSORS:,} are read")
    try:
        values = json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise ValueError("its header is nested without end") from None
    if not isinstance(values, dict):
        raise ValueError("its header is no JSON object")
    texts = values.pop("__metadata__", None) or {}
    if not isinstance(texts, dict):
        raise ValueError(f"__metadata__ is no object of texts: {str(texts)[:100]}")
    if len(values) > TENSORS:
        raise ValueError(f"{len(values):,} tensors; at most {TENSORS:,} are read")
    return raw, values, {_readable(str(name)): _readable(str(text)) for name, text in texts.items()}


def _readable(text: str) -> str:
    """A text without half characters, which no file and no terminal takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _empty(shape: list[int], kind: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=kind, device="cpu")
    except (RuntimeError, MemoryError):
        raise OSError(errno.ENOMEM, f"no memory for a tensor of shape {shape} ({math.prod(shape) * kind.itemsize:,} bytes)") from None


def _described(name: str, value: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape and place of a tensor in the data."""
    try:
        kind, shape, (start, stop) = KINDS[value["dtype"]], value["shape"], value["data_offsets"]
        whole = len(shape) <= DIMENSIONS and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop))
        whole = whole and math.prod(side or 1 for side in shape) < LARGEST and name == _readable(name)
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{ascii(name)[:100]}: described as {ascii(value)[:100]}")
    if math.prod(shape) * kind.itemsize != stop - start:  # before any memory is asked for
        raise ValueError(f"{ascii(name)[:100]}: {stop - start} bytes for the shape {str(shape)[:100]}")
    return kind, shape, start, stop


def _read(opened: FileIO, count: int) -> bytes:
    parts, missing = [], count
    while missing:
        part = opened.read(missing)
        if not part:
            raise ValueError("it ends too early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _fill(file: int, tensor: Tensor, place: int) -> None:
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    while len(view):
        count = os.preadv(file, [view], place)
        if not count:
            raise ValueError("it ends too early")
        view, place = view[count:], place + count
