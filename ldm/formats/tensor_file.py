"""Safetensors reader into owned memory: each byte is read once, so a model needs no more memory than its weights.

The library's own `load` holds a file twice, and its mapped files die with a file that is cut short meanwhile.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
HEADER = 100_000_000  # bytes at most, as in the format's description


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, each in storage of its own, and the texts in its header.

    Raises:
        OSError: as the file system says.
        ValueError: saying what is wrong with the file.
    """
    with FileIO(file) as opened:  # unbuffered: large reads go straight into the tensors
        size = file.stat().st_size
        length, values, texts = _header(opened, size)
        wanted = {name: _described(name, value) for name, value in values.items()}
        found: dict[str, Tensor] = {}
        places: list[tuple[Tensor, int]] = []
        place = 0
        for name, (kind, shape, start, stop) in sorted(wanted.items(), key=lambda item: item[1][2:]):
            tensor = torch.empty(shape, dtype=kind)
            if start != place or stop - start != tensor.nbytes or 8 + length + stop > size:
                raise ValueError(f"{name[:100]}: its place, {start} to {stop}, does not fit its shape or the file")
            found[name], place = tensor, stop
            if stop > start:  # tensors without numbers have nothing to read, and a file may list half a million of them
                places.append((tensor, 8 + length + start))
        if 8 + length + place != size:
            raise ValueError(f"{size - 8 - length - place} bytes too many")
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as readers:
            list(readers.map(lambda part: _fill(opened.fileno(), *part), places))
    return {name: found[name] for name in wanted}, texts


def read_texts(file: Path) -> dict[str, str]:
    """The texts in a safetensors file's header.

    Raises:
        OSError: as the file system says.
        ValueError: saying what is wrong with the header.
    """
    with FileIO(file) as opened:
        return _header(opened, file.stat().st_size)[2]


def _header(opened: FileIO, size: int) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Its length, what it says of each tensor, and its texts."""
    length = int.from_bytes(_read(opened, 8), "little")
    if not 2 <= length <= min(HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    try:
        values = json.loads(_read(opened, length))
    except RecursionError:
        raise ValueError("its header is nested without end") from None
    if not isinstance(values, dict):
        raise ValueError("its header is no JSON object")
    texts = values.pop("__metadata__", None) or {}
    if not isinstance(texts, dict):
        raise ValueError(f"__metadata__ is no object of texts: {str(texts)[:100]}")
    return length, values, {str(name): str(text) for name, text in texts.items()}


def _described(name: str, value: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape and place of a tensor in the data."""
    try:
        kind, shape, (start, stop) = KINDS[value["dtype"]], value["shape"], value["data_offsets"]
        whole = len(shape) <= DIMENSIONS and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{name[:100]}: described as {str(value)[:100]}")
    count = strides = 1
    for side in shape:
        count, strides = count * side, strides * max(1, side)
    if strides >= 2**63:  # also where there is not a single number
        raise ValueError(f"{name[:100]}: its shape is {str(shape)[:100]}, which no memory has places for")
    if count * kind.itemsize != stop - start:  # before any memory is asked for
        raise ValueError(f"{name[:100]}: {stop - start} bytes for the shape {str(shape)[:100]}")
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
