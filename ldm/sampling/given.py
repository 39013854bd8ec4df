"""Given views: files that tell a model more of a picture than its prompt does, as requests name them and recipes remember them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.families.draws import Draws
from ldm.sampling.adapters import remembered, shown_path

if TYPE_CHECKING:
    from ldm.data.views import ViewKind
    from ldm.diffusion.batch import Mixed, View

OF = "of:"  # before a file: the view is made of this picture
TEXT = "text:"  # before words: their embedding, where the view is one
BLANK = 0.1  # share of a class map without classes that is told of
FORM = "VIEW=FILE, VIEW=FILE@WEIGHT or VIEW=of:PICTURE are needed, such as edges=lines.png@0.7"


@dataclass(frozen=True)
class Given:
    """One view of a request."""

    view: str
    file: str
    weight: float = 1.0
    of: bool = False  # whether the view is made of the picture in the file
    text: bool = False  # whether the file is none, but words


def parse(word: str) -> Given:
    """What VIEW=FILE[@WEIGHT] names.

    Raises:
        UserError: for anything else.
    """
    view, equals, file = word.partition("=")
    path, at, number = file.rpartition("@")
    weight = 1.0
    if at and path:
        with contextlib.suppress(ValueError):  # an @ of the file's name
            weight, file = float(number), path
    start = next((start for start in (OF, TEXT) if file.startswith(start)), "")
    name = file.removeprefix(start)
    if not equals or not view or not name.strip() or not math.isfinite(weight) or not -10 <= weight <= 10:
        raise UserError(f"given: got {word!r}; {FORM}, with a weight from 0 to 10")
    return Given(view, name, weight, start == OF, start == TEXT)


@dataclass
class Files:
    """The files that recipes tell of, by their hashes, as this machine has them.

    Args:
        told: the views that the model reads.
        unheard: what of a view it is not told (`Draws.unheard`).
        kept: what files hold stays in memory, so that they may go; recipes tell their names without folders.
    """

    told: Mapping[str, ViewKind]
    unheard: Callable[[str, View], Iterable[str]] = lambda name, view: ()
    kept: bool = False
    paths: dict[str, Path] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    def field(self, words: Sequence[str], old: Mapping[str, Any], tell: Callable[[str], None]) -> str:
        """The field `given` of a recipe.

        Args:
            words: VIEW=FILE[@WEIGHT].
            old: a recipe that is followed where no words are given; its files must be where they were, with the same content.
            tell: told where what is given is not what the recipe had.

        Raises:
            UserError: naming what is missing, has changed, or is not read by the model.
        """
        from ldm.formats.atomic import sha256

        before = remembered(old, "given", bool(words))
        entries: list[dict[str, Any]] = []
        for given in [parse(word) for word in words] or [_again(entry) for entry in before]:
            path, view = at_home(given.file), self.named(given.view)
            entry = {"view": view, "file": given.file, "weight": given.weight, "hash": "", "of": given.of}
            if self.told[view].form == "embedding" and given.text:
                entries.append({**entry, "text": True})
                self._doubt(entries[-1], self._mixed(entries[-1:], (64, 64)), tell)
                continue
            if given.text or (given.weight < 0 and self.told[view].form != "embedding"):
                what = f"{TEXT}{given.file}" if given.text else f"weight {given.weight:g}"
                raise UserError(f"given: {given.view}: got {what}, which only an embedding takes; give a file, with a weight from 0 to 10")
            if not path.is_file():
                fix = "" if words else f": this picture was drawn with it; give it by --given {given.view}=FILE"
                raise UserError(f"given: {given.view}={given.file}: no such file{fix}")
            own, twice = sha256(path), [one for one in entries if one["view"] == view]
            if twice and self.told[view].form != "embedding":
                raise UserError(f"given: {view} is told twice, by {twice[0]['file']} and {given.file}; keep one")
            self.paths[own] = path
            if self.kept:
                self.contents[own] = path.read_bytes()
            entries.append({**entry, "file": path.name if self.kept else shown_path(given.file), "hash": own})
            if remark := _remark(path):
                tell(f"given: {view}={given.file}: {remark}")
            self._doubt(entries[-1], self.view(entries[-1], (64, 64)), tell)  # what cannot be read is told before anything is drawn
        for one, other in zip(before, entries, strict=False) if not words else ():
            if one["hash"] != other["hash"]:
                raise UserError(
                    f"from: {one['file']} is not the file that the picture was drawn with; give that by --given {one['view']}=FILE"
                )
        if words and [{**one, "file": ""} for one in before] not in ([], [{**one, "file": ""} for one in entries]):
            tell("the picture was drawn with other views given: it will differ")
        return json.dumps(entries, ensure_ascii=False) if entries else ""

    def named(self, name: str) -> str:
        """The view of the model that a name means, with or without what stands behind its colon.

        Raises:
            UserError: where it reads none of that name.
        """
        if not self.told:
            raise UserError(f"given: got {name}, but this model reads no views of pictures; leave --given out, or choose one that does")
        near = [view for view in self.told if name in (view, view.partition(":")[0])]
        if len(near) != 1:
            raise UserError(f"given: this model reads no view {name!r}; it reads {', '.join(self.told)}")
        return near[0]

    def view(self, entry: Mapping[str, Any], size: tuple[int, int]) -> View:
        """The view of one entry of a recipe, for a picture of `size` (height, width) px.

        Raises:
            UserError: naming the file and what is wrong with it.
        """
        import torch

        from ldm.data.images import Rejected
        from ldm.data.images import view as picture_view
        from ldm.data.view_files import map_view, words_view
        from ldm.data.views import ANY, from_picture, parted
        from ldm.diffusion.rng import Rng

        name, own = str(entry["view"]), entry["hash"]
        kind = self.told[name]
        try:
            data = self.contents[own] if own in self.contents else self.paths[own].read_bytes()
            if entry.get("of") or kind.form == "embedding":
                if parted(name)[0] not in ANY:
                    raise Rejected(f"no {name} can be made of a picture", f"only {', '.join(ANY)}; give the view itself")
                pixels = torch.from_numpy(picture_view(data, size).pixels.transpose(2, 0, 1).copy())[None]
                found = from_picture([name], pixels, Rng(0, [0]))[name]
                assert isinstance(found, torch.Tensor)
                return found.float() / 255
            if kind.form not in ("map", "classes"):
                return words_view(data, kind)
            values = torch.from_numpy(map_view(data, kind, size).copy())[None]
            return values if kind.form == "classes" else values.float() / 255
        except Rejected as error:
            raise UserError(f"given: {name}={entry['file']}: {error}") from None
        except OSError as error:
            raise UserError(f"given: {name}={entry['file']}: {error.strerror or error}") from None

    def _doubt(self, entry: Mapping[str, Any], view: View, tell: Callable[[str], None]) -> None:
        """Tell what of an entry's view changes nothing."""
        name, own = entry["view"], f"given: {entry['view']}={entry['file']}"
        if self.told[name].form == "classes" and not entry["of"]:
            blank = float((view < 0).double().mean())  # type: ignore[operator, union-attr]
            if blank > BLANK:
                tell(f"{own}: {blank:.0%} of it has no class, where the model is told nothing")
        for said in self.unheard(name, view):
            tell(f"{own}: {said}")

    def edits(self, family: Draws, told: str, size: tuple[int, int]) -> tuple[Any, ...]:
        """What a model is told to draw by a recipe's `given`."""
        entries = remembered({"given": told}, "given")
        if not entries:
            return ()
        views, weights = {}, {}
        for name in dict.fromkeys(str(one["view"]) for one in entries):
            own = [one for one in entries if one["view"] == name]
            alone = len(own) == 1 and own[0]["weight"] >= 0 and not own[0].get("text")
            views[name] = self.view(own[0], size) if alone else self._mixed(own, size)
            weights[name] = float(own[0]["weight"]) if alone else 1.0
        return family.tell(views, weights, size)

    def _mixed(self, entries: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Mixed:
        """The weighted sum of embeddings of pictures and of words."""
        import torch

        from ldm.diffusion.batch import Mixed

        said = [one for one in entries if one.get("text")]
        seen = [one for one in entries if not one.get("text")]
        shown = [self.view(one, size) for one in seen]
        pictures = (
            torch.stack([view[0] for view in shown if isinstance(view, torch.Tensor)])[None] if shown else torch.zeros(1, 0, 3, *size)
        )
        weight = torch.tensor([[float(one["weight"]) for one in (*seen, *said)]])
        return Mixed(image=pictures, words=(tuple(str(one["file"]) for one in said),), weight=weight)


def _remark(path: Path) -> str:
    """What is to be said of a picture that is taken; what is wrong with it is told where it is read."""
    from ldm.data.images import FIRST, Rejected, header

    try:
        return FIRST if header(path).several else ""
    except (Rejected, OSError):
        return ""


def _again(entry: Mapping[str, Any]) -> Given:
    """What a recipe's entry was given by."""
    return Given(entry["view"], entry["file"], entry["weight"], bool(entry.get("of")), bool(entry.get("text")))
