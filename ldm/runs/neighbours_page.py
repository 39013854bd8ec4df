"""Page of nearest neighbours: every drawn picture beside the training pictures that are nearest to it, with distances."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.runs.report_page import figure, page, table

FILE = "neighbours.html"
GAP = 2  # px between the pictures of a grid


def neighbours_page(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write the page of an evaluation's example pictures, in their folder, and return its path; the nearest pair comes first.

    Raises:
        UserError: where nothing was measured.
    """
    found = result["neighbours"]
    sheets = sorted(folder.glob("neighbours-*.png"), key=lambda path: path.stat().st_mtime)
    if "skipped" in found or not sheets:
        raise UserError(f"neighbours: not measured ({found.get('skipped', 'no pictures')})")
    protocol = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found["protocol"].items())
    values = {name: f"{found[name]:.4f}" for name in ("distance", "closest", "held_out", "closest_held_out")}
    note = (
        f"<p>Cosine distance to the nearest training picture, median and least: {values['distance']} and {values['closest']} of drawn"
        f" pictures, {values['held_out']} and {values['closest_held_out']} of held-out ones. {found['closer']:.0%} of the drawn ones"
        " are nearer than 95 % of the held-out ones; 5 % would be by chance, many more are copies.</p>"
        f'<p class="note">{escape(protocol)}</p>'
    )
    rows = sorted(zip(found["nearest"], _strips(sheets[-1], found["nearest"]), strict=True), key=lambda row: row[0]["distances"][0])
    shown = "".join(f'<h3>{escape(one["caption"])}</h3><div class="row">{strip}</div>' for one, strip in rows)
    figures = table(
        ["caption", "nearest sample", "distance"],
        [[escape(one["caption"]), str(one["samples"][0]), f"{one['distances'][0]:.4f}"] for one, _ in rows],
        words=True,
    )
    path = folder / FILE
    title = f"Nearest neighbours of {result['model']}"
    path.write_text(
        page(title, f"<h1>{escape(title)}</h1>{note}", [("pictures", "Pictures", shown), ("all", "Distances", figures)]), encoding="utf-8"
    )
    return path


def _strips(sheet: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Each row of the grid: the drawn picture and its neighbours, with their distances below."""
    from PIL import Image

    columns = 1 + len(rows[0]["samples"])
    with Image.open(sheet) as opened:
        image = opened.convert("RGB")
    side = (image.width + GAP) // columns - GAP
    high = (image.height + GAP) // len(rows) - GAP
    for line, row in enumerate(rows):
        said = ["drawn", *(f"sample {n}: {d:.4f}" for n, d in zip(row["samples"], row["distances"], strict=True))]
        cells = []
        for column, text in enumerate(said):
            left, top = column * (side + GAP), line * (high + GAP)
            target = BytesIO()
            image.crop((left, top, left + side, top + high)).save(target, format="PNG")
            data = base64.b64encode(target.getvalue()).decode()
            times = max(1, min(4, 200 // side))
            cells.append(figure(f'<img class="pixels" width="{side * times}" alt="" src="data:image/png;base64,{data}">', text))
        yield "".join(cells)
