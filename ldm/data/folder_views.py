"""Views of an image folder: maps in folders beside the pictures, columns of its tables, COCO annotations, and pairs of pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from ldm.config.errors import UserError
from ldm.data.file_names import Names, split
from ldm.data.images import Rejected, to_rgb
from ldm.data.view_files import NUMBERED, UNKNOWN, words_view
from ldm.data.views import ViewKind
from ldm.diffusion.batch import View

Layout = Literal["plain", "ab", "A_B"]
MAPS: Mapping[str, ViewKind] = {  # views that may lie as pictures in a folder of their name
    "labels": ViewKind(form="classes"),
    **{name: ViewKind(form="map", channels=1) for name in ("edges", "sketch", "depth", "grey")},
    **{name: ViewKind(form="map", channels=3) for name in ("source", "style")},
}
WORDS: Mapping[str, ViewKind] = {"boxes": ViewKind(form="boxes"), "points": ViewKind(form="points"), "graph": ViewKind(form="graph")}
APART = ("style",)  # of them those that show other things, which lie elsewhere
COLUMNS = {**{name: name for name in (*MAPS, *WORDS)}, "triples": "graph"}  # of tables, by the view that they tell
PALETTE = "palette.csv"  # in the folder of labels: r,g,b,name of each class
LOOKED_AT = 2000  # label maps at most that are read to count classes where no palette tells them


@dataclass
class FolderViews:
    """What else a folder tells of its pictures.

    Args:
        maps: by view and picture the file of its map, below `root`.
        words: by view and picture what a table or COCO file tells, and the size in px that its numbers are of; None: the picture's own.
        files: everything that is a view's and no picture to learn from.
        required: views that every picture must have, as the configuration names them.
    """

    root: Path
    maps: dict[str, dict[str, str]] = field(default_factory=dict)
    words: dict[str, dict[str, tuple[Any, tuple[int, int] | None]]] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of points, by view
    files: set[str] = field(default_factory=set)
    required: tuple[str, ...] = ()
    broken: dict[str, dict[str, str]] = field(default_factory=dict)  # by view and picture, why what is told cannot be read
    places: dict[str, str] = field(default_factory=dict)  # by view of maps, their folder

    @cached_property
    def kinds(self) -> dict[str, ViewKind]:
        """By view; of labels with as many classes as the palette tells, or the maps have."""
        found = {name: MAPS[name] for name in self.maps} | {name: WORDS[name] for name in self.words}
        if "points" in found:
            found["points"] = ViewKind(form="points", names=self.names.get("points", ()))
        if "labels" in found:
            found["labels"] = self._labels()
        return found

    def _labels(self) -> ViewKind:
        palette = self.root / self.places.get("labels", "labels") / PALETTE
        if palette.is_file():
            return read_palette(palette)
        files = sorted(self.maps["labels"].values())
        if len(files) > LOOKED_AT:
            raise UserError(
                f"{palette}: missing; write r,g,b,name of each class, a line each, as {len(files)} maps are too many to count in"
            )
        most = -1
        for name in files:
            try:
                with Image.open(self.root / name) as image:
                    if image.mode in NUMBERED:
                        values = np.asarray(image)
                        most = max(most, int(values[values != UNKNOWN].max(initial=0)))
            except OSError:
                continue  # told where it is read
        if most < 0:
            raise UserError(f"{palette}: missing; these maps are in colours, so write r,g,b,name of each class, a line each")
        if not most:
            why = f"the one class in these maps is 0, beside {UNKNOWN} where it is unknown"
            raise UserError(f"{palette}: missing; {why}; write r,g,b,name of each class, a line each, or make the others 1, 2, ...")
        return ViewKind(form="classes", channels=most + 1)

    def entries(self, picture: str, size: tuple[int, int]) -> dict[str, View]:
        """What tables and COCO files tell of a picture of `size` (height, width) px, as shares of its sides.

        Raises:
            Rejected: for what is no such view.
        """
        found = {}
        for name, rows in self.words.items():
            if picture not in rows:
                if name in self.required and name != "boxes":
                    raise Rejected(f"no {name}")
                continue
            said, own = rows[picture]
            kind = WORDS[name] if name != "points" else ViewKind(form="points", names=self.names.get("points", ()))
            try:
                found[name] = words_view(shares(said, own or size, own is not None), kind)
            except Rejected as error:
                if name in self.required:
                    raise
                self.broken.setdefault(name, {})[picture] = str(error)  # a column of this name may mean something else
        for name in self.maps:
            if name in self.required and picture not in self.maps[name]:
                raise Rejected(f"no {name}")
        return found


def shares(said: Any, size: tuple[int, int], px: bool) -> Any:
    """Boxes and points as shares of a picture's sides: numbers above 1 are px.

    Args:
        px: whether they are px in any case.
    """
    try:
        said = json.loads(said) if isinstance(said, str) else said
    except (ValueError, RecursionError) as error:
        raise Rejected("not JSON", str(error)) from None
    if not isinstance(said, list):
        return said
    height, width = size
    sides = {"box": (width, height, width, height), "point": (width, height)}
    lists = [values for one in said if isinstance(one, dict) for key in sides if isinstance(values := one.get(key), list)]
    if not px and not any(type(value) in (int, float) and value > 1.01 for values in lists for value in values):
        return said

    def scaled(one: Any) -> Any:
        for key, by in sides.items():
            values = one.get(key) if isinstance(one, dict) else None
            if isinstance(values, list) and len(values) == len(by) and all(type(v) in (int, float) for v in values):
                own = [v / side for v, side in zip(values, by, strict=True)]
                if not all(-0.01 <= value <= 1.01 for value in own):
                    raise Rejected(f"no {key}", f"{values} px, of a picture of {width}x{height}")
                one = {**one, key: own}
        return one

    return [scaled(one) for one in said]


def read_palette(file: Path) -> ViewKind:
    """Classes by lines of r,g,b,name; a first line of other words is a heading.

    Raises:
        UserError: naming the line.
    """
    colours: list[tuple[int, int, int]] = []
    names: list[str] = []
    for number, row in enumerate(csv.reader(io.StringIO(file.read_text(encoding="utf-8-sig"))), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and not cells[0].isdecimal()):
            continue
        if len(cells) < 3 or not all(cell.isdecimal() and int(cell) < 256 for cell in cells[:3]):
            raise UserError(f"{file}, line {number}: got {','.join(cells)[:60]!r}; r,g,b,name with numbers from 0 to 255 are needed")
        colour = (int(cells[0]), int(cells[1]), int(cells[2]))
        if colour in colours:
            raise UserError(
                f"{file}, line {number}: {','.join(cells)[:60]!r} has the colour of class {colours.index(colour)}; give it another"
            )
        colours.append(colour)
        names.append(",".join(cells[3:]))
    if not colours:
        raise UserError(f"{file}: no class in it; write r,g,b,name, a line each")
    return ViewKind(form="classes", channels=len(colours), names=tuple(names), colours=tuple(colours))


def find_views(
    root: Path,
    names: Sequence[str],
    asked: Mapping[str, str],
    layout: Layout,
    columns: Mapping[str, Mapping[str, tuple[str, object]]],
    captioned: Callable[[str], bool] | None,
) -> FolderViews:
    """The views of a folder.

    Args:
        names: of all pictures below it, maps among them.
        asked: by view where it lies: a folder of maps, a COCO file, or `auto`, made of the pictures; others in folders of their names.
        columns: of its tables, by view and picture, what they tell with the table's own folder.
        captioned: whether a picture has a caption of its own, and so is none of a view's; None: all have one.

    Raises:
        UserError: for what is asked and not there.
    """
    found = FolderViews(root, required=tuple(name for name, place in asked.items() if place != "auto"))
    if wrong := [name for name in asked if name not in COLUMNS.values()]:
        raise UserError(f"data.views.{wrong[0]}: no such view; a folder may tell {', '.join(dict.fromkeys(COLUMNS.values()))}")
    inside: dict[str, list[str]] = {}
    for name in names:
        inside.setdefault(name.partition("/")[0] if "/" in name else "", []).append(name)
    places = {name: place for name, place in asked.items() if name in MAPS and place != "auto"}
    if layout == "A_B":
        places.setdefault("source", "A")
    for name in MAPS:
        if name not in asked and name in inside and captioned is not None and not any(map(captioned, inside[name])):
            places.setdefault(name, name)
    for view, place in places.items():
        prefix = "" if place in ("", ".") else place.rstrip("/") + "/"
        own = [name for name in names if name.startswith(prefix)] if ".." not in place.split("/") else _outside(root, place)
        if not own and (view in asked or layout == "A_B"):
            raise UserError(f"data.views.{view}: no pictures in {root / place}; give the folder that holds them")
        below = "B/" if layout == "A_B" else ""
        by_stem = Names({split(name[len(prefix) :])[0]: name for name in own})
        last = Names({split(name)[0].rpartition("/")[2]: name for name in own})
        matched = {}
        for picture in names:
            if picture in own:
                continue
            stem = split(picture.removeprefix(below))[0]
            if hit := by_stem.find(stem) or (last.find(stem.rpartition("/")[2]) if "/" in stem or not below else None):
                matched[picture] = hit
        if matched or view in asked:
            found.maps[view], found.places[view] = matched, place
            found.files |= set(own)
    for view, rows in columns.items():
        if view in MAPS and view not in found.maps:  # a column of this name that names no pictures here means something else
            there = Names({name: name for name in names})
            cells = {picture: there.find(f"{folder}/{cell}" if folder else str(cell)) for picture, (folder, cell) in rows.items()}
            if matched := {picture: file for picture, file in cells.items() if file}:
                found.maps[view] = matched
                found.files |= set(matched.values()) - set(rows)  # a picture of the table may be another's source
        elif view in WORDS and view not in asked:
            found.words[view] = {picture: (cell, None) for picture, (_, cell) in rows.items() if cell}
    for view, place in asked.items():
        if view in WORDS:
            _coco(found, view, root / place, names)
    return found


def _outside(root: Path, place: str) -> list[str]:
    folder = root / place
    return [f"{place}/{path.relative_to(folder).as_posix()}" for path in sorted(folder.rglob("*")) if path.is_file()]


def _coco(found: FolderViews, view: str, file: Path, names: Sequence[str]) -> None:
    """Boxes with their categories, or named points, of COCO's annotations.

    Raises:
        UserError: for a file that is none.
    """
    if not file.is_file():
        raise UserError(f"data.views.{view}: {file}: no such file; give COCO annotations, or a column {view} in metadata.jsonl")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        pictures = {int(one["id"]): one for one in content["images"]}
        categories = {int(one["id"]): one for one in content.get("categories", ())}
        own = [name for name in names if name not in found.files]  # a map may have its picture's name
        whole, last = Names({name: name for name in own}), Names({name.rpartition("/")[2]: name for name in own})

        def picture_of(one: Mapping[str, Any]) -> str | None:
            said = str(one["file_name"])
            return whole.find(said) or last.find(said.rpartition("/")[2])

        rows: dict[str, tuple[Any, tuple[int, int] | None]] = {}
        for one in pictures.values():
            if picture := picture_of(one):
                rows[picture] = ([], (int(one["height"]), int(one["width"])) if "height" in one and "width" in one else None)
        points = next((tuple(one["keypoints"]) for one in categories.values() if "keypoints" in one), ())
        for one in content["annotations"]:
            picture = picture_of(pictures[int(one["image_id"])])
            if picture is None or one.get("iscrowd"):
                continue
            if view == "boxes":
                x, y, width, height = (float(value) for value in one["bbox"])
                if not (text := one.get("caption")):
                    if (number := int(one["category_id"])) not in categories:
                        known = ", ".join(map(str, list(categories)[:5])) or "none"
                        raise UserError(f"data.views.{view}: {file}: category_id {number} is none of its categories ({known})")
                    text = categories[number]["name"]
                if width > 0 and height > 0:
                    rows[picture][0].append({"box": [x, y, x + width, y + height], "text": str(text)})
            else:
                flat = [float(value) for value in one.get("keypoints", ())]
                for name, (x, y, seen) in zip(points, zip(flat[::3], flat[1::3], flat[2::3], strict=True), strict=False):
                    if seen:
                        rows[picture][0].append({"point": [x, y], "name": name})
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"data.views.{view}: {file} is no file of COCO annotations ({type(error).__name__}: {error})") from None
    if not rows:
        raise UserError(f"data.views.{view}: {file} names none of these pictures; its file_name must be theirs")
    found.words[view], found.names[view] = rows, points


def half(data: bytes, right: bool) -> bytes:
    """The left or the right half of a picture of two beside each other, as a file of its own.

    Raises:
        Rejected: if it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as found:
            image = to_rgb(ImageOps.exif_transpose(found))
    except Rejected:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise Rejected("damaged image", f"{type(error).__name__}: {error}") from None
    middle = image.width // 2
    out = io.BytesIO()
    image.crop((image.width - middle, 0, image.width, image.height) if right else (0, 0, middle, image.height)).save(out, "BMP")
    return out.getvalue()
