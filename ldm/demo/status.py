"""Status of a drawing as HTML; everything that a user or a file may have written is escaped."""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm.config.counts import plural
from ldm.config.options import options_of
from ldm.demo.orders import Form
from ldm.demo.studio import Job
from ldm.sampling.adapters import remembered
from ldm.sampling.recipe import Recipe
from ldm.sampling.request import Base, Choice, Editing, SamplerOptions

JPEG = 85  # quality of previews

CSS = """
.gradio-container { max-width: 1500px !important; width: 100% !important; margin: auto }
#ldm-live, #ldm-live > * { padding: 0 !important }
#ldm-pictures .grid-wrap, #ldm-history .grid-wrap { max-height: 78vh }
.ldm-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; padding: 2px 4px }
.ldm-head b { font-size: 20px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere }
.ldm-head span, .ldm-quiet { color: var(--body-text-color-subdued); font-size: 13px }
.ldm-live { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 12px;
  background: var(--block-background-fill) }
.ldm-bar { height: 6px; border-radius: 3px; overflow: hidden; background: var(--border-color-primary); margin-bottom: 8px }
.ldm-bar i { display: block; height: 100%; background: var(--color-accent); border-radius: 3px; transition: width .2s }
.ldm-live p { margin: 0; font-size: 14px; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.ldm-live img { display: block; margin: 10px auto 0; height: min(320px, 40vh); max-width: 100%; object-fit: contain; border-radius: 6px }
.ldm-bad { border-color: #d9534f; background: color-mix(in srgb, #d9534f 9%, var(--block-background-fill)) }
.ldm-code { font-family: var(--font-mono); font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0;
  padding: 8px 10px; border-radius: 6px; background: var(--background-fill-secondary) }
.ldm-tokens { margin: 0; padding: 0 4px; text-align: right; font-size: 12px; color: var(--body-text-color-subdued) }
.ldm-many { color: var(--color-accent) }
#ldm-prompt textarea { font-size: 16px }
#ldm-fresh { align-self: end; padding-bottom: 10px; flex: 0 0 105px; min-width: 105px !important; overflow: visible !important }
#ldm-fresh label, #ldm-fresh .label-text { overflow: visible; white-space: nowrap }
#ldm-tokens { min-height: 0 !important; margin: -8px 0 }
.gradio-container .label-wrap { text-align: left }
#ldm-examples .gallery { gap: 6px }
#ldm-width input[type=number], #ldm-height input[type=number] { width: 52px; padding-inline: 4px }
#ldm-width [data-testid=block-info], #ldm-height [data-testid=block-info] { white-space: nowrap }
#ldm-drop { white-space: normal }
body.ldm-over::after { content: "Drop the picture to take its settings"; position: fixed; inset: 10px; z-index: 99; display: grid;
  place-items: center; pointer-events: none; border: 3px dashed var(--color-accent); border-radius: 12px; font-size: 20px;
  color: var(--body-text-color); background: color-mix(in srgb, var(--background-fill-primary) 85%, transparent) }
.ldm-board canvas { width: 320px; max-width: 100%; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 8px; cursor: crosshair; touch-action: none }
.ldm-chip { display: inline-flex; align-items: center; gap: 4px; margin-right: 10px; font-size: 12px }
.ldm-chip i { width: 12px; height: 12px; border-radius: 3px; border: 1px solid var(--border-color-primary) }
footer { display: none !important }
@media (max-width: 760px) {
  #ldm-left { display: contents }
  #ldm-halves { flex-direction: column; flex-wrap: nowrap }
  #ldm-ask { order: 1 } #ldm-right { order: 2 } #ldm-settings { order: 3 }
  #ldm-examples > .gallery { flex-wrap: nowrap; overflow-x: auto; padding-bottom: 4px }
  #ldm-examples .gallery-item { flex: none; max-width: 80% }
  #ldm-history .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important }
}
"""
SCRIPT = """<script>
(() => {
  const tips = TIPS, free = button => button && !button.disabled
  document.addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      document.querySelector("#ldm-generate")?.click()
      event.preventDefault()
    } else if (event.key === "Escape") {
      const stop = document.querySelector("#ldm-cancel")
      if (free(stop)) stop.click()
    }
  })
  document.addEventListener("mouseover", event => {
    const part = event.target.closest?.('[id^="ldm-"]')
    if (part && tips[part.id] && !part.title) part.title = tips[part.id]
  })
  const picture = event => [...(event.dataTransfer?.items ?? [])].some(one => one.kind === "file")
    && !event.target.closest?.("#ldm-editor, #ldm-load, .ldm-view")
  // Boards: rectangles and points are lines of the text beside them.
  const areaOf = board => board.closest(".ldm-view").querySelector("textarea")
  const lines = area => area.value.split("\\n").filter(one => one.trim())
  const write = (area, all) => {
    Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(area, all.join("\\n"))
    area.dispatchEvent(new Event("input", {bubbles: true}))
  }
  const show = (board, extra) => {
    const canvas = board.querySelector("canvas"), brush = canvas.getContext("2d"), many = board.dataset.form === "boxes" ? 4 : 2
    const style = getComputedStyle(document.body), [w, h] = [canvas.width, canvas.height]
    brush.clearRect(0, 0, w, h)
    brush.strokeStyle = style.getPropertyValue("--color-accent") || "#f60"
    brush.fillStyle = style.getPropertyValue("--body-text-color") || "#888"
    brush.lineWidth = 2
    brush.font = "13px sans-serif"
    for (const line of [...lines(areaOf(board)), ...(extra ? [extra] : [])]) {
      const parts = line.replaceAll(",", " ").trim().split(/\\s+/), at = parts.slice(0, many).map(Number)
      if (at.length < many || at.some(Number.isNaN)) continue
      const words = parts.slice(many).join(" ")
      if (many === 4) brush.strokeRect(at[0] * w, at[1] * h, (at[2] - at[0]) * w, (at[3] - at[1]) * h)
      else { brush.beginPath(); brush.arc(at[0] * w, at[1] * h, 4, 0, 7); brush.fill() }
      brush.fillText(words, at[0] * w + 5, at[1] * h + 15)
    }
  }
  let held
  const place = (canvas, event) => {
    const box = canvas.getBoundingClientRect(), cut = share => Math.min(1, Math.max(0, share))
    return [cut((event.clientX - box.left) / box.width), cut((event.clientY - box.top) / box.height)]
  }
  const word = all => all.map(one => one.toFixed(3)).join(" ")
  const box = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[0], b[0]), Math.max(a[1], b[1])]
  document.addEventListener("pointerdown", event => {
    const canvas = event.target.closest?.(".ldm-board canvas")
    if (!canvas) return
    held = {canvas, board: canvas.parentElement, from: place(canvas, event)}
    event.preventDefault()
  })
  document.addEventListener("pointermove", event => {
    if (held && held.board.dataset.form === "boxes") show(held.board, word(box(held.from, place(held.canvas, event))))
  })
  document.addEventListener("pointerup", event => {
    if (!held) return
    const {canvas, board, from} = held, area = areaOf(board), to = box(from, place(canvas, event))
    held = null
    if (board.dataset.form === "points") write(area, [...lines(area), word(from) + " " + board.dataset.names.split(",")[0]])
    else if (to[2] - to[0] > 0.01 && to[3] - to[1] > 0.01) write(area, [...lines(area), word(to) + " "])
    show(board)
    area.focus()
    area.setSelectionRange(area.value.length, area.value.length)
  })
  document.addEventListener("input", event => {
    const board = event.target.closest?.(".ldm-view")?.querySelector(".ldm-board canvas")?.parentElement
    if (board) show(board)
  })
  let leaving
  document.addEventListener("dragover", event => {
    if (!picture(event)) return
    event.preventDefault()
    document.body.classList.add("ldm-over")
    clearTimeout(leaving)
    leaving = setTimeout(() => document.body.classList.remove("ldm-over"), 250)
  }, true)
  document.addEventListener("drop", event => {
    if (!picture(event)) return
    event.preventDefault()
    event.stopPropagation()
    document.body.classList.remove("ldm-over")
    const input = document.querySelector("input#ldm-drop, #ldm-drop input[type=file], #ldm-drop ~ input[type=file]")
      ?? document.querySelector("#ldm-drop")?.parentElement.querySelector("input[type=file]")
    input.files = event.dataTransfer.files
    input.dispatchEvent(new Event("change", {bubbles: true}))
  }, true)
})();
</script>"""
# What a part of the page says when the mouse rests on it; where it is an option of `ldm sample`, that option's help.
TIPS = {
    "ldm-model": "What draws: the runs here, and the folders that were given by --models.",
    "ldm-lora": "Adds <lora:NAME:1> to the prompt; the number is its weight.",
    "ldm-prompt": "What to draw. Ctrl+Enter draws, Esc stops.",
    "ldm-width": "--size WIDTHxHEIGHT; far from the size that the model was trained at, pictures fall apart: enlarge them instead.",
    "ldm-height": "--size WIDTHxHEIGHT; far from the size that the model was trained at, pictures fall apart: enlarge them instead.",
    "ldm-fresh": "A new seed for every drawing; without it the seed stays.",
    "ldm-many": "So many pictures at once; picture k has the seed + k.",
    "ldm-vae": "Another autoencoder than the model's, out of a folder given by --vae-dir.",
    "ldm-lines": "As --prompts FILE of ldm sample: a prompt a line, with flags such as --d 5 (seed), --s 30 (steps), --n blurry.",
    "ldm-notation": "(word:1.3) is stronger, [word] weaker, [a:b:0.5] changes, BREAK and AND divide; without it all stand for themselves.",
    "ldm-delete": "Delete the chosen picture, its file too.",
    "ldm-forget": "Delete all of your pictures, their files too.",
}
OPTION_TIPS = {
    "negative": "negative",
    "seed": "seed",
    "steps": "steps",
    "guidance": "guidance",
    "sampler": "sampler",
    "spacing": "spacing",
    "strength": "strength",
    "hires": "hires",
    "hires-strength": "hires_strength",
    "variations": "variations",
    "variation-strength": "variation_strength",
    "clip-skip": "clip_skip",
    "rescale": "rescale",
    "eta": "eta",
    "from": "guidance_interval",
    "to": "guidance_interval",
    "curve": "guidance_curve",
    "precision": "precision",
}


def head() -> str:
    """What the page's head has besides: keys, tooltips, and pictures that are dropped anywhere."""
    told = {name: one.help for part in (Base, Choice, SamplerOptions, Editing) for name, one in options_of(part).items()}
    tips = TIPS | {f"ldm-{name}": told[option] for name, option in OPTION_TIPS.items()}
    return SCRIPT.replace("TIPS", json.dumps(tips).replace("<", "\\u003c"))


def heading(model: str, facts: str) -> str:
    """The page's first line."""
    return f'<div class="ldm-head"><b>{escape(model)}</b><span>{escape(facts)}</span></div>'


def idle() -> str:
    """What is shown before anything was drawn."""
    return '<div class="ldm-live"><p class="ldm-quiet">Write a prompt and press Generate, or Ctrl+Enter.</p></div>'


def panel(text: str, share: float | None = None, preview: Any = None, bad: bool = False, notes: Sequence[str] = ()) -> str:
    """A line of text under a bar, over notes and a preview (H,W,3) uint8."""
    bar = "" if share is None else f'<div class="ldm-bar"><i style="width:{100 * share:.0f}%"></i></div>'
    image = "" if preview is None else f'<img alt="preview" src="{data_address(preview)}">'
    return f'<div class="ldm-live{" ldm-bad" * bad}">{bar}<p>{escape(text)}</p>{_noted(notes)}{image}</div>'


def _noted(notes: Sequence[str]) -> str:
    return "".join(f'<p class="ldm-quiet">{escape(note)}</p>' for note in notes)


def progress(job: Job, ahead: int, waiting: tuple[int, int] = (1, 0)) -> str:
    """Where a job is by now.

    Args:
        waiting: the orders in the queue, this one included, and their pictures.
    """
    many = len(job.order.recipes)
    queue = f" In the queue: {waiting[0]} orders, {plural(waiting[1], 'picture')}." if waiting[0] > 1 else ""
    if job.state == "waiting":
        before = f"{plural(ahead, 'turn')} before yours" if ahead else "next"
        return panel(f"Waiting: {before}.{queue}", 0.0, notes=job.notes)
    which = f"picture {min(len(job.pictures) + 1, many)} of {many}" if many > 1 else "the picture"
    step = f", step {job.steps} of {job.of}" if job.of else ""
    return panel(f"Drawing {which}{step}.{queue}", job.progress, job.preview, notes=job.notes)


def token_count(found: tuple[int, int] | None) -> str:
    """How long a prompt is: its tokens, and how many are read at once."""
    if found is None:
        return ""
    count, room = found
    chunks = -(-count // room) if count > room else 1
    more = f" · read in {chunks} parts" if chunks > 1 else ""
    return f'<p class="ldm-tokens{" ldm-many" * (chunks > 1)}">{count} of {room} tokens{more}</p>'


def finished(job: Job, extra: str = "") -> str:
    """How it ended."""
    if job.state == "failed":
        return panel(job.error, bad=True)
    done, many = len(job.pictures), len(job.order.recipes)
    if job.state == "cancelled":
        return panel(f"Cancelled after {done} of {many}." if many > 1 else "Cancelled.")
    said = f"{plural(many, 'picture')} in {job.seconds:.1f} s"
    return f'<div class="ldm-live"><p>{said}</p>{_noted(job.notes)}{extra}</div>'


def command(recipes: Sequence[Recipe], form: Form, init_image: Sequence[Path] = ()) -> str:
    """The command that draws the same pictures, and where the files are that it needs."""
    recipe, many = recipes[0], form.pictures
    words = ["ldm", "sample", "--prompts", "prompts.txt"] if form.lines.strip() else ["ldm", "sample", recipe.prompt]
    seed = form.seed if form.lines.strip() else recipe.seed
    words += ["--model", recipe.model, "--seed", str(seed), "--size", f"{recipe.width}x{recipe.height}"]
    words += ["--steps", str(recipe.steps), "--guidance", f"{recipe.guidance:g}", "--sampler", recipe.sampler, "--spacing", recipe.spacing]
    words += ["--precision", recipe.precision]
    words += ["--n", str(many)] if many > 1 else []
    words += ["--negative", recipe.negative] if recipe.negative else []
    words += ["--variations", str(form.variations), "--variation-strength", repr(form.variation_strength)] if form.variations else []
    words += [] if recipe.notation else ["--literal"]
    for name, usual in (("rescale", None), ("eta", 0.0), ("clip_skip", 1), ("guidance_curve", "constant")):
        if (value := getattr(recipe, name)) != usual:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    if (recipe.guidance_from, recipe.guidance_to) != (0, 1):
        words += ["--guidance-interval", f"{recipe.guidance_from!r},{recipe.guidance_to!r}"]
    if recipe.hires != 1:
        words += ["--hires", f"{recipe.hires:g}", "--hires-strength", repr(recipe.hires_strength)]
    for one in remembered(asdict(recipe), "loras"):
        words += ["--lora", f"{one['file']}:{one['weight']!r}"]
    for one in remembered(asdict(recipe), "embeddings"):
        words += ["--embedding", one["file"]]
    for one in remembered(asdict(recipe), "vae"):
        words += ["--vae", one["file"]]
    if recipe.init:
        words += ["--init", "init.png", "--strength", repr(recipe.strength)]
        words += ["--mask", "mask.png"] if recipe.mask else []
    links = ", ".join(f'<a href="{address(path)}" download="{escape(path.name)}">{escape(path.name)}</a>' for path in init_image)
    needs = f'<p class="ldm-quiet">Its files: {links}</p>' if init_image else ""
    return f'<pre class="ldm-code">{escape(shlex.join(words))}</pre>{needs}'


def address(path: Path) -> str:
    """Where the page's server has one of its files."""
    return f"/gradio_api/file={quote(str(path))}"


def data_address(pixels: Any) -> str:
    """A picture (H,W,3) uint8 as an address that holds all of it, small enough to be sent many times."""
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    image.thumbnail((512, 512))
    image.save(stream, format="JPEG", quality=JPEG)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
