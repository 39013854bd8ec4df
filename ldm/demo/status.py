"""Status of a drawing as HTML; everything that a user or a file may have written is escaped."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm.demo.studio import Job
from ldm.sampling.adapters import remembered
from ldm.sampling.recipe import Recipe

JPEG = 85  # quality of previews

CSS = """
.gradio-container { max-width: 1500px !important; width: 100% !important; margin: auto }
#ldm-live, #ldm-live > * { padding: 0 !important }
#ldm-pictures .grid-wrap, #ldm-history .grid-wrap { max-height: 78vh }
.ldm-head { display: flex; align-items: baseline; gap: 14px; padding: 2px 4px }
.ldm-head b { font-size: 20px; font-weight: 650; letter-spacing: -.01em }
.ldm-head span, .ldm-quiet { color: var(--body-text-color-subdued); font-size: 13px }
.ldm-live { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 12px;
  background: var(--block-background-fill) }
.ldm-bar { height: 6px; border-radius: 3px; overflow: hidden; background: var(--border-color-primary); margin-bottom: 8px }
.ldm-bar i { display: block; height: 100%; background: var(--color-accent); border-radius: 3px; transition: width .2s }
.ldm-live p { margin: 0; font-size: 14px; font-variant-numeric: tabular-nums }
.ldm-live img { display: block; margin: 10px auto 0; height: min(320px, 40vh); max-width: 100%; object-fit: contain; border-radius: 6px }
.ldm-bad { border-color: #d9534f; background: color-mix(in srgb, #d9534f 9%, var(--block-background-fill)) }
.ldm-code { font-family: var(--font-mono); font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 0;
  padding: 8px 10px; border-radius: 6px; background: var(--background-fill-secondary) }
#ldm-prompt textarea { font-size: 16px }
#ldm-fresh { align-self: end; padding-bottom: 10px }
footer { display: none !important }
"""
HEAD = """<script>
document.addEventListener("keydown", event => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return
  document.querySelector("#ldm-generate")?.click()
  event.preventDefault()
});
</script>"""


def heading(model: str, facts: str) -> str:
    """The page's first line."""
    return f'<div class="ldm-head"><b>{escape(model)}</b><span>{escape(facts)}</span></div>'


def idle() -> str:
    """What is shown before anything was drawn."""
    return '<div class="ldm-live"><p class="ldm-quiet">Write a prompt and press Generate, or Ctrl+Enter.</p></div>'


def panel(text: str, share: float | None = None, preview: Any = None, bad: bool = False) -> str:
    """A line of text under a bar, over a preview (H,W,3) uint8."""
    bar = "" if share is None else f'<div class="ldm-bar"><i style="width:{100 * share:.0f}%"></i></div>'
    image = "" if preview is None else f'<img alt="preview" src="{data_address(preview)}">'
    return f'<div class="ldm-live{" ldm-bad" * bad}">{bar}<p>{escape(text)}</p>{image}</div>'


def progress(job: Job, ahead: int) -> str:
    """Where a job is by now."""
    many = len(job.order.recipes)
    if job.state == "waiting":
        before = f"{ahead} turn{'s' * (ahead != 1)} before yours" if ahead else "next"
        return panel(f"Waiting: {before}.", 0.0)
    which = f"picture {min(len(job.pictures) + 1, many)} of {many}" if many > 1 else "the picture"
    step = f", step {job.steps} of {job.of}" if job.of else ""
    return panel(f"Drawing {which}{step}", job.progress, job.preview)


def finished(job: Job, extra: str = "") -> str:
    """How it ended."""
    if job.state == "failed":
        return panel(job.error, bad=True)
    done, many = len(job.pictures), len(job.order.recipes)
    if job.state == "cancelled":
        return panel(f"Cancelled after {done} of {many}." if many > 1 else "Cancelled.")
    notes = "".join(f'<p class="ldm-quiet">{escape(note)}</p>' for note in job.notes)
    said = f"{many} picture{'s' * (many != 1)} in {job.seconds:.1f} s"
    return f'<div class="ldm-live"><p>{said}</p>{notes}{extra}</div>'


def command(recipe: Recipe, many: int = 1, model: str = "MODEL", init_image: Sequence[Path] = ()) -> str:
    """The command that draws the same pictures, and where the files are that it needs."""
    words = ["ldm", "sample", recipe.prompt, "--model", model, "--seed", str(recipe.seed), "--size", f"{recipe.width}x{recipe.height}"]
    words += ["--steps", str(recipe.steps), "--guidance", f"{recipe.guidance:g}", "--sampler", recipe.sampler, "--spacing", recipe.spacing]
    words += ["--precision", recipe.precision]
    words += ["--n", str(many)] if many > 1 else []
    words += ["--negative", recipe.negative] if recipe.negative else []
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
