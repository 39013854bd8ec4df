"""HTML report of a data set check: figures and a grid of samples with captions, self-contained."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.runs.report_page import page

if TYPE_CHECKING:
    from ldm.data.check import DataReport
    from ldm.data.images import View
    from ldm.data.photos import Photos

SAMPLES, SIDE = 48, 160  # pictures of the grid, px
GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(160px,1fr));gap:12px"


def data_page(found: DataReport, parts: list[Photos]) -> str:
    """The HTML; every text of the data is escaped, and nothing is loaded from anywhere."""
    left = sum(found.rejected.values())
    tiles = {"images": f"{found.images:,}", "captions": f"{found.captions:,}", "left out": f"{left:,}", "kind": found.kind}
    header = f"<h1>{escape(found.path)}</h1><div class=tiles>" + "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{name}</span></div>" for name, value in tiles.items()
    )
    rejected = _table(("reason", "samples"), ((escape(r), f"{n:,}") for r, n in sorted(found.rejected.items(), key=lambda item: -item[1])))
    examples = "".join(f"<li>{escape(text[:300])}</li>" for text in found.examples)
    damage = "".join(f"<li>{escape(name)}: {escape('; '.join(places)[:500])}</li>" for name, places in found.damage.items())
    undecodable = ", ".join(f"{n} {escape(r)}" for r, n in found.undecodable.items()) or "all can"
    buckets = _table(
        ("width x height", "images", "cut away", "enlarged"),
        ((f"{b['width']} x {b['height']}", f"{b['images']:,}", f"{b['cut']:.1%}", f"{b['enlarged']:,}") for b in found.buckets),
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in found.notes)
    rejected = rejected + f"<ul>{examples}</ul>" if left else ""
    sections = [
        ("samples", "Samples", _grid(parts)),
        ("left", "Left out", rejected + (f"<h3>Damaged shards</h3><ul>{damage}</ul>" if damage else "")),
        ("sizes", "Sizes", f"<h3>Shorter side, px</h3>{_bars(found.sides)}<h3>Width over height</h3>{_bars(found.aspects)}"),
        ("captions", "Captions", f"<h3>Characters</h3>{_bars(found.caption_characters)}<p>{found.repeated_captions:,} are not unique.</p>"),
        ("buckets", f"Buckets of {found.resolution} px", buckets),
        ("notes", "Notes", f"{notes}<p class=soft>{found.decoded:,} images were decoded: {undecodable}.</p>"),
    ]
    return page(f"{found.path}: data", header + "</div>", sections)


def _table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<div class=panel><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _bars(bars: Mapping[str, int]) -> str:
    most = max(bars.values(), default=1)
    rows = "".join(f'<tr><td>{low}</td><td class=bar style="--share:{100 * n / most:.1f}%">{n:,}</td></tr>' for low, n in bars.items())
    return f"<div class=panel><table>{rows}</table></div>"


def _data(pixels: NDArray[np.uint8]) -> str:
    """A picture (H,W,3) as an address that holds it."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _maps(part: Photos, index: int, seen: View) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The maps of a sample by view, as pictures (H,W,3) of the part of it that is seen; classes in their colours, or in greys."""
    from ldm.data.images import Rejected
    from ldm.data.view_files import map_view

    try:
        kinds = part.views()
    except UserError:  # the check tells it
        return
    for name, kind in kinds.items():
        if kind.form not in ("map", "classes"):
            continue
        try:
            values = map_view(part.read_view(index, name), kind, seen.size)
        except (Rejected, KeyError):
            continue
        if kind.form == "classes":
            greys = [(255 * n // max(kind.channels - 1, 1),) * 3 for n in range(kind.channels)]
            yield name, np.array([*(kind.colours or greys), (255, 0, 255)], np.uint8)[values[0]]
        else:
            yield name, np.broadcast_to(values.transpose(1, 2, 0), (*values.shape[1:], 3))


def _grid(parts: list[Photos]) -> str:
    """Samples spread evenly over the training part, as they lie in the training square's middle."""
    from ldm.data.images import Rejected, view

    part = parts[0]
    figures = []
    for index in np.unique(np.linspace(0, len(part) - 1, min(SAMPLES, len(part))).round().astype(int)).tolist():
        try:
            seen = view(part.read(index), SIDE)
        except Rejected:
            continue
        source = _data(seen.pixels)
        caption = escape(part.all_captions([index])[0][0][:200])
        size = f"{seen.size[1]} x {seen.size[0]}"
        title = escape(part.name(index))
        maps = [f'<img alt="{name}" title="{name}" src="{_data(picture)}">' for name, picture in _maps(part, index, seen)]
        said = f"{''.join(maps)}{caption}<br><small>{size}</small>"
        figures.append(f'<figure title="{title}"><img alt="" src="{source}"><figcaption>{said}</figcaption></figure>')
    return f'<div style="{GRID}">{"".join(figures)}</div>'
