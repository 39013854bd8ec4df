"""Event handlers of the page: what happens when one of its components is used. Everything that draws is in the studio."""

from __future__ import annotations

import asyncio
import io
import math
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.grid import sheet
from ldm.config.errors import UserError
from ldm.demo.files import Shelf
from ldm.demo.guard import USER
from ldm.demo.orders import MAX_PICTURES, NAMES, Form, blank, check_upload, fill_in, order_of, read_form
from ldm.demo.status import command, finished, panel, progress
from ldm.demo.studio import DrawOrder, Job, Studio
from ldm.families.draws import Draws
from ldm.sampling.axes import Axis, cells, read_axis
from ldm.sampling.recipe import read_recipe

if TYPE_CHECKING:
    import gradio as gr

EMPTY = Axis("", ("",))
BLOBS = 2**28  # bytes
PERIOD_S = 0.15  # between two looks at a drawing
OWN_SPACING = "the sampler's own"


def load_gradio() -> Any:
    """gradio, under the name by which it finds what this module's functions want of it."""
    global gr
    import gradio as gr

    return gr


@dataclass
class Page:
    """What the page's functions share."""

    studio: Studio
    shelf: Shelf
    model: str  # its name
    facts: str  # about it, a few words
    largest: int  # px, of a side
    precision: str = ""  # of the networks' weights; empty: the model's own
    added: dict[str, str] = field(default_factory=dict)  # what recipes tell of its LoRAs and words
    jobs: dict[str, set[Job]] = field(default_factory=dict)  # by browser tab

    @property
    def family(self) -> Draws:
        """The model."""
        return self.studio.family

    def form(self, values: list[Any]) -> Form:
        """What the components say; `values` in the order of NAMES."""
        told = dict(zip(NAMES, values, strict=True))
        if told["spacing"] == OWN_SPACING:
            told["spacing"] = ""
        return read_form(told, self.largest, blank(self.family, self.precision))

    async def generate(self, request: gr.Request, fresh: bool, editor: Any, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draw what the form says: panel, pictures, seed, the two buttons, paths."""
        same, off, on = gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
        try:
            form = self.form(list(values))
            if fresh:
                form = replace(form, seed=secrets.randbelow(2**32))
            files = await asyncio.to_thread(painted, editor)
            order = await asyncio.to_thread(order_of, self.family, self.model, form, *files, added=self.added)
            async with self._drawing(order, request) as job:
                yield progress(job, self.studio.ahead(job)), [], form.seed, off, on, []
                async for said, paths in self._follow(job, user_of(request)):
                    yield said, same if paths is None else shown(paths), same, same, same, same if paths is None else paths
            init_image = [self.shelf.put(f"{name}.png", data) for name, data in zip(("init", "mask"), files, strict=True) if data]
            again = command(order.recipes[0], len(order.recipes), self.model, init_image) if job.state == "done" else ""
            paths = await asyncio.to_thread(self._kept, job, user_of(request))
            yield finished(job, again), shown(paths), same, on, off, paths
        except UserError as error:
            yield panel(str(error), bad=True), same, same, on, off, same

    async def grid(
        self, request: gr.Request, x: str, xs: str, y: str, ys: str, editor: Any, *values: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Draw a sheet of what the form says, varied along two axes: panel, sheet, the two buttons."""
        same, off, on = gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
        try:
            form = replace(self.form(list(values)), pictures=1)
            files = await asyncio.to_thread(painted, editor)
            base = await asyncio.to_thread(order_of, self.family, self.model, form, *files, added=self.added)
            axes, whole = varied(base, (y or "", ys or ""), (x or "", xs or ""), form.spacing)
            async with self._drawing(whole, request) as job:
                yield progress(job, self.studio.ahead(job)), None, off, on
                async for said, _ in self._follow(job, user_of(request)):
                    yield said, same, same, same
            await asyncio.to_thread(self._kept, job, user_of(request))
            path = None
            if job.state == "done":
                made = await asyncio.to_thread(sheet, [job.pictures[i] for i in range(len(whole.recipes))], axes)
                path = str(await asyncio.to_thread(self.shelf.put, "grid.png", png(made)))
            yield finished(job), path, on, off
        except UserError as error:
            yield panel(str(error), bad=True), same, on, off

    @asynccontextmanager
    async def _drawing(self, order: DrawOrder, request: gr.Request) -> AsyncIterator[Job]:
        """A job of a browser tab, which ends with whoever waits for it."""
        tab = str(request.session_hash)
        job = self.studio.submit(user_of(request), order)
        if order.init_image is not None:
            job.notes.extend(order.init_image.notices)
        self.jobs.setdefault(tab, set()).add(job)
        try:
            yield job
        finally:
            self.studio.cancel(job)
            self.jobs.get(tab, set()).discard(job)

    async def _follow(self, job: Job, user: str) -> AsyncIterator[tuple[str, list[str] | None]]:
        """What is new about a job until it is over: the panel, and its pictures where there are more."""
        said, count = "", 0
        while not job.over:
            await asyncio.sleep(PERIOD_S)
            fresh, done = progress(job, self.studio.ahead(job)), len(job.pictures)
            if fresh != said:
                yield fresh, (await asyncio.to_thread(self._kept, job, user)) if done > count else None
                said, count = fresh, done

    def _kept(self, job: Job, user: str) -> list[str]:
        """The files of a job's pictures so far."""
        paths: dict[int, str] = job.__dict__.setdefault("paths", {})
        for place, pixels in sorted(job.pictures.items()):
            if place not in paths:
                paths[place] = str(self.shelf.keep(user, job.order.recipes[place], pixels))
        return [paths[place] for place in sorted(paths)]

    def cancel(self, request: gr.Request) -> Any:
        """Stop what this tab waits for."""
        for job in list(self.jobs.get(str(request.session_hash), ())):
            self.studio.cancel(job)

    def leave(self, request: gr.Request) -> None:
        """The tab was closed."""
        for job in self.jobs.pop(str(request.session_hash), set()):
            self.studio.cancel(job)

    def read(self, path: str | None, *values: Any) -> tuple[Any, ...]:
        """The form with a picture's settings: the note, then `values` in the order of NAMES, then whether seeds are fresh."""
        try:
            if path is None:
                raise UserError("choose a picture first")
            check_upload("picture", Path(path).read_bytes())
            found = read_recipe(Path(path))
            form, notes = fill_in(blank(self.family, self.precision), found, self.family.content_hash, self.largest, self.added)
        except (UserError, OSError) as error:
            said = str(error).replace(f"{path}: ", "") if isinstance(error, UserError) else "the picture is gone"
            return panel(said, bad=True), *[gr.skip()] * len(NAMES), gr.skip()
        filled = [getattr(form, name) or OWN_SPACING if name == "spacing" else getattr(form, name) for name in NAMES]
        return panel(" ".join(["The picture's settings are filled in.", *notes])), *filled, False

    def history(self, request: gr.Request) -> tuple[Any, list[str]]:
        """What this user drew: pictures with captions, and their paths."""
        found = self.shelf.history(user_of(request))
        return [(str(one.path), f"{one.recipe.prompt} · seed {one.recipe.seed}") for one in found], [str(one.path) for one in found]

    def forget(self, request: gr.Request) -> tuple[Any, list[str]]:
        """Remove what this user drew."""
        self.shelf.forget(user_of(request))
        return [], []


class Blobs(dict[str, Any]):
    """What browsers' editors sent and nobody asked for yet: pictures of sane sizes, at most BLOBS bytes; the oldest go first."""

    def __setitem__(self, key: str, value: Any) -> None:
        for data in _parts(value):
            check_upload("picture", data)
        self.pop(key, None)
        super().__setitem__(key, value)
        while len(self) > 1 and sum(len(data) for one in self.values() for data in _parts(one)) > BLOBS:
            del self[next(iter(self))]


def _parts(value: Any) -> list[bytes]:
    return [data for data in (value.background, value.composite, *value.layers) if data]


def user_of(request: gr.Request) -> str:
    """Who sent a request: the guard gives everyone a name."""
    return str(request.cookies.get(USER) or request.session_hash)


def shown(paths: list[str]) -> list[tuple[str, str]]:
    """Pictures with captions, as the gallery wants them."""
    return [(path, Path(path).stem.replace("seed", "seed ")) for path in paths]


def chosen_place(event: gr.SelectData) -> int:
    """Which picture of a gallery was chosen."""
    return int(event.index)


def at_place(paths: list[str], place: int) -> str | None:
    """The chosen picture, or the first; None where there is none."""
    return paths[place if 0 <= place < len(paths) else 0] if paths else None


def background(paths: list[str], place: int) -> tuple[Any, str]:
    """What the editor shows, the chosen picture without paint; and the panel."""
    path = at_place(paths, place)
    if path is None or not Path(path).is_file():
        return gr.skip(), panel("Choose a picture first.", bad=True)
    return {"background": path, "layers": [], "composite": None}, panel("The picture is in the editor, under Start from a picture.")


def varied(base: DrawOrder, down: tuple[str, str], across: tuple[str, str], spacing: str) -> tuple[list[Axis], DrawOrder]:
    """The axes of a table, and the order of its cells.

    Args:
        down, across: a setting's name and its values; an empty name: nothing changes.
        spacing: of the steps for every sampler; empty: each its own.

    Raises:
        UserError: as `ldm.sampling.axes` has it, for too many cells, and for what changes nothing.
    """
    from ldm.diffusion.samplers import SAMPLERS

    given = [(name, text, option) for (name, text), option in ((down, "down"), (across, "across")) if name]
    axes = [read_axis(f"{name}={text}", option) for name, text, option in given]
    if math.prod(len(axis.values) for axis in axes) > MAX_PICTURES:
        raise UserError(f"grid: {' x '.join(str(len(axis.values)) for axis in axes)} pictures; at most {MAX_PICTURES}")
    for axis in axes:
        if axis.name == "lora":
            raise UserError("lora: this page's LoRAs are merged into its model when it starts; `ldm grid` varies their weights")
        if axis.name == "strength" and base.init_image is None:
            raise UserError("strength: changes nothing without a picture to start from")
        if axis.name == "hires_strength" and base.recipes[0].hires == 1:
            raise UserError("hires_strength: changes nothing where pictures are drawn at once")
    made = cells(base.recipes[0], axes, lambda name: spacing or SAMPLERS[name].spacing)
    shown = [next((axis for axis, one in zip(axes, given, strict=True) if one[2] == option), EMPTY) for option in ("down", "across")]
    return shown, DrawOrder(tuple(made), base.init_image)


def painted(editor: Any) -> tuple[bytes | None, bytes | None]:
    """The picture to start from and what of it is to be new, as PNG files.

    Raises:
        UserError: for paint without a picture.
    """
    from PIL import Image, ImageChops

    value = editor or {}
    picture, mask = value.get("background"), None
    for layer in value.get("layers") or []:
        paint = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha >= 128))
        mask = paint if mask is None else ImageChops.lighter(mask, paint)
    mask = mask if mask is not None and mask.getbbox() else None
    if picture is None:
        if mask is not None:
            raise UserError("start from a picture: there is paint but no picture under it; load one, or clear the paint")
        return None, None
    if mask is not None and mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.NEAREST)
    return png(picture.convert("RGB")), None if mask is None else png(mask)


def png(image: Any) -> bytes:
    """A picture, of Pillow or as bytes (H,W,3), as a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format="PNG")
    return stream.getvalue()
