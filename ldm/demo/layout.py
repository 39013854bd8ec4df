"""Layout of the page: gradio's components, and which of its functions each of them calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.demo.orders import MAX_PICTURES, MAX_PROMPT, NAMES, Form, blank
from ldm.demo.page import OWN_SPACING, Blobs, Page, at_place, background, chosen_place, load_gradio
from ldm.demo.status import heading, idle
from ldm.families.draws import CURVES, PRECISIONS
from ldm.sampling.axes import KINDS
from ldm.sampling.recipe_values import MAX_SEED, SPACINGS

if TYPE_CHECKING:
    import gradio as gr

ACTIVE = 64  # drawings that are followed at once
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": ACTIVE}
Box = dict[str, Any]  # components by the fields of the form


def build(page: Page) -> Any:
    """gradio's Blocks of a page."""
    global gr
    gr = load_gradio()
    start, box = blank(page.family, page.precision), Box()
    with gr.Blocks(title=f"{page.model} · ldm", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(heading(page.model, page.facts))
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                _prompts(box)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", elem_id="ldm-generate", scale=3)
                    cancel = gr.Button("Cancel", variant="stop", elem_id="ldm-cancel", interactive=False, scale=1)
                fresh = _numbers(box, start, page)
                with gr.Accordion("Start from a picture", open=False, elem_id="ldm-start"):
                    editor = _editor(start)
                    box["strength"] = gr.Slider(0, 1, 0.75, step=0.01, label="How much is drawn anew", elem_id="ldm-strength")
                with gr.Accordion("Read a picture's settings", open=False, elem_id="ldm-read"):
                    label = "A PNG of ldm or of Stable Diffusion web UI"
                    dropped = gr.File(label=label, file_types=[".png"], height=110, elem_id="ldm-drop")
                with gr.Accordion("More settings", open=False, elem_id="ldm-more"):
                    _more(box, start, page)
            with gr.Column(scale=6, min_width=340):
                live = gr.HTML(idle(), elem_id="ldm-live", padding=False)
                with gr.Tab("Pictures"):
                    pictures = _album("ldm-pictures", columns=2)
                with gr.Tab("Grid"):
                    sheet = _sheet()
                with gr.Tab("History") as past:
                    history = _album("ldm-history", columns=4)
                    forget = gr.Button("Remove all", size="sm", elem_id="ldm-forget")
        inputs = [box[name] for name in NAMES]
        told = [live, pictures.gallery, box["seed"], generate, cancel, pictures.paths]
        generate.click(page.generate, [fresh, editor, *inputs], told, **QUIET)
        sheet.draw.click(page.grid, [*sheet.axes, editor, *inputs], [live, sheet.image, sheet.draw, cancel], **QUIET)
        cancel.click(page.cancel, None, None, **QUIET)
        for album in (pictures, history):
            album.gallery.select(chosen_place, None, album.chosen, **QUIET)
            picked = album.reuse.click(at_place, [album.paths, album.chosen], album.picked, **QUIET)
            picked.then(page.read, [album.picked, *inputs], [live, *inputs, fresh], **QUIET)
            album.go_on.click(background, [album.paths, album.chosen], [editor, live], **QUIET)
        past.select(page.history, None, [history.gallery, history.paths], **QUIET)
        forget.click(page.forget, None, [history.gallery, history.paths], **QUIET)
        dropped.upload(page.read, [dropped, *inputs], [live, *inputs, fresh], **QUIET)
        blocks.unload(page.leave)
    blocks.queue(max_size=4 * ACTIVE, default_concurrency_limit=ACTIVE, api_open=False)
    return blocks


@dataclass
class Album:
    """A gallery, and what can be done with its pictures."""

    gallery: Any
    reuse: Any
    go_on: Any
    paths: Any
    chosen: Any
    picked: Any


def _album(name: str, columns: int) -> Album:
    gallery = gr.Gallery(
        show_label=False,
        columns=columns,
        object_fit="contain",
        format="png",
        elem_id=name,
        fit_columns=False,
        height="auto",
        buttons=["download", "fullscreen"],
        interactive=False,
    )
    with gr.Row():
        reuse = gr.Button("Use its settings", size="sm", elem_id=f"{name}-reuse")
        go_on = gr.Button("Start from it", size="sm", elem_id=f"{name}-go-on")
    return Album(gallery, reuse, go_on, gr.State([]), gr.State(0), gr.State(None))


@dataclass
class Sheet:
    """The grid's axes and its picture."""

    axes: list[Any]
    draw: Any
    image: Any


def _sheet() -> Sheet:
    axes: list[Any] = []
    for name, first, values in (("across", "guidance", "1,3,7"), ("down", "steps", "5,20")):
        with gr.Row():
            axes.append(gr.Dropdown(["", *KINDS], value=first, label=f"What varies {name}", elem_id=f"ldm-{name}", min_width=120))
            axes.append(gr.Textbox(value=values, label="Values", max_lines=1, max_length=1000, elem_id=f"ldm-{name}-values", scale=2))
    draw = gr.Button("Draw the grid", variant="primary", elem_id="ldm-draw-grid")
    image = gr.Image(
        show_label=False, type="filepath", format="png", interactive=False, elem_id="ldm-grid", buttons=["download", "fullscreen"]
    )
    return Sheet(axes, draw, image)


def _prompts(box: Box) -> None:
    box["prompt"] = gr.Textbox(label="Prompt", lines=3, max_lines=12, max_length=MAX_PROMPT, elem_id="ldm-prompt")
    box["negative"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=6, max_length=MAX_PROMPT, elem_id="ldm-negative")


def _numbers(box: Box, start: Form, page: Page) -> Any:
    """Seed, size and steps; whether every drawing has a seed of its own."""
    whole: Any = {"precision": 0, "min_width": 100}
    with gr.Row():
        box["seed"] = gr.Number(label="Seed", value=0, minimum=0, maximum=MAX_SEED, elem_id="ldm-seed", scale=2, **whole)
        fresh = gr.Checkbox(label="Random", value=True, elem_id="ldm-fresh", min_width=100, container=False)
        box["pictures"] = gr.Number(label="Pictures", value=1, minimum=1, maximum=MAX_PICTURES, elem_id="ldm-many", **whole)
    factor = page.family.factor
    side: Any = {"minimum": factor, "maximum": page.largest // factor * factor, "step": factor}
    with gr.Row():
        box["width"] = gr.Slider(label="Width, px", value=start.width, **side, elem_id="ldm-width")
        box["height"] = gr.Slider(label="Height, px", value=start.height, **side, elem_id="ldm-height")
    with gr.Row():
        box["steps"] = gr.Slider(1, 150, start.steps, step=1, label="Steps", elem_id="ldm-steps")
        box["guidance"] = gr.Slider(1, 20, start.guidance, step=0.1, label="Guidance", elem_id="ldm-guidance")
    from ldm.diffusion.samplers import SAMPLERS

    box["sampler"] = gr.Dropdown(list(SAMPLERS), value=start.sampler, label="Sampler", elem_id="ldm-sampler")
    return fresh


def _editor(start: Form) -> Any:
    paint = "#ff3b6b"
    brush = gr.Brush(colors=[paint], default_color=paint, color_mode="fixed", default_size=max(2, start.width // 8))
    gr.HTML('<p class="ldm-quiet">Load or paste a picture. Paint over what is to be new; without paint, all of it is drawn anew.</p>')
    made = gr.ImageEditor(
        show_label=False,
        type="pil",
        format="png",
        sources=["upload", "clipboard"],
        layers=False,
        transforms=(),
        elem_id="ldm-editor",
        buttons=[],
        brush=brush,
        height=420,
        canvas_size=(start.width, start.height),
    )
    made.blob_storage = Blobs()
    return made


def _more(box: Box, start: Form, page: Page) -> None:
    """The settings that few change."""
    share: Any = {"minimum": 0, "maximum": 1, "step": 0.01}
    with gr.Row():
        box["spacing"] = gr.Dropdown([OWN_SPACING, *SPACINGS], value=OWN_SPACING, label="Spacing of the steps", elem_id="ldm-spacing")
        kinds = list(PRECISIONS) if start.precision == "fp32" else [start.precision]  # weights in a half type stay there
        box["precision"] = gr.Dropdown(kinds, value=start.precision, label="Precision", elem_id="ldm-precision")
    with gr.Row():
        box["rescale"] = gr.Slider(**share, value=start.rescale, label="Guidance rescale", elem_id="ldm-rescale")
        box["eta"] = gr.Slider(**share, value=0, label="Eta: noise of ddim's steps", elem_id="ldm-eta")
    with gr.Row():
        box["guidance_from"] = gr.Slider(**share, value=0, label="Guide from this share of the steps", elem_id="ldm-from")
        box["guidance_to"] = gr.Slider(**share, value=1, label="to this one", elem_id="ldm-to")
    with gr.Row():
        box["guidance_curve"] = gr.Dropdown(list(CURVES), value="constant", label="Guidance over the steps", elem_id="ldm-curve")
        box["clip_skip"] = gr.Number(1, precision=0, minimum=1, label="Text encoder's layer, from the last", elem_id="ldm-clip-skip")
    with gr.Row():
        box["hires"] = gr.Slider(1, 8, 1, step=0.5, label="Draw so many times smaller first", elem_id="ldm-hires")
        box["hires_strength"] = gr.Slider(**share, value=0.5, label="then so much of it anew", elem_id="ldm-hires-strength")
    box["notation"] = gr.Checkbox(value=True, label="Brackets, BREAK and AND in prompts have a meaning", elem_id="ldm-notation")
