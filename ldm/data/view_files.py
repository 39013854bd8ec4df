"""View files: maps from pictures, class numbers by value or colour, and boxes, points and triples from JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ldm.data.images import MAX_PIXELS, SQUEEZED, Rejected, Shape, cover, probe, sides, to_rgb
from ldm.data.views import ViewKind, grey, mirrored_view
from ldm.diffusion.batch import Boxes, Graph, Points, View

Size = tuple[int, int, int, int, int, int]  # px, of a picture's view: original height, width; crop top, left; target height, width
NUMBERED = ("1", "L", "P", "F", "I", "I;16", "I;16L", "I;16B")  # modes of pictures whose values are class numbers
UNKNOWN = 255  # in a picture of class numbers: of no class
SAME = 12  # how far the colours of a palette may lie from those of classes
NEAR = 48  # how far a pixel's colour may lie from its class's, as the sum of three differences
MANY = 1000  # boxes, points or triples of a picture, at most


def centred(height: int, width: int, shape: Shape) -> Size:
    """The view of a picture that shows as much of its middle as fits."""
    high, wide = sides(shape)
    rows, columns = cover(height, width, shape)
    return height, width, (rows - high) // 2, (columns - wide) // 2, high, wide


def map_view(data: bytes, kind: ViewKind, size: Size | Shape, flip: bool = False, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
    """The part of a map that belongs to a view of its picture: (C,h,w) uint8, of classes their numbers (1,h,w) int16, -1 unknown.

    Args:
        data: the map's file, of its picture's aspect ratio and any size.
        size: of the picture's view; or height and width px: the middle of the map itself.
        flip: whether the view was mirrored.

    Raises:
        Rejected: for what cannot be decoded, or is no such map.
    """
    probe(data, max_pixels)
    try:
        with Image.open(io.BytesIO(data)) as found:
            image = ImageOps.exif_transpose(found)
            image = _numbered(image, kind) if kind.form == "classes" else to_rgb(image)
    except Rejected:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise Rejected("damaged map", f"{type(error).__name__}: {error}") from None
    whole: Size = size if isinstance(size, tuple) and len(size) == 6 else centred(image.height, image.width, size)  # type: ignore[arg-type]
    height, width, top, left, high, wide = whole
    if abs(image.width - image.height * width / height) > max(1.5, SQUEEZED * image.width):
        said = f"{image.width}x{image.height} px, of a picture of {width}x{height}"
        raise Rejected("map of other proportions", f"{said}; what it shows would lie elsewhere: cut both alike")
    rows, columns = cover(height, width, (high, wide))
    start = columns - wide - left if flip else left
    down, across = image.height / rows, image.width / columns
    bottom, right = min((top + high) * down, float(image.height)), min((start + wide) * across, float(image.width))
    how = Image.Resampling.NEAREST if kind.form == "classes" else Image.Resampling.BOX if kind.divide > 1 else Image.Resampling.BILINEAR
    shape = (max(1, wide // kind.divide), max(1, high // kind.divide))
    part = np.asarray(image.resize(shape, how, box=(start * across, top * down, right, bottom)))
    part = part[:, ::-1] if flip else part
    if kind.form == "classes":
        return np.where(part == 65535, -1, part.astype(np.int32)).astype(np.int16)[None]
    pixels = np.ascontiguousarray(part.transpose(2, 0, 1))
    return pixels if kind.channels == 3 else grey(torch.from_numpy(pixels)[None])[0].numpy()


def _numbered(image: Image.Image, kind: ViewKind) -> Image.Image:
    """A picture of class numbers as one of 32-bit numbers, 65535 where a pixel has no class.

    Raises:
        Rejected: for a class that is not known.
    """
    colours = np.array(kind.colours, np.int32).reshape(-1, 3)
    if image.mode == "LA":
        image = image.convert("L")
    by_colour = image.mode not in NUMBERED
    if image.mode == "P" and len(colours):  # a painted picture that was saved with few colours
        counts = np.bincount(np.asarray(image).ravel(), minlength=256)
        palette = np.array(image.getpalette() or [], np.int32).reshape(-1, 3)
        ours = np.abs(palette[:, None] - colours).sum(2).min(1) <= SAME
        by_colour = bool(counts[: len(palette)][ours].sum() >= 0.9 * counts.sum())
    if not by_colour:
        values = np.asarray(image)
        if image.mode == "F" and (values % 1).any():
            raise Rejected("no class numbers", f"{float(values[values % 1 != 0][0]):g}; whole numbers are needed")
        values = np.where(values == UNKNOWN, 65535, values.astype(np.int32))
        wrong = values[(values >= kind.channels) & (values != 65535)]
        if wrong.size:
            raise Rejected("unknown class", f"number {int(wrong[0])}; there are {kind.channels}, from 0, and {UNKNOWN} for unknown")
        return Image.fromarray(values)
    if not len(colours):
        raise Rejected("no class numbers", f"mode {image.mode}; a picture of class numbers (mode L or P) is needed, as no colours are told")
    pixels = np.asarray(to_rgb(image), np.int32)
    away = np.abs(pixels[:, :, None] - colours).sum(3)
    known = away.min(2) <= NEAR
    if not known.any():
        listed = ", ".join(f"{name} {colour}".strip() for name, colour in zip_longest(kind.names[:3], kind.colours[:3], fillvalue=""))
        first = tuple(int(value) for value in pixels[0, 0])
        raise Rejected("no class in it", f"no pixel has the colour of one, such as {listed}; the first pixel has {first}")
    return Image.fromarray(np.where(known, away.argmin(2), 65535).astype(np.int32))


def words_view(text: str | bytes | list[Any], kind: ViewKind) -> View:
    """Boxes, points or a graph of one picture, as JSON tells them.

    Boxes are `[{"box": [x0, y0, x1, y1], "text": "a red circle"}, ...]`, points `[{"point": [x, y], "name": "left"}, ...]`, both as
    shares of the picture's sides; a graph is `[["red circle", "left of", "blue ring"], ...]`.

    Raises:
        Rejected: for anything else.
    """
    try:
        entries = json.loads(text) if isinstance(text, str | bytes) else text
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(error)) from None
    if not isinstance(entries, list) or len(entries) > MANY:
        got = f"a list of {len(entries)}" if isinstance(entries, list) else str(entries)[:60]
        raise Rejected(f"no {kind.form}", f"got {got}; a list of at most {MANY} is needed, such as {EXAMPLES.get(kind.form, '[]')}")
    if kind.form == "boxes":
        rows = [(_numbers(one, "box", 4), _text(one)) for one in entries]
        if wrong := next((box for box, _ in rows if box[0] >= box[2] or box[1] >= box[3]), None):
            raise Rejected("no box", f"{wrong}; left, top, right, bottom are needed, left before right and top before bottom")
        box = torch.tensor([box for box, _ in rows], dtype=torch.float32).view(1, -1, 4)
        return Boxes(box=box, there=torch.ones(1, len(rows), dtype=torch.bool), phrases=(tuple(text for _, text in rows),))
    if kind.form == "points":
        found = [(_numbers(one, "point", 2), _part(one, kind.names)) for one in entries]
        point = torch.tensor([at for at, _ in found], dtype=torch.float32).view(1, -1, 2)
        part = torch.tensor([[number for _, number in found]], dtype=torch.int64)
        return Points(point=point, there=torch.ones(1, len(found), dtype=torch.bool), part=part)
    triples = []
    for one in entries:
        if not isinstance(one, list) or len(one) != 3 or not all(isinstance(word, str) for word in one):
            raise Rejected("no triple", f"{str(one)[:60]}; subject, relation and object are needed")
        triples.append((one[0], one[1], one[2]))
    return Graph(triples=(tuple(triples),))


EXAMPLES = {
    "boxes": '[{"box": [0.1, 0.2, 0.5, 0.6], "text": "a dog"}]',
    "points": '[{"point": [0.5, 0.5], "name": "nose"}]',
    "graph": '[["dog", "left of", "cat"]]',
}
NONE = torch.zeros(1, 0, dtype=torch.bool)
EMPTY: Mapping[str, View] = {  # of a picture of which nothing is told
    "boxes": Boxes(box=torch.zeros(1, 0, 4), there=NONE, phrases=((),)),
    "points": Points(point=torch.zeros(1, 0, 2), there=NONE, part=torch.zeros(1, 0, dtype=torch.int64)),
    "graph": Graph(triples=((),)),
}


def tells(view: View | None) -> bool:
    """Whether boxes, points or triples of one picture are any."""
    return bool(view.triples[0]) if isinstance(view, Graph) else isinstance(view, Boxes | Points) and bool(view.there.any())


SHOWN = 0.2  # share of a box that a view must show


def part_of(view: View, size: Size, flip: bool) -> View:
    """Boxes and points of one whole picture as those of a view of it, mirrored with it; what it does not show is left out."""
    height, width, top, left, high, wide = size
    rows, columns = cover(height, width, (high, wide))
    if not isinstance(view, Boxes | Points):
        return view
    whole = mirrored_view(view) if flip else view
    if isinstance(whole, Points):
        at = (whole.point * torch.tensor([columns, rows]) - torch.tensor([left, top])) / torch.tensor([wide, high])
        kept = ((at >= 0) & (at <= 1)).all(-1)[0] & whole.there[0]
        return Points(point=at[:, kept], there=whole.there[:, kept], part=whole.part[:, kept])
    assert isinstance(whole, Boxes)
    scale, shift = torch.tensor([columns, rows, columns, rows]), torch.tensor([left, top, left, top])
    moved = (whole.box * scale - shift) / torch.tensor([wide, high, wide, high])
    cut = moved.clamp(0, 1)
    areas = [(box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (cut, moved)]
    kept = (areas[0] >= SHOWN * areas[1])[0] & (areas[0] > 0)[0] & whole.there[0]
    phrases = tuple(text for text, k in zip(whole.phrases[0], kept.tolist(), strict=True) if k)
    return Boxes(box=cut[:, kept], there=whole.there[:, kept], phrases=(phrases,))


def _numbers(one: Any, name: str, many: int) -> list[float]:
    found = one.get(name) if isinstance(one, dict) else None
    values = found if isinstance(found, list) else []
    if len(values) != many or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise Rejected(f"no {name}", f'{str(one)[:60]}; {{"{name}": [{many} numbers]}} is needed')
    if not all(-0.01 <= value <= 1.01 for value in values):
        raise Rejected(f"no {name}", f"{values}; shares of the picture's sides, from 0 to 1, are needed")
    return [min(max(float(value), 0.0), 1.0) for value in values]


def _text(one: dict[str, Any]) -> str:
    text = one.get("text", "")
    if others := [name for name in one if name not in ("box", "text")] if "text" not in one else ():
        raise Rejected("no text", f"{', '.join(others)[:40]} is not read; what is in the box stands in text")
    if not isinstance(text, str):
        raise Rejected("no text", f"{str(text)[:60]}; what is in the box, in words")
    return text


def _part(one: dict[str, Any], names: Sequence[str]) -> int:
    name = one.get("name", names[0] if names else "")
    if name not in names:
        raise Rejected("unknown point", f"{str(name)[:40]!r}; there are {', '.join(names)}")
    return list(names).index(name)
