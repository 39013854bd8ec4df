"""Inputs of the page for views: what a user painted, drew, wrote or loaded, as the files that `ldm sample --given` reads."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError
from ldm.data.views import ANY, ViewKind, parted
from ldm.sampling.given import OF

if TYPE_CHECKING:
    from PIL import Image

SLOTS = 4  # views that the page has inputs for
MAX_TEXT = 20_000  # characters of what is written
FORMS = {  # how a line of what is not a picture is written
    "boxes": "left top right bottom words, from 0 to 1, such as: 0.1 0.5 0.4 0.9 a red ring",
    "points": "across down name, from 0 to 1, such as: 0.5 0.2 left",
    "graph": "subject | relation | object, such as: red ring | left of | green square",
}
NUMBERS = {"boxes": ("box", 4, "text"), "points": ("point", 2, "name")}


@dataclass(frozen=True)
class ViewInput:
    """One view that a client tells of.

    Args:
        data: a picture file, or JSON.
        of: whether the view is made of the picture.
    """

    view: str
    data: bytes
    weight: float = 1.0
    of: bool = False

    def word(self, folder: Path) -> str:
        """VIEW=FILE@WEIGHT, with the file in a folder."""
        plain = re.sub(r"\W", "_", self.view)
        file = folder / f"{plain}.{'json' if self.data[:1] in (b'[', b'{') else 'png'}"
        file.write_bytes(self.data)
        return f"{self.view}={OF if self.of else ''}{file}@{self.weight!r}"


def makes(view: str) -> bool:
    """Whether any picture gives the view."""
    return parted(view)[0] in ANY


def is_picture(kind: ViewKind) -> bool:
    """Whether the view is painted, not written."""
    return kind.form in ("map", "classes", "embedding")


def written(view: str, kind: ViewKind, text: str) -> bytes:
    """The JSON of boxes, points or a graph that are written one a line.

    Raises:
        UserError: naming the line and how it is written.
    """
    if len(text) > MAX_TEXT:
        raise UserError(f"{view}: {len(text)} characters; at most {MAX_TEXT}")
    if text.lstrip().startswith("["):
        return text.strip().encode()
    found: list[Any] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        wrong = UserError(f"{view}: line {number}: got {line[:60]!r}; write {FORMS[kind.form]}")
        if kind.form == "graph":
            words = [word.strip() for word in line.split("|")]
            if len(words) != 3 or not all(words):
                raise wrong
            found.append(words)
            continue
        name, many, said = NUMBERS[kind.form]
        parts = line.replace(",", " ").split(None, many)
        try:
            numbers = [float(part) for part in parts[:many]]
        except ValueError:
            raise wrong from None
        if len(numbers) < many:
            raise wrong
        found.append({name: numbers, **({said: parts[many].strip()} if len(parts) > many else {})})
    return json.dumps(found, ensure_ascii=False).encode()


def painted_view(kind: ViewKind, editor: Mapping[str, Any] | None, of: bool) -> tuple[bytes, bool] | None:
    """The picture file of a view that was painted or loaded, and whether the view is made of it; None: there is nothing.

    Lines are what is painted, in any colour, white on black; where a picture lies under them, on that. Classes are the nearest of
    their colours, and what is not painted is of no class.

    Args:
        editor: background, layers and composite of gradio's ImageEditor.
        of: whether a loaded picture is what the view is made of.
    """
    from PIL import Image

    value = editor or {}
    under = value.get("background")
    layers = [layer.convert("RGBA") for layer in value.get("layers") or () if layer.convert("RGBA").getchannel("A").getbbox()]
    if under is None and not layers:
        return None
    if under is not None and of:
        return _png(under.convert("RGB")), True
    if under is not None and not layers:
        return _png(under.convert("RGB")), False
    whole = Image.new("RGBA", layers[0].size)
    for layer in layers:
        whole.alpha_composite(layer)
    if kind.form == "classes":
        shown = whole if under is None else _over(whole, under)
        return _png(_numbers(shown, kind) if kind.colours else shown.convert("L")), False
    if kind.channels == 1:
        lines = whole.getchannel("A").point(lambda alpha: 255 * (alpha >= 128))
        if under is not None:
            ground = under.convert("L").resize(lines.size)
            ground.paste(255, mask=lines)
            lines = ground
        return _png(lines), False
    return _png(_over(whole, under or Image.new("RGB", whole.size, "white")).convert("RGB")), False


def _over(paint: Image.Image, under: Image.Image) -> Image.Image:
    from PIL import Image

    return Image.alpha_composite(under.convert("RGBA").resize(paint.size), paint)


def _numbers(shown: Image.Image, kind: ViewKind) -> Image.Image:
    """Class numbers of the nearest colours, UNKNOWN where nothing is shown."""
    import numpy as np
    from PIL import Image

    from ldm.data.view_files import UNKNOWN

    pixels, colours = np.asarray(shown, np.int32), np.array(kind.colours, np.int32)
    away = np.abs(pixels[:, :, None, :3] - colours).sum(3)
    return Image.fromarray(np.where(pixels[..., 3] >= 128, away.argmin(2), UNKNOWN).astype(np.uint8))


def says(slot: tuple[Any, ...]) -> bool:
    """Whether anything was painted, written or loaded in an input."""
    editor, text, file = slot[:3]
    layers = (editor or {}).get("layers") or ()
    return bool(file or str(text or "").strip() or (editor or {}).get("background") or any(layer.getbbox() for layer in layers))


COMPONENTS = 7  # of an input: its heading, what is painted, drawn, written and loaded, its weight, and whether it is made of the picture


def components(view: str, kind: ViewKind) -> tuple[dict[str, Any], ...]:
    """What the components of an input show for a view of a kind."""
    picture, board = is_picture(kind), kind.form in NUMBERS
    text = {"visible": not picture, "label": "One a line", "placeholder": FORMS.get(kind.form, ""), "value": ""}
    shown = '<canvas width="320" height="320"></canvas>' if board else ""
    names = html.escape(",".join(kind.names))
    return (
        {"visible": True, "value": heading(view, kind)},
        {"visible": picture, "value": None},
        {"visible": board, "value": f'<div class="ldm-board" data-form="{kind.form}" data-names="{names}">{shown}</div>'},
        text,
        {"visible": True, "value": None},
        {"visible": True, "value": 1.0},
        {"visible": makes(view), "value": makes(view)},
    )


HOW = {
    "map": "Load or paste a picture, or paint.",
    "embedding": "Load or paste a picture, or paint: it is told by what the model's CLIP makes of it.",
    "classes": "Paint with the colours below, or load a picture of them or of class numbers.",
    "boxes": "Drag a rectangle, then write behind its numbers what is in it.",
    "points": "Click where a point is, then write its name behind its numbers.",
    "graph": "Write what stands how to what.",
}


def heading(view: str, kind: ViewKind) -> str:
    """HTML of an input's name, what to do there, and the colours of classes."""
    chips = "".join(
        f'<span class="ldm-chip"><i style="background:{colour_of(colour)}"></i>{html.escape(name)}</span>'
        for name, colour in zip(kind.names, kind.colours, strict=False)
    )
    return f'<p class="ldm-quiet"><b>{html.escape(view)}</b> {HOW[kind.form]}</p>{chips}'


def colour_of(colour: Sequence[int]) -> str:
    """A colour as pages write it."""
    return "#" + "".join(f"{value:02x}" for value in colour)


def told_by(told: Mapping[str, ViewKind], slots: Sequence[tuple[Any, Any, Any, Any, Any]]) -> tuple[ViewInput, ...]:
    """What the inputs tell of the views that a model reads.

    Args:
        told: by name, as the model reads them; the first of them have an input each.
        slots: of each input what was painted, written and loaded (a path), its weight, and whether it is made of the picture.

    Raises:
        UserError: naming the view and what is wrong.
    """
    found = []
    for (view, kind), (editor, text, file, weight, of) in zip(told.items(), slots, strict=False):
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= 10:
            raise UserError(f"{view}: got the weight {str(weight)[:40]!r}; a number from 0 to 10 is needed")
        of = bool(of) and makes(view)
        if file:
            made: tuple[bytes, bool] | None = Path(file).read_bytes(), of and is_picture(kind)
        elif is_picture(kind):
            made = painted_view(kind, editor, of)
        else:
            made = (written(view, kind, str(text)), False) if str(text or "").strip() else None
        if made is not None:
            found.append(ViewInput(view, made[0], float(weight), made[1]))
    return tuple(found)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
