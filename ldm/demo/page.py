"""Event handlers of the page: what happens when one of its components is used. Everything that draws is in the studio."""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.grid import sheet
from ldm.config.errors import UserError
from ldm.data.views import ViewKind
from ldm.demo.api import answer_of, order_of_call
from ldm.demo.catalogue import Catalogue, Opened, Outfit, fixed
from ldm.demo.files import Shelf
from ldm.demo.guard import USER
from ldm.demo.orders import MAX_LINES, MAX_PICTURES, MAX_PROMPT, NAMES, Form, blank, check_upload, fill_in, order_of_form, read_form
from ldm.demo.status import command, finished, heading, idle, panel, progress, token_count
from ldm.demo.studio import DrawOrder, Job, Studio
from ldm.demo.view_inputs import COMPONENTS, SLOTS, ViewInput, colour_of, components, says, told_by
from ldm.families.draws import THRESHOLDS, Draws, Wanted
from ldm.sampling.adapters import told_shortly
from ldm.sampling.axes import Axis, cells, read_axis
from ldm.sampling.prompt_tags import parted
from ldm.sampling.recipe import read_recipe

if TYPE_CHECKING:
    import gradio as gr

Wish = tuple[Form, bytes | None, bytes | None, tuple[ViewInput, ...]]  # a form, the picture to start from, its mask, and views
EMPTY = Axis("", ("",))
PARTS = 5  # components of an input for a view that are read
BLOBS = 2**28  # bytes
PERIOD_S = 0.15  # between two looks at a drawing
OPENING_S = 0.4  # after which a user is told that a model is opened
ENLARGED = 0.3  # the denoising strength of an enlarged picture
OWN_VAE = "Automatic"  # the model's own
# Settings that some models have not: label, what only a model which has them can be asked for, and bounds or choices; none: any text.
OF_SOME: dict[str, tuple[str, Wanted, tuple[Any, ...]]] = {
    "threshold": ("Threshold of each step", Wanted(threshold="static"), THRESHOLDS),
    "stop_after": ("Models of the chain that draw (0: all)", Wanted(stop_after=1), (0, 8)),
    "link_steps": ("Steps of all but the first, such as 15,10", Wanted(stop_after=1), ()),
    "temperature": ("Temperature", Wanted(temperature=0.5), (0, 2)),
    "top_k": ("Top k (0: all)", Wanted(top_k=5), (0, 1024)),
    "top_p": ("Top p (1: all)", Wanted(top_p=0.5), (0, 1)),
    "truncation": ("Truncation (1: none)", Wanted(truncation=0.5), (0, 1)),
}
# What begins anew with another model.
CHOSEN = ("width", "height", "steps", "guidance", "sampler", "spacing", "precision", "rescale", "clip_skip", *OF_SOME)


def has(family: Draws, name: str) -> bool:
    """Whether a model has one of the settings that some have not."""
    try:
        family.settings(OF_SOME[name][1])
    except UserError:
        return False
    return True


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
    largest: int  # px, of a side
    precision: str = ""  # of the networks' weights; empty: the model's own
    added: dict[str, str] = field(default_factory=dict)  # what recipes tell of its LoRAs and words
    given: Catalogue | None = None  # what can be chosen; None: the studio's model alone
    jobs: dict[str, set[Job]] = field(default_factory=dict)  # by browser tab

    def __post_init__(self) -> None:
        self.catalogue = self.given or fixed(self.model, Opened(self.studio.family, self.added))

    @property
    def family(self) -> Draws:
        """The first model."""
        return self.studio.family

    def opened(self, model: str = "") -> Opened:
        """A model by its name, if it is open, else the first."""
        outfit = Outfit(model or self.catalogue.first[0])
        if self.catalogue.is_open(outfit):
            return self.catalogue.opened(outfit)
        return Opened(self.studio.family, self.added)

    def form(self, values: list[Any]) -> Form:
        """What the components say; `values` in the order of NAMES."""
        told = dict(zip(NAMES, values, strict=True))
        model = "" if told["model"] == self.catalogue.first[0] else told["model"]
        start = blank(self.opened(str(model or "")).family, self.precision)
        return read_form({**told, "model": model}, self.largest, start)

    def views(self, model: str, values: Sequence[Any]) -> tuple[ViewInput, ...]:
        """What the inputs for views tell of those that a model reads; an input's components stand beside each other in `values`."""
        slots = [tuple(values[i : i + PARTS]) for i in range(0, len(values), PARTS)]
        if not any(map(says, slots)):
            return ()
        return told_by(self.catalogue.opened(self.catalogue.chosen(model, (), "")).family.told, slots)

    def inputs_for(self, model: str | None) -> list[Any]:
        """Updates of the inputs for views, as a model reads them: of the whole, then of each input's components."""
        told = list(self.opened(str(model or "")).family.told.items())[:SLOTS]
        found = [gr.update(visible=bool(told))]
        for i in range(SLOTS):
            says = list(components(*told[i])) if i < len(told) else [{"visible": False}] * COMPONENTS
            if i < len(told):
                says[1] = {**says[1], "brush": brush_for(told[i][1], self.family.defaults["size"][1])}
            found += [gr.update(**said) for said in says]
        return found

    def shown(self, form: Form) -> list[Any]:
        """What the components show; in the order of NAMES."""
        return [getattr(form, name) or (self.catalogue.first[0] if name == "model" else getattr(form, name)) for name in NAMES]

    async def generate(self, request: gr.Request, fresh: bool, editor: Any, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draw what the form says, by the views that the last `values` tell of: panel, pictures, seed, the two buttons, paths."""

        def wanted() -> Wish:
            form = self.form(list(values[: len(NAMES)]))
            form = replace(form, seed=secrets.randbelow(2**32)) if fresh else form
            return form, *painted(editor), self.views(form.model, values[len(NAMES) :])

        async with contextlib.aclosing(self._drawn(request, wanted)) as drawn:
            async for told in drawn:
                yield told

    async def near(self, request: gr.Request, path: str | None, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draw four variations of a picture: as `generate`."""

        def wanted() -> Wish:
            form, _ = self.of_picture(path, list(values))
            return replace(form, variations=4), None, None, ()

        async with contextlib.aclosing(self._drawn(request, wanted)) as drawn:
            async for told in drawn:
                yield told

    async def enlarged(self, request: gr.Request, path: str | None, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draw a picture out of itself at twice its size: as `generate`."""

        def wanted() -> Wish:
            form, _ = self.of_picture(path, list(values))
            width, height = 2 * form.width, 2 * form.height
            if max(width, height) > self.largest:
                raise UserError(f"size: {width}x{height} px is beyond the {self.largest} px that are drawn here")
            return replace(form, width=width, height=height, strength=ENLARGED, hires=1.0), Path(str(path)).read_bytes(), None, ()

        async with contextlib.aclosing(self._drawn(request, wanted)) as drawn:
            async for told in drawn:
                yield told

    async def _drawn(self, request: gr.Request, wanted: Callable[[], Wish]) -> AsyncGenerator[tuple[Any, ...], None]:
        """Draw a form out of files, a picture and a mask, and by views: panel, pictures, seed, the two buttons, paths."""
        same, off, on = gr.skip(), gr.update(interactive=False), gr.update(interactive=True)
        try:
            form, init, mask, views = await asyncio.to_thread(wanted)
            files = (init, mask)
            making = asyncio.create_task(asyncio.to_thread(order_of_form, self.catalogue, form, self.largest, init, mask, views))
            if not (await asyncio.wait({making}, timeout=OPENING_S))[0]:
                yield panel(f"Opening {form.model or self.model}…", 0.0), same, form.seed, off, off, same
            order = await making
            async with self._drawing(order, request) as job:
                yield progress(job, self.studio.ahead(job), self.studio.waiting()), [], form.seed, off, on, []
                async for said, paths in self._follow(job, user_of(request)):
                    yield said, same if paths is None else shown(paths), same, same, same, same if paths is None else paths
            init_image = [self.shelf.put(f"{name}.png", data) for name, data in zip(("init", "mask"), files, strict=True) if data]
            again = command(order.recipes, form, init_image) if job.state == "done" else ""
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
            form = replace(self.form(list(values[: len(NAMES)])), pictures=1, variations=0, lines="")
            files = await asyncio.to_thread(painted, editor)
            views = await asyncio.to_thread(self.views, form.model, values[len(NAMES) :])
            base = await asyncio.to_thread(order_of_form, self.catalogue, form, self.largest, *files, views)
            axes, whole = varied(base, (y or "", ys or ""), (x or "", xs or ""), form.spacing)
            async with self._drawing(whole, request) as job:
                yield progress(job, self.studio.ahead(job), self.studio.waiting()), None, off, on
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
            fresh, done = progress(job, self.studio.ahead(job), self.studio.waiting()), len(job.pictures)
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

    def of_picture(self, path: str | None, values: list[Any]) -> tuple[Form, list[str]]:
        """The form with a picture's settings, and what should be known of those that it could not take.

        Args:
            values: what the components say, in the order of NAMES; may be left out.

        Raises:
            UserError: where there is no picture, or none with settings.
        """
        if path is None:
            raise UserError("choose a picture first")
        try:
            check_upload("picture", Path(path).read_bytes())
            found = read_recipe(Path(path))
        except UserError as error:
            raise UserError(str(error).replace(f"{path}: ", "")) from None
        except OSError:
            raise UserError("the picture is gone") from None
        now = str(dict(zip(NAMES, values, strict=False)).get("model") or "")
        family, first = self.opened(now).family, blank(self.opened(now).family, self.precision)
        form = replace(first, model="" if now == self.catalogue.first[0] else now)
        return fill_in(form, found, self.catalogue, family.content_hash, self.largest, self.added)

    def read(self, path: str | None, *values: Any) -> tuple[Any, ...]:
        """The form with a picture's settings: the note, then `values` in the order of NAMES, then whether seeds are fresh."""
        try:
            form, notes = self.of_picture(path, list(values))
        except UserError as error:
            return panel(str(error), bad=True), *[gr.skip()] * len(NAMES), gr.skip()
        return panel(" ".join(["The picture's settings are filled in.", *notes])), *self.shown(form), False

    def load_lines(self, data: bytes | None) -> tuple[Any, Any]:
        """What a file of prompts says, with a note; the note alone where it is none."""
        try:
            text = (data or b"").decode("utf-8-sig")
        except UnicodeDecodeError:
            return panel("This is no file of prompts: it is no text in UTF-8.", bad=True), gr.skip()
        if not text.strip() or "\0" in text:
            return panel("This is no file of prompts: it says nothing.", bad=True), gr.skip()
        if len(text) > MAX_LINES:
            return panel(
                f"This is no file of prompts: it has {len(text):,} characters, of which at most {MAX_LINES:,} fit.", bad=True
            ), gr.skip()
        return panel("The prompts are filled in, in place of the one above."), "\n".join(text.splitlines()) + "\n"

    async def choose(self, model: str | None) -> AsyncIterator[tuple[Any, ...]]:
        """Open a model: the panel, the heading, its examples, then the form's CHOSEN fields as it begins with them."""
        none = [gr.skip()] * (2 + len(CHOSEN))
        try:
            outfit = self.catalogue.chosen(str(model or ""), (), "")
            yield panel(f"Opening {outfit.model}…", 0.0), *none
            opened = await asyncio.to_thread(self.catalogue.opened, outfit)
        except UserError as error:
            yield panel(str(error), bad=True), *none
            return
        start, sides = blank(opened.family, self.precision), self.sides(opened.family)
        more = sides | {name: {"visible": has(opened.family, name)} for name in OF_SOME}
        told = [gr.update(value=getattr(start, name), **more.get(name, {})) for name in CHOSEN]
        yield idle(), self.heading(opened, outfit.model), gr.Dataset(samples=[[text] for text in opened.examples]), *told

    def heading(self, opened: Opened, model: str) -> str:
        """The page's first line."""
        height, width = opened.family.defaults["size"]
        size = f"{width} px" if width == height else f"{width}x{height} px"
        return heading(model, " · ".join([size, opened.family.device.type, *told_shortly(opened.added)]))

    def sides(self, family: Draws) -> dict[str, dict[str, Any]]:
        """Labels and bounds of the sliders of width and height."""
        factor, (height, width) = family.factor, family.defaults["size"]
        size = {"width": width, "height": height}
        most = self.largest // factor * factor
        return {n: {"label": f"{n.title()} (trained: {size[n]})", "minimum": factor, "maximum": most, "step": factor} for n in size}

    def tokens(self, prompt: str | None, notation: bool, model: str | None) -> str:
        """How long a prompt is, for whoever writes it."""
        from ldm.text.prompt_syntax import literal, read

        words = str(prompt or "")[:MAX_PROMPT]
        found = None
        with contextlib.suppress(UserError):
            words = parted(words)[0] if notation else words
            found = self.opened(str(model or "")).family.tokens((read if notation else literal)(words))
        return token_count(found)

    def choices(self) -> tuple[Any, Any, Any]:
        """What models, LoRAs and autoencoders there are by now: updates of their choosers."""
        loras, vaes = list(self.catalogue.loras()), list(self.catalogue.vaes())
        models = list(self.catalogue.models())
        return (
            gr.update(choices=models),
            gr.update(choices=loras, visible=bool(loras)),
            gr.update(choices=[(OWN_VAE, ""), *((name, name) for name in vaes)]),
        )

    def history(self, request: gr.Request) -> tuple[Any, list[str], int]:
        """What this user drew: pictures with captions, their paths, and that none is chosen."""
        found = self.shelf.history(user_of(request))
        return [(str(one.path), f"{one.recipe.prompt} · seed {one.recipe.seed}") for one in found], [str(one.path) for one in found], -1

    def drop(self, request: gr.Request, paths: list[str], place: int) -> tuple[Any, ...]:
        """Remove the picture of this user that is chosen, and no other: what is left, as `history`, and the panel."""
        if not 0 <= place < len(paths):
            return *[gr.skip()] * 3, panel("Choose the picture to delete first.", bad=True)
        self.shelf.forget(user_of(request), Path(paths[place]))
        return *self.history(request), panel("The picture is deleted.")

    def forget(self, request: gr.Request) -> tuple[Any, list[str], int]:
        """Remove what this user drew."""
        self.shelf.forget(user_of(request))
        return [], [], -1

    async def call(self, wanted: dict[str, Any], request: gr.Request) -> dict[str, Any]:
        """Draw what a client of gradio asks for: the fields of /api/schema; answers as /api/draw does."""

        async def gone() -> bool:
            return False

        try:
            return await self.draw(wanted, user_of(request), gone)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    async def draw(self, values: Any, user: str, gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """Draw what a call of the API says: see `ldm.demo.api`.

        Args:
            gone: whether nobody waits for the answer any more.

        Raises:
            UserError: for whatever is wrong with the request; `Busy` if the queue is full.
        """
        order = await asyncio.to_thread(order_of_call, self.catalogue, values, self.largest)
        job = self.studio.submit(user, order)
        try:
            while not job.over and not await gone():
                await asyncio.sleep(PERIOD_S)
        finally:
            self.studio.cancel(job)
        return await asyncio.to_thread(answer_of, job)


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


def brush_for(kind: ViewKind | None, width: int) -> Any:
    """A brush in the colours of a view's classes; of no view in the page's own."""
    colours: list[Any] = ["#ff3b6b"] if kind is None else [colour_of(colour) for colour in kind.colours] or ["#000000"]
    return gr.Brush(colors=colours, default_color=colours[0], color_mode="fixed", default_size=max(2, width // 8))


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


def add_tag(prompt: str | None, lora: str | None) -> tuple[str, None]:
    """The prompt with a LoRA's tag, as other programs write it; nothing is chosen any more."""
    return (f"{prompt or ''} <lora:{lora}:1>".strip() if lora else prompt or ""), None


def background(paths: list[str], place: int) -> tuple[Any, str, Any]:
    """What the editor shows, the chosen picture without paint; the panel; and the part of the page with the editor, opened."""
    path = at_place(paths, place)
    if path is None or not Path(path).is_file():
        return gr.skip(), panel("Choose a picture first.", bad=True), gr.skip()
    said = panel("The picture is in the editor, under Start from a picture.")
    return {"background": path, "layers": [], "composite": None}, said, gr.update(open=True)


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
            raise UserError("lora: a grid is drawn with one set of LoRAs; `ldm grid` varies their weights")
        if axis.name == "strength" and base.init_image is None:
            raise UserError("strength: changes nothing without a picture to start from")
        if axis.name == "hires_strength" and base.recipes[0].hires == 1:
            raise UserError("hires_strength: changes nothing where pictures are drawn at once")
    made = cells(base.recipes[0], axes, lambda name: spacing or SAMPLERS[name].spacing)
    shown = [next((axis for axis, one in zip(axes, given, strict=True) if one[2] == option), EMPTY) for option in ("down", "across")]
    return shown, replace(base, recipes=tuple(made))


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
