"""Layout of the page: gradio's components, and which of its functions each of them calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.data.views import ViewKind
from ldm.demo.orders import MAX_PICTURES, MAX_PROMPT, NAMES, Form, blank
from ldm.demo.page import CHOSEN, OF_SOME, OWN_VAE, Blobs, Page, add_tag, at_place, background, brush_for, chosen_place, has, load_gradio
from ldm.demo.status import idle
from ldm.demo.view_inputs import COMPONENTS, MAX_TEXT, SLOTS, components
from ldm.families.draws import CURVES, PRECISIONS
from ldm.sampling.axes import KINDS
from ldm.sampling.recipe_values import MAX_SEED, SCHEDULES, SPACINGS
from ldm.sampling.recipe_values import NAMES as KNOWN_AS

if TYPE_CHECKING:
    import gradio as gr

ACTIVE = 64  # drawings that are followed at once
QUIET: Any = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": ACTIVE}
SHARE: Any = {"minimum": 0, "maximum": 1, "step": 0.01}
Box = dict[str, Any]  # components by the fields of the form


def build(page: Page) -> Any:
    """gradio's Blocks of a page."""
    global gr
    gr = load_gradio()
    start, box = blank(page.studio.family, page.precision), Box()
    with gr.Blocks(title=f"{page.model} · ldm", analytics_enabled=False, fill_width=True) as blocks:
        head = gr.HTML(page.heading(page.opened(), page.model), padding=False)
        with gr.Row(elem_id="ldm-halves"):
            with gr.Column(scale=5, min_width=320, elem_id="ldm-left"):
                with gr.Column(elem_id="ldm-ask"):
                    loras = _models(box, page)
                    tokens, examples = _prompts(box, page)
                    with gr.Row(elem_id="ldm-go"):
                        generate = gr.Button("Generate", variant="primary", elem_id="ldm-generate", scale=3, min_width=120)
                        cancel = gr.Button("Cancel", variant="stop", elem_id="ldm-cancel", interactive=False, scale=1, min_width=90)
                with gr.Column(elem_id="ldm-settings"):
                    views = _views(page, start)
                    fresh = _numbers(box, start, page)
                    with gr.Accordion("Start from a picture (img2img, inpainting)", open=False, elem_id="ldm-start") as begun:
                        editor = _editor(start)
                        box["strength"] = gr.Slider(**SHARE, value=start.strength, label="Denoising strength", elem_id="ldm-strength")
                    with gr.Accordion("Hires. fix", open=False, elem_id="ldm-second"), gr.Row():
                        box["hires"] = gr.Slider(1, 8, 1, step=0.5, label="Upscale by (1: off)", elem_id="ldm-hires")
                        box["hires_strength"] = gr.Slider(
                            **SHARE, value=start.hires_strength, label="Denoising strength", elem_id="ldm-hires-strength"
                        )
                    with gr.Accordion("Variations, prompts from a file", open=False, elem_id="ldm-several"):
                        listed = _several(box, start)
                    with gr.Accordion("More settings", open=False, elem_id="ldm-more"):
                        _more(box, start, page)
            with gr.Column(scale=6, min_width=320, elem_id="ldm-right"):
                live = gr.HTML(idle(), elem_id="ldm-live", padding=False)
                with gr.Tab("Pictures"):
                    pictures = _album("ldm-pictures", columns=2)
                with gr.Tab("Grid"):
                    sheet = _sheet()
                with gr.Tab("History") as past:
                    history = _album("ldm-history", columns=4)
                    with gr.Row():
                        drop = gr.Button("Delete", size="sm", elem_id="ldm-delete", min_width=90)
                        forget = gr.Button("Delete all", size="sm", elem_id="ldm-forget", min_width=90)
                        gr.Button("Download all", size="sm", link="/api/gallery.zip", elem_id="ldm-download", min_width=90)
                dropped = gr.UploadButton(
                    "Take the settings of a picture (or drop one anywhere)", size="sm", file_types=[".png"], elem_id="ldm-drop"
                )
        inputs = [box[name] for name in NAMES]
        asked = [*inputs, *views.read]
        told = [live, pictures.gallery, box["seed"], generate, cancel, pictures.paths]
        generate.click(page.generate, [fresh, editor, *asked], told, **QUIET)
        sheet.draw.click(page.grid, [*sheet.axes, editor, *asked], [live, sheet.image, sheet.draw, cancel], **QUIET)
        cancel.click(page.cancel, None, None, **QUIET)
        for album in (pictures, history):
            album.gallery.select(chosen_place, None, album.chosen, **QUIET)
            picked = album.reuse.click(at_place, [album.paths, album.chosen], album.picked, **QUIET)
            picked.then(page.read, [album.picked, *inputs], [live, *inputs, fresh], **QUIET)
            album.go_on.click(background, [album.paths, album.chosen], [editor, live, begun], **QUIET)
            for button, function in ((album.near, page.near), (album.enlarge, page.enlarged)):
                picked = button.click(at_place, [album.paths, album.chosen], album.picked, **QUIET)
                picked.then(function, [album.picked, *inputs], told, **QUIET)
        past.select(page.history, None, [history.gallery, history.paths, history.chosen], **QUIET)
        drop.click(page.drop, [history.paths, history.chosen], [history.gallery, history.paths, history.chosen, live], **QUIET)
        forget.click(page.forget, None, [history.gallery, history.paths, history.chosen], **QUIET)
        dropped.upload(page.read, [dropped, *inputs], [live, *inputs, fresh], **QUIET)
        listed.upload(page.load_lines, listed, [live, box["lines"]], **QUIET)
        examples.click(lambda sample: sample[0], examples, box["prompt"], **QUIET)
        loras.input(add_tag, [box["prompt"], loras], [box["prompt"], loras], **QUIET)
        chosen = box["model"].input(page.choose, box["model"], [live, head, examples, *(box[name] for name in CHOSEN)], **QUIET)
        chosen.then(page.inputs_for, box["model"], [views.whole, *views.every], **QUIET)
        # One event, so that what the empty page asks does not answer after what was typed meanwhile.
        counted = [box["prompt"].change, box["notation"].change, box["model"].change, blocks.load]
        gr.on(counted, page.tokens, [box["prompt"], box["notation"], box["model"]], tokens, trigger_mode="always_last", **QUIET)
        blocks.load(page.choices, None, [box["model"], loras, box["vae"]], **QUIET)
        blocks.unload(page.leave)
        gr.api(page.call, api_name="draw", concurrency_limit=ACTIVE)
    blocks.queue(max_size=4 * ACTIVE, default_concurrency_limit=ACTIVE, api_open=False)
    return blocks


@dataclass
class ViewSlots:
    """The inputs for views: the whole, each one's components, and those of them that are read."""

    whole: Any
    every: list[Any]
    read: list[Any]


def _views(page: Page, start: Form) -> ViewSlots:
    """An input for each view that the model reads."""
    told = list(page.studio.family.told.items())[:SLOTS]
    every: list[Any] = []
    with gr.Accordion("Told more than words", open=True, visible=bool(told), elem_id="ldm-told") as whole:
        for i in range(SLOTS):
            says = components(*told[i]) if i < len(told) else [{"visible": False}] * COMPONENTS
            with gr.Column(elem_id=f"ldm-view-{i}", elem_classes="ldm-view"):
                every.append(gr.HTML(padding=False, **says[0]))
                every.append(_canvas(f"ldm-view-{i}-paint", start, told[i][1] if i < len(told) else ViewKind(form="map"), **says[1]))
                every.append(gr.HTML(padding=False, **says[2]))
                every.append(gr.Textbox(lines=3, max_lines=12, max_length=MAX_TEXT, elem_id=f"ldm-view-{i}-text", **says[3]))
                every.append(gr.File(label="Or a file", height=80, type="filepath", elem_id=f"ldm-view-{i}-file", **says[4]))
                with gr.Row():
                    label = "How much it counts"
                    every.append(gr.Slider(0, 2, step=0.05, label=label, min_width=140, elem_id=f"ldm-view-{i}-weight", **says[5]))
                    label = "Make it of the picture that is loaded"
                    every.append(gr.Checkbox(label=label, min_width=140, elem_id=f"ldm-view-{i}-of", **says[6]))
    return ViewSlots(whole, every, [one for k, one in enumerate(every) if k % COMPONENTS not in (0, 2)])


@dataclass
class Album:
    """A gallery, and what can be done with its pictures."""

    gallery: Any
    reuse: Any
    go_on: Any
    near: Any
    enlarge: Any
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
    made: dict[str, Any] = {}
    with gr.Row():
        for what, text in (("reuse", "Use its settings"), ("go-on", "Start from it"), ("near", "Variations"), ("enlarge", "Enlarge x2")):
            made[what.replace("-", "_")] = gr.Button(text, size="sm", elem_id=f"{name}-{what}", min_width=110)
    return Album(gallery, **made, paths=gr.State([]), chosen=gr.State(-1), picked=gr.State(None))


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


def _models(box: Box, page: Page) -> Any:
    """The choosers of the model and of LoRAs, which a prompt names by tags."""
    models, loras = list(page.catalogue.models()), list(page.catalogue.loras())
    with gr.Row():
        box["model"] = gr.Dropdown(models, value=models[0], label="Model", elem_id="ldm-model", min_width=140)
        return gr.Dropdown(loras, value=None, label="Add a LoRA", elem_id="ldm-lora", min_width=140, visible=bool(loras))


def _prompts(box: Box, page: Page) -> tuple[Any, Any]:
    """The prompts; their length in tokens, and examples."""
    samples = [[text] for text in page.opened().examples]
    hint = f"such as: {samples[0][0]}" if samples else ""
    box["prompt"] = gr.Textbox(
        label="Prompt", lines=3, max_lines=12, max_length=MAX_PROMPT, placeholder=hint, elem_id="ldm-prompt", autofocus=True
    )
    tokens = gr.HTML(page.tokens("", True, ""), elem_id="ldm-tokens", padding=False)
    examples = gr.Dataset(
        components=["textbox"], samples=samples, show_label=False, layout="gallery", elem_id="ldm-examples", container=False
    )
    box["negative"] = gr.Textbox(label="Negative prompt", lines=1, max_lines=6, max_length=MAX_PROMPT, elem_id="ldm-negative")
    return tokens, examples


def _numbers(box: Box, start: Form, page: Page) -> Any:
    """Seed, size, steps and sampler; whether every drawing has a seed of its own."""
    whole: Any = {"precision": 0, "min_width": 90}
    with gr.Row():
        box["seed"] = gr.Number(label="Seed", value=0, minimum=0, maximum=MAX_SEED, elem_id="ldm-seed", scale=2, precision=0, min_width=150)
        fresh = gr.Checkbox(label="Random", value=True, elem_id="ldm-fresh", min_width=105, container=False)
        box["pictures"] = gr.Number(label="Pictures", value=1, minimum=1, maximum=MAX_PICTURES, elem_id="ldm-many", **whole)
    with gr.Row():
        for name, bounds in page.sides(page.studio.family).items():
            box[name] = gr.Slider(value=getattr(start, name), elem_id=f"ldm-{name}", min_width=140, **bounds)
    with gr.Row():
        box["steps"] = gr.Slider(1, 150, start.steps, step=1, label="Steps", elem_id="ldm-steps", min_width=140)
        box["guidance"] = gr.Slider(1, 20, start.guidance, step=0.1, label="CFG scale", elem_id="ldm-guidance", min_width=140)
    from ldm.diffusion.samplers import SAMPLERS

    samplers = [(KNOWN_AS.get(name, name), name) for name in SAMPLERS] + [("The model's own", "")] * (not start.sampler)
    spacings = [("Automatic", ""), *((SCHEDULES.get(name, name.upper() if name == "lcm" else name.title()), name) for name in SPACINGS)]
    with gr.Row():
        box["sampler"] = gr.Dropdown(samplers, value=start.sampler, label="Sampler", elem_id="ldm-sampler", min_width=140)
        box["spacing"] = gr.Dropdown(spacings, value="", label="Schedule type", elem_id="ldm-spacing", min_width=140)
    return fresh


def _editor(start: Form) -> Any:
    gr.HTML('<p class="ldm-quiet">Load or paste a picture. Paint over what is to be new; without paint, all of it is drawn anew.</p>')
    return _canvas("ldm-editor", start, None)


def _canvas(name: str, start: Form, kind: ViewKind | None, **said: Any) -> Any:
    """A picture that can be loaded and painted on, in the colours of a view."""
    made = gr.ImageEditor(
        show_label=False,
        type="pil",
        format="png",
        sources=["upload", "clipboard"],
        layers=False,
        transforms=(),
        elem_id=name,
        buttons=[],
        brush=brush_for(kind, start.width),
        height=420,
        canvas_size=(start.width, start.height),
        **said,
    )
    made.blob_storage = Blobs()
    return made


def _several(box: Box, start: Form) -> Any:
    """Variations, and several prompts; the button that loads these."""
    with gr.Row():
        box["variations"] = gr.Slider(0, 16, 0, step=1, label="Variations", elem_id="ldm-variations")
        box["variation_strength"] = gr.Slider(
            **SHARE, value=start.variation_strength, label="Variation strength", elem_id="ldm-variation-strength"
        )
    box["lines"] = gr.Textbox(
        label="Prompts, one a line, in place of the one above",
        placeholder="a green ring --d 5 --s 30 --w 64 --h 64",
        lines=2,
        max_lines=12,
        elem_id="ldm-lines",
    )
    return gr.UploadButton("Load a file of prompts", size="sm", type="binary", file_types=[".txt", ".json", ".jsonl"], elem_id="ldm-load")


def _more(box: Box, start: Form, page: Page) -> None:
    """The settings that few change."""
    with gr.Row():
        box["vae"] = gr.Dropdown([(OWN_VAE, "")], value="", label="VAE", elem_id="ldm-vae", min_width=140)
        box["clip_skip"] = gr.Number(start.clip_skip, precision=0, minimum=1, label="Clip skip", elem_id="ldm-clip-skip", min_width=100)
    with gr.Row():
        box["rescale"] = gr.Slider(**SHARE, value=start.rescale, label="CFG rescale", elem_id="ldm-rescale", min_width=140)
        box["eta"] = gr.Slider(**SHARE, value=0, label="Eta", elem_id="ldm-eta", min_width=140)
    with gr.Row():
        box["guidance_from"] = gr.Slider(**SHARE, value=0, label="CFG from this share of the steps", elem_id="ldm-from", min_width=140)
        box["guidance_to"] = gr.Slider(**SHARE, value=1, label="to this one", elem_id="ldm-to", min_width=140)
    with gr.Row():
        box["guidance_curve"] = gr.Dropdown(list(CURVES), value="constant", label="CFG over the steps", elem_id="ldm-curve", min_width=140)
        kinds = list(PRECISIONS) if start.precision == "fp32" else [start.precision]  # weights in a half type stay there
        box["precision"] = gr.Dropdown(kinds, value=start.precision, label="Precision", elem_id="ldm-precision", min_width=140)
    with gr.Row():
        for name, (label, _, choices) in OF_SOME.items():
            kept: Any = {"value": getattr(start, name), "label": label, "elem_id": f"ldm-{name}", "visible": has(page.studio.family, name)}
            if not choices:
                box[name] = gr.Textbox(min_width=140, **kept)
            elif isinstance(choices[0], str):
                names: Any = [("None of this model", ""), *((choice.title(), choice) for choice in choices)]
                box[name] = gr.Dropdown(names, min_width=140, **kept)
            else:
                step = 1 if isinstance(kept["value"], int) else 0.05
                box[name] = gr.Slider(*choices, step=step, min_width=140, **kept)
    box["notation"] = gr.Checkbox(value=True, label="Brackets, BREAK and AND in prompts have a meaning", elem_id="ldm-notation")
