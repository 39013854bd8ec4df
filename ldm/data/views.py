"""Views of a picture: what else is known of it, and pure functions that make some of them of any picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Count, Positive, config
from ldm.diffusion.batch import Boxes, ImageBatch, Points, View, Views
from ldm.diffusion.rng import Rng

VERSION = 1  # raise it whenever a function here gives other values
LUMA = (299, 587, 114)  # thousandths of red, green and blue (ITU-R BT.601)
STRONG, WEAK = 0.08, 0.04  # gradients of edges that count by themselves, and of those that lead on from one; a step from 0 to 1 has 0.5
WOBBLE = 2  # of a sketch, 64ths of the longer side
CELLS = 16  # strokes beside each other along the longer side
EMBEDDING = "embedding"  # the view that is a picture, told by what a CLIP makes of it
SHADES = 5  # of each colour in strokes


@config
class ViewKind:
    """Kind of a view: its form, and what a network that is told it must know."""

    form: Literal["map", "classes", "boxes", "points", "graph", "marks", "embedding"]
    channels: Count = 0  # of a map; of classes how many there are
    divide: Positive = 1  # a map's sides are the picture's divided by it
    names: tuple[str, ...] = ()  # of classes, or of points
    colours: tuple[tuple[int, int, int], ...] = ()  # of classes, as a picture of them shows them


def kept_bytes(kind: ViewKind, side: int) -> int:
    """Bytes that a latent cache keeps of a view of a picture of `side` x `side` px; 0 for the few numbers and words of what is no map."""
    if kind.form == "classes":
        return 2 * side * side
    return kind.channels * (side // kind.divide) ** 2 if kind.form in ("map", "embedding") else 0


def parted(name: str) -> tuple[str, str]:
    """A view's name and its argument: `small:4` is `small` and `4`."""
    plain, _, argument = name.partition(":")
    return plain, argument


def number(name: str, usual: int, low: int, high: int) -> int:
    """The whole number that a view's name has as its argument.

    Raises:
        UserError: naming the view and what is allowed.
    """
    plain, argument = parted(name)
    if not argument:
        return usual
    if not argument.isdecimal() or not low <= int(argument) <= high:
        raise UserError(f"view {name!r}: a whole number from {low} to {high} stands behind the colon, such as {plain}:{usual}")
    return int(argument)


def divided(name: str) -> int:
    """How many times smaller than its picture a view of this name is.

    Raises:
        UserError: as `number`.
    """
    return number(name, 4, 2, 64) if parted(name)[0] == "small" else 1


Make = Callable[[Tensor, str, Rng], Tensor]  # pictures (B,3,H,W) uint8, the view's name, and noise by address -> maps (B,C,h,w) uint8


def grey(image: Tensor) -> Tensor:
    """Luma (B,1,H,W) uint8 of pictures (B,3,H,W) uint8."""
    wide = image.to(torch.int32)
    red, green, blue = LUMA
    return ((wide[:, :1] * red + wide[:, 1:2] * green + wide[:, 2:] * blue + 500) // 1000).to(torch.uint8)


def small(image: Tensor, by: int) -> Tensor:
    """Pictures (B,3,H,W) uint8 made `by` times smaller: the mean of every square, (B,3,H/by,W/by) uint8.

    Raises:
        UserError: where their sides are no multiples of `by`.
    """
    height, width = image.shape[2:]
    if height % by or width % by:
        raise UserError(f"view 'small:{by}': pictures of {width}x{height} px cannot be made {by} times smaller; sides must be multiples")
    return F.avg_pool2d(image.float(), by).add_(0.5).to(torch.uint8)


def edges(image: Tensor) -> Tensor:
    """Edges (B,1,H,W) uint8, 0 or 255, one pixel wide, of pictures (B,3,H,W) uint8, where any colour changes (Canny 1986)."""
    x = F.pad(image.float() / 255, (2, 2, 2, 2), mode="replicate")
    x = _three(_three(x, 2, (0.25, 0.5, 0.25)), 3, (0.25, 0.5, 0.25))  # (B,3,H+2,W+2)
    across = _three(_three(x, 2, (0.25, 0.5, 0.25)), 3, (-0.5, 0.0, 0.5))
    down = _three(_three(x, 3, (0.25, 0.5, 0.25)), 2, (-0.5, 0.0, 0.5))
    steepest = (across.square() + down.square()).argmax(1, keepdim=True)
    across, down = across.gather(1, steepest), down.gather(1, steepest)  # (B,1,H,W)
    size = (across.square() + down.square()).sqrt()
    near = F.pad(size, (1, 1, 1, 1))

    def at(dy: int, dx: int) -> Tensor:
        return near[:, :, 1 + dy : 1 + dy + size.shape[2], 1 + dx : 1 + dx + size.shape[3]]

    ax, ay, same = across.abs(), down.abs(), (across >= 0) == (down >= 0)
    flat, steep = ay <= 0.4142 * ax, ax <= 0.4142 * ay
    crest = torch.zeros_like(size, dtype=torch.bool)
    ways = ((flat, (0, 1)), (~flat & steep, (1, 0)), (~flat & ~steep & same, (1, 1)), (~flat & ~steep & ~same, (1, -1)))
    for chosen, (dy, dx) in ways:
        crest |= chosen & (size > at(-dy, -dx)) & (size >= at(dy, dx))
    weak = crest & (size > WEAK)
    found = crest & (size > STRONG)
    while True:
        grown = weak & (F.max_pool2d(found.float(), 3, 1, 1) > 0)
        if torch.equal(grown, found):
            return found.to(torch.uint8) * 255
        found = grown


def _three(x: Tensor, axis: int, weights: tuple[float, float, float]) -> Tensor:
    """Weighted sum of every three neighbours along an axis."""
    n = x.shape[axis] - 2
    return sum(weight * x.narrow(axis, i, n) for i, weight in enumerate(weights) if weight)  # type: ignore[return-value]


def sketch(lines: Tensor, rng: Rng, wobble: float) -> Tensor:
    """Lines (B,1,H,W) uint8 as by an unsteady hand: displaced smoothly by about `wobble` px, broken here and there."""
    height, width = lines.shape[2:]
    noise = rng.normal("sketch", (3, 6, 6))
    field = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)  # (B,3,H,W)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    at = torch.stack([(x + wobble * field[:, 0]) * 2 / width - 1, (y + wobble * field[:, 1]) * 2 / height - 1], -1)
    moved = F.grid_sample(F.max_pool2d(lines.float(), 3, 1, 1), at, mode="nearest", align_corners=False)
    return moved.masked_fill_(field[:, 2:] > 1.2, 0).to(torch.uint8)


def strokes(image: Tensor) -> Tensor:
    """Pictures (B,3,H,W) uint8 as a few broad strokes: squares of one colour, in few shades."""
    height, width = image.shape[2:]
    side = max(1, max(height, width) // CELLS)
    coarse = F.avg_pool2d(image.float(), side, ceil_mode=True)
    shades = ((coarse * (SHADES - 1) / 255).round() * (255 / (SHADES - 1))).to(torch.uint8)
    return shades.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :height, :width]


def _wobble(image: Tensor, name: str) -> float:
    return number(name, WOBBLE, 0, 16) * max(image.shape[2:]) / 64


ANY: Mapping[str, tuple[Make, ViewKind]] = {  # what any picture gives
    "edges": (lambda image, name, rng: edges(image), ViewKind(form="map", channels=1)),
    "sketch": (lambda image, name, rng: sketch(edges(image), rng, _wobble(image, name)), ViewKind(form="map", channels=1)),
    "grey": (lambda image, name, rng: grey(image), ViewKind(form="map", channels=1)),
    "small": (lambda image, name, rng: small(image, number(name, 4, 2, 64)), ViewKind(form="map", channels=3)),
    EMBEDDING: (lambda image, name, rng: image, ViewKind(form="embedding", channels=3)),
    "strokes": (lambda image, name, rng: strokes(image), ViewKind(form="map", channels=3)),
}


def from_picture(names: Sequence[str], image: Tensor, rng: Rng) -> dict[str, View]:
    """Views of pictures (B,3,H,W) uint8 that any picture gives, by name."""
    return {name: ANY[parted(name)[0]][0](image, name, rng) for name in names}


def kind_of(offered: Mapping[str, ViewKind], name: str, where: str = "this data") -> ViewKind:
    """The kind of a view by its name.

    Args:
        offered: by plain name, what the data has of its own; what any picture gives need not be among it.

    Raises:
        UserError: listing what is offered, for a view that is not.
    """
    plain, argument = parted(name)
    found = offered.get(name) or offered.get(plain) or (ANY[plain][1] if plain in ANY else None)
    if found is None:
        raise UserError(
            f"view {name!r}: {where} does not offer it; it has {', '.join(sorted({*offered, *ANY}))}. "
            "A folder of pictures has further ones as files in a folder of that name in it, or in a column of metadata.jsonl"
        )
    if plain == "small":
        return replace(found, divide=divided(name))
    if argument and plain == "sketch":
        number(name, WOBBLE, 0, 16)
    elif argument and name not in offered:
        raise UserError(f"view {name!r}: {plain} takes nothing behind a colon; write {plain}")
    return found


def mirrored_view(view: View) -> View:
    """A view of the same pictures mirrored left and right."""
    if isinstance(view, Tensor):
        return view.flip(-1)
    if isinstance(view, Boxes):
        left, top, right, bottom = view.box.unbind(-1)
        turned = torch.stack([1 - right, top, 1 - left, bottom], -1)
        return replace(view, box=torch.where(view.there[..., None], turned, view.box))
    if isinstance(view, Points):
        across, down = view.point.unbind(-1)
        return replace(view, point=torch.where(view.there[..., None], torch.stack([1 - across, down], -1), view.point))
    return view


def with_views(batch: ImageBatch, own: Views, names: Sequence[str], seed: int) -> ImageBatch:
    """A batch with the views `names`: the data's `own`, and of the pictures what any picture gives."""
    if not names:
        return batch
    image = batch.image
    bytes_of = image if image.dtype == torch.uint8 else ((image + 1) * 127.5 + 0.5).clamp_(0, 255).to(torch.uint8)
    made = from_picture([name for name in names if name not in own], bytes_of, Rng(seed, batch.position))
    return replace(batch, views={name: own[name] if name in own else made[name] for name in names})
