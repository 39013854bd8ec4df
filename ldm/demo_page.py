"""The page itself: gradio's components, and what happens when one is used. Everything that draws is in the studio."""

from __future__ import annotations

import asyncio
import io
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.demo_guard import USER
from ldm.demo_live import command, finished, heading, idle, panel, progress
from ldm.demo_shelf import Shelf
from ldm.errors import UserError
from ldm.families.drawing import CURVES, PRECISION
from ldm.recipe import SPACINGS, read_recipe
from ldm.sample_words import MAX_SEED
from ldm.studio import Job, Studio
from ldm.studio_orders import MAX_PICTURES, MAX_PROMPT, NAMES, Form, blank, check_upload, fill_in, order_of, read_form

if TYPE_CHECKING:
    import gradio as gr

PERIOD_S = 0.15  # between two looks at a drawing
ACTIVE = 64  # drawings that are followed at once
OWN_SPACING = "the sampler's own"
SHOWN = ("prompt", "negative", "seed", "pictures", "width", "height", "steps", "guidance", "sampler", "spacing", "eta", "rescale",
         "precision", "guidance_from", "guidance_to", "guidance_curve", "notation", "hires", "hires_strength", "strength")  # fmt: skip
assert set(SHOWN) == set(NAMES)
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}


@dataclass
class Page:
    """What the page's functions share."""

    studio: Studio
    shelf: Shelf
    model: str  # its name
    facts: str  # about it, a few words
    largest: int  # px, of a side
    precision: str = ""  # of the networks' weights; empty: the model's own
    jobs: dict[str, set[Job]] = field(default_factory=dict)  # by browser tab

    @property
    def family(self) -> Any:
        """The model."""
        return self.studio.family

    def form(self, values: list[Any], form: Form) -> Form:
        """What the components say; `values` in the order of SHOWN."""
        told = dict(zip(SHOWN, values, strict=True))
        if told["spacing"] == OWN_SPACING:
            told["spacing"] = ""
        return read_form(told, self.largest, form)

    async def generate(self, request: gr.Request, fresh: bool, editor: Any, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        """Draw what the form says: panel, pictures, seed, the two buttons, paths."""
        user, tab, same = user_of(request), str(request.session_hash), gr.skip()
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        job: Job | None = None
        began = time.monotonic()
        try:
            form = await asyncio.to_thread(self.form, list(values), blank(self.family, self.precision))
            if fresh:
                form = Form(**{**form.__dict__, "seed": secrets.randbelow(2**32)})
            files = await asyncio.to_thread(painted, editor)
            order = await asyncio.to_thread(order_of, self.family, self.model, form, *files)
            job = self.studio.submit(user, order)
            self.jobs.setdefault(tab, set()).add(job)
            yield progress(job, self.studio.ahead(job)), [], form.seed, off, on, []
            async for said, paths in self._follow(job, user):
                yield said, gr.skip() if paths is None else shown(paths), same, same, same, gr.skip() if paths is None else paths
            paths = await asyncio.to_thread(self._kept, job, user)
            extra = ""
            if job.state == "done":
                original = [await asyncio.to_thread(self.shelf.put, f"{name}.png", data) for name, data in zip(("init", "mask"), files, strict=True) if data]
                extra = command(order.recipes[0], len(order.recipes), self.model, original)
                if order.original is not None and order.original.notice:
                    job.notes.append(order.original.notice)
            yield finished(job, time.monotonic() - began, extra), shown(paths), same, on, off, paths
        except UserError as error:
            yield panel(str(error), bad=True), same, same, on, off, same
        finally:
            if job is not None:
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
        """The form with a picture's settings: the note, then `values` in the order of SHOWN, then whether seeds are fresh."""
        try:
            if path is None:
                raise UserError("choose a picture first")
            check_upload("picture", Path(path).read_bytes())
            found = read_recipe(Path(path))
            form, notes = fill_in(blank(self.family, self.precision), found, self.family.content_hash, self.largest)
        except (UserError, OSError) as error:
            said = str(error).replace(f"{path}: ", "") if isinstance(error, UserError) else "the picture is gone"
            return panel(said, bad=True), *[gr.skip()] * len(SHOWN), gr.skip()
        filled = [getattr(form, name) or OWN_SPACING if name == "spacing" else getattr(form, name) for name in SHOWN]
        return panel(" ".join(["The picture's settings are filled in.", *notes])), *filled, False

    def history(self, request: gr.Request) -> tuple[Any, list[str]]:
        """What this user drew: pictures with captions, and their paths."""
        found = self.shelf.history(user_of(request))
        return [(str(one.path), f"{one.recipe.prompt} · seed {one.recipe.seed}") for one in found], [str(one.path) for one in found]

    def forget(self, request: gr.Request) -> tuple[Any, list[str]]:
        """Remove what this user drew."""
        self.shelf.forget(user_of(request))
        return [], []


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


def background(paths: list[str], place: int, editor: Any) -> Any:
    """What the editor shows: the chosen picture without paint, or what it was."""
    path = at_place(paths, place)
    if path is None or not Path(path).is_file():
        return gr.skip()
    return {"background": path, "layers": [], "composite": None}


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
    return _png(picture.convert("RGB")), None if mask is None else _png(mask)


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def build(page: Page) -> Any:
    """gradio's Blocks of a page."""
    global gr
    import gradio as gr

    from ldm.diffusion.samplers import SAMPLERS

    start = blank(page.family, page.precision)
    box: dict[str, Any] = {}
    with gr.Blocks(title=f"{page.model} · ldm", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(heading(page.model, page.facts))
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                box["prompt"] = gr.Textbox(label="Prompt", lines=3, max_lines=12, max_length=MAX_PROMPT, elem_id="ldm-prompt", autofocus=True)
                box["negative"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=6, max_length=MAX_PROMPT, elem_id="ldm-negative")
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="ldm-generate", scale=3)
                    cancel = gr.Button("Cancel", variant="stop", elem_id="ldm-cancel", interactive=False, scale=1)
                with gr.Row():
                    box["seed"] = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=MAX_SEED, elem_id="ldm-seed", min_width=120)
                    fresh = gr.Checkbox(label="A new seed each time", value=True, elem_id="ldm-fresh", min_width=120)
                    box["pictures"] = gr.Number(label="Pictures", value=1, precision=0, minimum=1, maximum=MAX_PICTURES, elem_id="ldm-many", min_width=80)
                with gr.Row():
                    factor = page.family.factor
                    side: Any = {"minimum": factor, "maximum": page.largest // factor * factor, "step": factor}
                    box["width"] = gr.Slider(label="Width, px", value=start.width, **side, elem_id="ldm-width")
                    box["height"] = gr.Slider(label="Height, px", value=start.height, **side, elem_id="ldm-height")
                with gr.Row():
                    box["steps"] = gr.Slider(1, 150, start.steps, step=1, label="Steps", elem_id="ldm-steps")
                    box["guidance"] = gr.Slider(1, 20, start.guidance, step=0.1, label="Guidance", elem_id="ldm-guidance")
                box["sampler"] = gr.Dropdown(list(SAMPLERS), value=start.sampler, label="Sampler", elem_id="ldm-sampler")
                with gr.Accordion("Start from a picture", open=False, elem_id="ldm-start"):
                    editor = gr.ImageEditor(
                        label="Paint over what is to be new; without paint all of it is drawn anew", type="pil", format="png",
                        sources=["upload", "clipboard"], layers=False, transforms=(), elem_id="ldm-editor", buttons=[],
                        brush=gr.Brush(colors=["#ff3b6b"], default_color="#ff3b6b", color_mode="fixed", default_size=24), height=420,
                        canvas_size=(start.width, start.height),
                    )  # fmt: skip
                    box["strength"] = gr.Slider(0, 1, 0.75, step=0.01, label="How much of it is drawn anew", elem_id="ldm-strength")
                with gr.Accordion("Read a picture's settings", open=False, elem_id="ldm-read"):
                    dropped = gr.File(label="A PNG of ldm or of Stable Diffusion web UI", file_types=[".png"], height=110, elem_id="ldm-drop")
                with gr.Accordion("More", open=False, elem_id="ldm-more"):
                    _more(box, start, page)
            with gr.Column(scale=6, min_width=340):
                with gr.Tab("Pictures"):
                    live = gr.HTML(idle(), elem_id="ldm-live")
                    gallery = gr.Gallery(
                        show_label=False, columns=2, height=560, object_fit="contain", format="png", elem_id="ldm-pictures",
                        buttons=["download", "fullscreen"], interactive=False,
                    )  # fmt: skip
                    with gr.Row():
                        reuse = gr.Button("Use its settings", size="sm", elem_id="ldm-reuse")
                        go_on = gr.Button("Start from it", size="sm", elem_id="ldm-go-on")
                with gr.Tab("History", elem_id="ldm-history-tab") as past:
                    album = gr.Gallery(
                        show_label=False, columns=4, height=640, object_fit="contain", format="png", elem_id="ldm-history",
                        buttons=["download", "fullscreen"], interactive=False,
                    )  # fmt: skip
                    with gr.Row():
                        reuse_old = gr.Button("Use its settings", size="sm")
                        go_on_old = gr.Button("Start from it", size="sm")
                        forget = gr.Button("Remove all", size="sm")
        inputs = [box[name] for name in SHOWN]
        for grid, paths, button, onward in ((gallery, gr.State([]), reuse, go_on), (album, gr.State([]), reuse_old, go_on_old)):
            chosen = gr.State(0)
            grid.select(chosen_place, None, chosen, **QUIET)
            picked = gr.State(None)
            button.click(at_place, [paths, chosen], picked, **QUIET).then(page.read, [picked, *inputs], [live, *inputs, fresh], **QUIET)
            onward.click(background, [paths, chosen, editor], editor, **QUIET)
            if grid is gallery:
                told = [live, gallery, box["seed"], generate, cancel, paths]
                generate.click(page.generate, [fresh, editor, *inputs], told, concurrency_limit=ACTIVE, **QUIET)
            else:
                past.select(page.history, None, [album, paths], **QUIET)
                forget.click(page.forget, None, [album, paths], **QUIET)
        cancel.click(page.cancel, None, None, concurrency_limit=ACTIVE, **QUIET)
        dropped.upload(page.read, [dropped, *inputs], [live, *inputs, fresh], **QUIET)
        blocks.unload(page.leave)
    blocks.queue(max_size=4 * ACTIVE, default_concurrency_limit=ACTIVE, api_open=False)
    blocks.ldm_editor = editor
    return blocks


def _more(box: dict[str, Any], start: Form, page: Page) -> None:
    """The settings that few change."""
    with gr.Row():
        box["spacing"] = gr.Dropdown([OWN_SPACING, *SPACINGS], value=OWN_SPACING, label="Spacing of the steps", elem_id="ldm-spacing")
        kinds = list(PRECISION) if page.precision in ("", "fp32") and start.precision == "fp32" else [start.precision]
        box["precision"] = gr.Dropdown(kinds, value=start.precision, label="Precision", elem_id="ldm-precision")
    with gr.Row():
        box["rescale"] = gr.Slider(0, 1, start.rescale, step=0.05, label="Guidance rescale", elem_id="ldm-rescale")
        box["eta"] = gr.Slider(0, 1, 0, step=0.05, label="Eta: noise of ddim's steps", elem_id="ldm-eta")
    with gr.Row():
        box["guidance_from"] = gr.Slider(0, 1, 0, step=0.01, label="Guide from this share of the steps", elem_id="ldm-from")
        box["guidance_to"] = gr.Slider(0, 1, 1, step=0.01, label="to this one", elem_id="ldm-to")
        box["guidance_curve"] = gr.Dropdown(list(CURVES), value="constant", label="Guidance over the steps", elem_id="ldm-curve")
    with gr.Row():
        box["hires"] = gr.Slider(1, 8, 1, step=0.5, label="Draw so many times smaller first", elem_id="ldm-hires")
        box["hires_strength"] = gr.Slider(0, 1, 0.5, step=0.01, label="and so much of it anew", elem_id="ldm-hires-strength")
    box["notation"] = gr.Checkbox(value=True, label="Brackets, BREAK and AND in prompts have a meaning", elem_id="ldm-notation")
