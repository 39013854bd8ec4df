"""Batch types that flow from a data set to a loss; all frozen, all movable with `.to(device)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound="Movable")
IN_CACHE = 2**16  # numbers, in float32


class Movable:
    """A frozen dataclass whose tensors move together."""

    __slots__ = ()

    def to(self: T, device: torch.device | str) -> T:
        """The same values with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor | Movable)}
        return replace(self, **moved)  # type: ignore[type-var]


def to_unit(image: Tensor) -> Tensor:
    """Float32 in [-1,1] of uint8."""
    if image.device.type != "cpu" or not image.is_contiguous():
        return image.to(torch.float32).div_(127.5).sub_(1)
    found = torch.empty(image.shape)
    for values, out in zip(image.view(-1).split(IN_CACHE), found.view(-1).split(IN_CACHE), strict=True):  # three passes over the cache
        out.copy_(values).div_(127.5).sub_(1)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One datum as it lies on disk."""

    image: bytes
    caption: str
    origin: str  # file, archive member or row, for messages


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch(Movable):
    """Decoded images and what is known about them."""

    image: Tensor  # (B,3,H,W) in [-1,1]; on the way to a device also uint8, which `to` turns into that
    caption: tuple[str, ...]
    size: Tensor  # (B,6) px: original height, width; crop top, left; target height, width
    position: Tensor  # (B,) int64, the global sample positions that address all randomness
    mask: Tensor | None = None  # (B,1,H,W) in [0,1], how much each pixel counts; bytes on the way, as the image; None: all do

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same on `device`, where bytes become numbers: a quarter of these would have to travel."""
        moved = super(ImageBatch, self).to(device)  # slots give the class anew, which super() alone does not know
        if moved.mask is not None and moved.mask.dtype == torch.uint8:
            moved = replace(moved, mask=moved.mask.float() / 255)
        if moved.image.dtype != torch.uint8:
            return moved
        return replace(moved, image=to_unit(moved.image))


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Movable):
    """Encoded prompts."""

    tokens: Tensor  # (B,L,D)
    mask: Tensor  # (B,L) bool, False on padding
    pooled: Tensor | None = None  # (B,P)


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentBatch(Movable):
    """Cached encodings of images: what ImageBatch is before the frozen autoencoder."""

    mean: Tensor  # (B,c,h,w) posterior mean, normalised to unit variance
    std: Tensor | None  # (B,c,h,w) posterior deviation on the same scale; None for VQ
    caption: tuple[str, ...]
    size: Tensor  # (B,6) px, as in ImageBatch
    position: Tensor  # (B,) int64
    text: Text | None = None  # the captions' states, where they are cached too
    mask: Tensor | None = None  # (B,1,h,w) in [0,1], how much each latent pixel counts; None: all do


@dataclass(frozen=True, slots=True, kw_only=True)
class Cond(Movable):
    """All that a network may be told besides x and t."""

    text: Text | None = None
    size: Tensor | None = None  # (B,6) px
    image: Tensor | None = None  # (B,C,h,w)
    guidance: Tensor | None = None  # (B,) the guidance scale, for networks that were distilled from guided steps


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentBatch(Movable):
    """Latents of unit variance with their conditions."""

    x0: Tensor  # (B,c,h,w)
    cond: Cond
    position: Tensor  # (B,) int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Noised(Movable):
    """A noised input with its target: they come out of one function, so that they cannot disagree."""

    x: Tensor  # (B,c,h,w)
    t: Tensor  # (B,) the time the network is told
    target: Tensor  # (B,c,h,w)
    weight: Tensor  # (B,)


C = TypeVar("C", bound=Movable)


def cat(parts: Sequence[C]) -> C:
    """Join batches along their first axis, field by field; a field must be set in all parts or in none.

    Raises:
        ValueError: if a field is None in some parts only.
    """
    first = parts[0]
    values: dict[str, object] = {}
    for field in fields(first):  # type: ignore[arg-type]
        column = [getattr(part, field.name) for part in parts]
        if any(v is None for v in column) and not all(v is None for v in column):
            raise ValueError(f"{type(first).__name__}.{field.name} is set in some parts and missing in others")
        if column[0] is None:
            values[field.name] = None
        elif isinstance(column[0], Tensor):
            values[field.name] = torch.cat(column)
        elif isinstance(column[0], Movable):
            values[field.name] = cat(column)
        else:
            values[field.name] = tuple(item for v in column for item in v)
    return type(first)(**values)


def where(choose: Tensor, yes: C, no: C) -> C:
    """Per sample `yes` where `choose` (B,) bool is True, else `no`; used by caption dropout for every field alike."""
    values: dict[str, object] = {}
    for field in fields(yes):  # type: ignore[arg-type]
        a, b = getattr(yes, field.name), getattr(no, field.name)
        if a is None or b is None:
            values[field.name] = a
        elif isinstance(a, Tensor):
            values[field.name] = torch.where(choose.view(-1, *[1] * (a.dim() - 1)), a, b)
        elif isinstance(a, Movable):
            values[field.name] = where(choose, a, b)
        else:
            values[field.name] = tuple(x if c else y for c, x, y in zip(choose.tolist(), a, b, strict=True))
    return type(yes)(**values)


def rows(batch: C, start: int, stop: int) -> C:
    """Samples `start` to `stop` of a batch, field by field."""
    values: dict[str, object] = {}
    for field in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, field.name)
        values[field.name] = rows(value, start, stop) if isinstance(value, Movable) else value
        if isinstance(value, Tensor | tuple):
            values[field.name] = value[start:stop]
    return type(batch)(**values)
