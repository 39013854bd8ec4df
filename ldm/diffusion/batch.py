"""Batch types that flow from a data set to a loss; all frozen, all movable with `.to(device)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion.rng import HOST, Draw

T = TypeVar("T", bound="Movable")
IN_CACHE = 2**16  # numbers, in float32


class Movable:
    """A frozen dataclass whose tensors, alone or in mappings and further ones of its kind, move together."""

    __slots__ = ()

    def to(self: T, device: torch.device | str) -> T:
        """The same values with every tensor on `device`."""
        return type(self)(**{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})  # type: ignore[arg-type]

    @classmethod
    def alike(cls, parts: Sequence[Self]) -> Sequence[Self]:
        """The same parts in shapes that can be joined along the first axis."""
        return parts


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(one, device) for name, one in value.items()}
    if isinstance(value, Tensor):
        return sent(value, device)
    return value.to(device) if isinstance(value, Movable) else value


def sent(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on `device`; to a CUDA GPU from pinned memory, so that nobody waits until it has come there.

    A copy from other memory would wait for all that the GPU was told to do before.
    """
    if value.device.type != "cpu" or torch.device(device).type != "cuda":
        return value.to(device)
    return pinned(value).to(device, non_blocking=True)


def pinned(value: Any) -> Any:
    """A tensor, or all tensors of a batch, in memory that a GPU reads by itself."""
    if isinstance(value, Tensor):
        return value if value.device.type != "cpu" or value.is_pinned() else value.pin_memory()
    if isinstance(value, Mapping):
        return {name: pinned(one) for name, one in value.items()}
    if isinstance(value, Movable):
        return type(value)(**{f.name: pinned(getattr(value, f.name)) for f in fields(value)})  # type: ignore[arg-type]
    return value


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
class Boxes(Movable):
    """Up to K boxes of each picture, with what is in them."""

    box: Tensor  # (B,K,4) left, top, right, bottom, as shares of the picture's sides
    there: Tensor  # (B,K) bool, False on padding
    phrases: tuple[tuple[str, ...], ...]  # B of them, K each; empty on padding

    @classmethod
    def alike(cls, parts: Sequence[Boxes]) -> Sequence[Boxes]:
        """With as many boxes as the part that has most."""
        most = max(part.box.shape[1] for part in parts)
        return [part.padded(most) for part in parts]

    def padded(self, most: int) -> Boxes:
        """With `most` places, the last ones empty; boxes beyond are left out."""
        more = most - self.box.shape[1]
        phrases = tuple((row + ("",) * max(more, 0))[:most] for row in self.phrases)
        return Boxes(box=F.pad(self.box, (0, 0, 0, more)), there=F.pad(self.there, (0, more)), phrases=phrases)


@dataclass(frozen=True, slots=True, kw_only=True)
class Points(Movable):
    """Up to K named points of each picture."""

    point: Tensor  # (B,K,2) across and down, as shares of the picture's sides
    there: Tensor  # (B,K) bool, False on padding
    part: Tensor  # (B,K) int64, which point it is: the number of its name

    @classmethod
    def alike(cls, parts: Sequence[Points]) -> Sequence[Points]:
        """With as many points as the part that has most."""
        most = max(part.point.shape[1] for part in parts)
        more = [most - part.point.shape[1] for part in parts]
        return [
            Points(point=F.pad(p.point, (0, 0, 0, m)), there=F.pad(p.there, (0, m)), part=F.pad(p.part, (0, m)))
            for p, m in zip(parts, more, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph(Movable):
    """Scene graphs."""

    triples: tuple[tuple[tuple[str, str, str], ...], ...]  # of each picture: subject, relation, object


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(Movable):
    """Weighted sums of embeddings, of K pictures and of words each."""

    image: Tensor  # (B,K,3,H,W) in [0,1]
    words: tuple[tuple[str, ...], ...]  # B of them, M each
    weight: Tensor  # (B,K+M), of the pictures and then of the words


View = Tensor | Boxes | Points | Graph | Mixed
Views = Mapping[str, View]  # by name; maps (B,C,H,W): float in [0,1], as bytes on the way; class numbers int16, -1 unknown


def _numbers(views: Views | None) -> Views | None:
    """Views whose maps of bytes have become numbers in [0,1]."""
    if views is None:
        return None
    return {name: v.float() / 255 if isinstance(v, Tensor) and v.dtype == torch.uint8 else v for name, v in views.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch(Movable):
    """Decoded images and what is known about them."""

    image: Tensor  # (B,3,H,W) in [-1,1]; on the way to a device also uint8, which `to` turns into that
    caption: tuple[str, ...]
    size: Tensor  # (B,6) px: original height, width; crop top, left; target height, width
    position: Tensor  # (B,) int64, the global sample positions that address all randomness
    mask: Tensor | None = None  # (B,1,H,W) in [0,1], how much each pixel counts; bytes on the way, as the image; None: all do
    views: Views | None = None  # what else is known of the pictures, as asked for; None: nothing is

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same on `device`, where bytes become numbers: a quarter of these would have to travel."""
        moved = super(ImageBatch, self).to(device)  # slots give the class anew, which super() alone does not know
        moved = replace(moved, views=_numbers(moved.views))
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

    mean: Tensor  # (B,c,h,w) posterior mean, normalised to unit variance; where codes are kept, their numbers (B,h,w) int64
    std: Tensor | None  # (B,c,h,w) posterior deviation on the same scale; None for VQ
    caption: tuple[str, ...]
    size: Tensor  # (B,6) px, as in ImageBatch
    position: Tensor  # (B,) int64
    text: Text | None = None  # the captions' states, where they are cached too
    mask: Tensor | None = None  # (B,1,h,w) in [0,1], how much each latent pixel counts; None: all do
    views: Views | None = None  # as in ImageBatch, at the pictures' own size

    def to(self, device: torch.device | str) -> MomentBatch:
        """The same on `device`, where bytes become numbers."""
        moved = super(MomentBatch, self).to(device)
        return replace(moved, views=_numbers(moved.views))


@dataclass(frozen=True, slots=True, kw_only=True)
class Told(Movable):
    """What a network is told of one view."""

    value: Any  # a tensor (B,...) or a Movable, as the view's encoder made it
    strength: Tensor  # (B,), 1: as it is; 0: not told, as samples are at times in training
    level: Tensor | None = None  # (B,) the time of the noise in it (noise augmentation); None: there is none


@dataclass(frozen=True, slots=True)
class WeightedTokens(Movable):
    """Tokens of a condition beside the text, and how much of what they change is added."""

    tokens: Tensor  # (B,S,D)
    weight: Tensor  # (B,), 0: nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects(Movable):
    """What is where in each picture."""

    box: Tensor  # (B,K,4) left, top, right, bottom, as shares of the picture's sides
    there: Tensor  # (B,K) bool, False on padding
    phrase: Tensor  # (B,K,D) the pooled text of each phrase
    weight: Tensor  # (B,) how much of what they change is added; 0: nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Triples(Movable):
    """Scene graphs as a network is told them."""

    words: Tensor  # (B,K,3D) the pooled texts of subject, relation and object, side by side
    there: Tensor  # (B,K) bool, False on padding


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside(Movable):
    """Keys and values that every attention to the text reads beside it, in the network's order of them."""

    keys: tuple[Tensor, ...]  # (B,S,C) each
    values: tuple[Tensor, ...]  # (B,S,C) each
    weight: Tensor  # (B,) how much of what they change is added; 0: nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected(Movable):
    """What conditions beside the text add inside a U-Net; with nothing of it the U-Net is what it is without, to the bit."""

    skips: tuple[Tensor, ...] = ()  # (B,C,h,w) to every map that the way up meets again, the full resolution first (ControlNet)
    middle: Tensor | None = None  # (B,C,h,w) to the output of the middle (ControlNet)
    levels: tuple[Tensor, ...] = ()  # (B,C,h,w) to what leaves the last layer of each level on the way down (T2I-Adapter)
    objects: Objects | None = None  # to every map, by gated self-attention (GLIGEN)
    beside: tuple[Beside, ...] = ()  # to what is read of the text, by cross-attention (IP-Adapter)

    def __add__(self, other: Injected) -> Injected:
        """Both; maps are added up, and at most one of the two has objects."""
        return Injected(
            skips=_sums(self.skips, other.skips),
            middle=other.middle if self.middle is None else self.middle if other.middle is None else self.middle + other.middle,
            levels=_sums(self.levels, other.levels),
            objects=self.objects or other.objects,
            beside=self.beside + other.beside,
        )


def _sums(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a + b for a, b in zip(some, others, strict=True)) if some and others else some or others


@dataclass(frozen=True, slots=True, kw_only=True)
class Cond(Movable):
    """All that a network may be told besides x and t."""

    text: Text | None = None
    size: Tensor | None = None  # (B,6) px
    image: Tensor | None = None  # (B,C,h,w)
    vector: Tensor | None = None  # (B,P), or numbers (B,), for networks that add such to the time embedding (UNetConfig.class_embedding)
    guidance: Tensor | None = None  # (B,) the guidance scale, for networks that were distilled from guided steps
    given: Mapping[str, Told] | None = None  # by view; one that is not there is not told
    injected: Injected | None = None  # what conditions' networks made for a U-Net, within one call


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed(Movable):
    """A batch with what a loss draws for it, made ahead."""

    batch: Any  # ImageBatch or MomentBatch
    draws: Mapping[Draw, Tensor]  # for `Rng`, (B,...) each

    @staticmethod
    def of(batch: Any) -> Fed:
        """A batch for which nothing was made ahead; one for which something was as it is."""
        return batch if isinstance(batch, Fed) else Fed(batch=batch, draws={})

    def to(self, device: torch.device | str) -> Fed:
        """The same on `device`, but for draws that stay on the CPU."""
        draws = {draw: value if draw[0] in HOST else sent(value, device) for draw, value in self.draws.items()}
        return Fed(batch=self.batch.to(device), draws=draws)


C = TypeVar("C", bound=Movable)


def cat(parts: Sequence[C]) -> C:
    """Join batches along their first axis, field by field; a field must be set in all parts or in none.

    Raises:
        ValueError: if a field, or an entry of a mapping, is set in some parts only.
    """
    parts = type(parts[0]).alike(parts)
    kind = type(parts[0])
    return kind(**{f.name: _cat([getattr(p, f.name) for p in parts], f"{kind.__name__}.{f.name}") for f in fields(kind)})  # type: ignore[arg-type]


def _cat(column: list[Any], name: str) -> Any:
    first = column[0]
    if any(v is None for v in column):
        if not all(v is None for v in column):
            raise ValueError(f"{name} is set in some parts and missing in others")
        return None
    if isinstance(first, Mapping):
        names = dict.fromkeys(key for each in column for key in each)
        return {key: _cat([each.get(key) for each in column], f"{name}[{key}]") for key in names}
    if isinstance(first, Tensor):
        return torch.cat(column)
    if isinstance(first, Movable):
        return cat(column)
    return tuple(item for v in column for item in v)


def where(choose: Tensor, yes: C, no: C) -> C:
    """Per sample `yes` where `choose` (B,) bool is True, else `no`; used by caption dropout for every field alike."""
    return type(yes)(**{f.name: _where(choose, getattr(yes, f.name), getattr(no, f.name)) for f in fields(yes)})  # type: ignore[arg-type]


def _where(choose: Tensor, a: Any, b: Any) -> Any:
    if a is None or b is None or a is b:
        return a
    if isinstance(a, Mapping):
        return {key: _where(choose, value, b.get(key)) for key, value in a.items()}
    if isinstance(a, Tensor):
        return torch.where(choose.view(-1, *[1] * (a.dim() - 1)), a, b)
    if isinstance(a, Movable):
        return where(choose, a, b)
    return tuple(x if c else y for c, x, y in zip(choose.tolist(), a, b, strict=True))


def rows(batch: C, start: int, stop: int) -> C:
    """Samples `start` to `stop` of a batch, field by field."""
    return _each(batch, lambda value: value[start:stop])


def taken(batch: C, index: Sequence[int]) -> C:
    """The samples `index` of a batch in that order, field by field."""
    numbers = torch.as_tensor(list(index), dtype=torch.int64)

    def take(value: Any) -> Any:
        return value[numbers.to(value.device)] if isinstance(value, Tensor) else tuple(value[i] for i in index)

    return _each(batch, take)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of a batch, at any depth."""
    if isinstance(value, Tensor):
        yield value
    for one in value.values() if isinstance(value, Mapping) else ():
        yield from tensors_of(one)
    for field in fields(value) if isinstance(value, Movable) else ():  # type: ignore[arg-type]
        yield from tensors_of(getattr(value, field.name))


def filled(batch: C, tensors: Iterable[Tensor]) -> C:
    """The same batch with other tensors, in the order of `tensors_of`."""
    new = iter(tensors)
    made: C = _each(batch, lambda value: next(new) if isinstance(value, Tensor) else value)
    return made


def _each(value: Any, take: Callable[[Any], Any]) -> Any:
    """A batch whose tensors and tuples, at any depth of fields and mappings, are what `take` makes of them."""
    if isinstance(value, Mapping):
        return {key: _each(one, take) for key, one in value.items()}
    if isinstance(value, Movable):
        return type(value)(**{f.name: _each(getattr(value, f.name), take) for f in fields(value)})  # type: ignore[arg-type]
    return take(value) if isinstance(value, Tensor | tuple) else value
