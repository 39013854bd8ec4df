"""The grid verb, an X/Y/Z plot: a table of pictures whose settings change from cell to cell, with labels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.command import call
from ldm.cli.models import check_sides, device_for, model_for, name_of, tell
from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.options import option, options_of
from ldm.families.draws import PLAIN, Draws
from ldm.sampling import doubts
from ldm.sampling.adapters import refuse, scaled, with_adapters
from ldm.sampling.axes import Axis, cells, read_axis
from ldm.sampling.given import Files
from ldm.sampling.picture_files import save_all
from ldm.sampling.prompt_files import Asked
from ldm.sampling.prompt_tags import tagged
from ldm.sampling.recipe import Recipe, save_picture
from ldm.sampling.request import REPLACED, Base, Device, Editing, Following, NamedAdapters, SamplerOptions, Views, check_sheet, clean
from ldm.sampling.unheard import in_words

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.sampling.init_images import InitImage

MARGIN = 6  # px around a label


def main(words: Sequence[str]) -> int:
    """`ldm grid PROMPT --x NAME=VALUES`: the exit code."""
    return call(grid, words, "ldm grid")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """X/Y/Z plot: what changes from picture to picture, and where it goes."""

    prompt: str = option("", "What to draw; may be left out with --from.", argument=True)
    x: str = option("", "What changes from column to column, such as guidance=1,3,7, or prompt=green,pink,yellow.")
    y: str = option("", "From row to row.")
    z: str = option("", "From table to table, one below the other.")
    out: Path = option(Path("grid.png"), "The table, a PNG; never replaces a file.")
    pictures: Path | None = option(None, "A folder for the single pictures, too.")

    def axes(self) -> list[Axis]:
        """The axes, the last changing fastest.

        Raises:
            UserError: where there are none, or the file is there already.
        """
        found = [read_axis(text, name) for name, text in (("z", self.z), ("y", self.y), ("x", self.x)) if text]
        if not found:
            raise UserError("x: what changes from picture to picture? Give --x guidance=1,3,7, and --y and --z for more")
        check_sheet("out", self.out)
        return found


def grid(
    plot: Plot,
    following: Following,
    base: Base,
    sampler: SamplerOptions,
    editing: Editing,
    views: Views,
    adapters: NamedAdapters,
    device: Device,
) -> int:
    """Draw a table of pictures; each is the one that `ldm sample` draws with these settings."""
    axes = plot.axes()
    old = following.old((plot, base, sampler, editing, views, adapters), tell)
    refuse(old, "ldm grid")
    words = clean(plot.prompt or str(old.get("prompt", "")))
    if not words:
        raise UserError('prompt: what to draw? Write ldm grid "a green ring" --x ..., or --from PICTURE')
    (asked,) = tagged([Asked(prompt=words)], adapters.lora_dir, adapters.lora, tell, following.literal)
    loras = (*adapters.lora, *asked.loras)
    sampler.check()
    edited = editing.edited(base.size, old)
    if "strength" not in edited and any(axis.name == "strength" for axis in axes):
        raise UserError("strength: changes nothing without a picture to start from; give it by --init")
    if not edited.get("source") and (taken := next((axis.name for axis in axes if axis.name in REPLACED), "")):
        raise UserError(f"{taken}: changes nothing without a prompt to take attention from; give --source")
    rest = {**edited, **editing.passes(old), **following.carried(old)}
    replaced = {**{name: getattr(part, name) for part in (base, sampler, editing) for name in options_of(type(part))}, "seed": base.seed}
    for axis in axes:
        if axis.name != "prompt" and replaced.get(axis.name) not in (None, ""):
            tell(f"{axis.name}: an axis goes through its values, so --{axis.name.replace('_', '-')} changes nothing")
        if axis.name in ("seed", "variation") and editing.invert is not None:
            raise UserError(f"{axis.name}: changes nothing with --invert, which starts from the noise that its picture comes from")
    if rest["hires"] == 1 and any(axis.name == "hires_strength" for axis in axes):
        raise UserError("hires_strength: changes nothing without a second pass; give --hires 2")
    folder, shape, place = model_for(base.model), base.shape(old), device.device
    if editing.picture is None and not any(axis.name in ("size", "hires") for axis in axes):
        check_sides(shape, folder, float(rest["hires"]))
    plot.out.parent.mkdir(parents=True, exist_ok=True)

    from ldm.diffusion.samplers import SAMPLERS
    from ldm.sampling import jobs
    from ldm.sampling.init_images import init_image_of

    place = device_for(place or ("cpu" if PLAIN.following(old).other else ""))
    family, added = with_adapters(folder, place, loras, adapters.embedding, old, tell, vae=adapters.vae)
    given = Files(family.told, family.unheard)
    told = given.field(views.given, old, tell)
    rest |= {"model": name_of(folder), "model_hash": family.content_hash, **added, "given": told}
    following.compare(old, folder, family.content_hash, tell)
    init_image = None
    if editing.picture is not None:
        size = shape or family.defaults["size"]
        init_image = init_image_of(editing.picture, editing.mask, editing.margins(old), size, old, tell)
        shape = init_image.size
        rest |= {"init": init_image.init_hash, "mask": init_image.mask_hash}
    if not family.redraws and editing.strength is None and "strength" not in old:
        rest["strength"] = 1.0
    wanted = sampler.chosen(old, editing.usual, family.settings())
    common = jobs.Common(seed=base.first(old), wanted=wanted, negative=base.avoided(old), size=shape, rest=rest)
    (first,) = jobs.recipes(family, [asked], common)
    made = cells(first, axes, lambda name: sampler.spacing or SAMPLERS[name].spacing)
    for said in (*in_words(made, family), *doubts.of(made, family)):
        tell(said)
    started = time.monotonic()
    factors = next((axis.values for axis in axes if axis.name == "lora"), ())
    if not factors:
        drawn = draw_cells(family, made, init_image=init_image, given=given, note=tell)
    else:
        found_at: dict[int, Tensor] = {}
        for factor in factors:  # its weights are merged into a model of its own
            family, _ = with_adapters(folder, place, loras, adapters.embedding, old, lambda text: None, factor, adapters.vae)
            places = [i for i, one in enumerate(made) if one.loras == scaled(first.loras, factor)]
            cells_of = draw_cells(family, [made[i] for i in places], init_image=init_image, given=given, note=tell)
            found_at |= dict(zip(places, cells_of, strict=True))
        drawn = [found_at[i] for i in range(len(made))]
    save_picture(plot.out, sheet(drawn, axes), first)
    if plot.pictures is not None:
        save_all(plot.pictures, drawn, made)
    print(f"{plural(len(made), 'picture')} of {folder} in {time.monotonic() - started:.1f} s: {plot.out}", file=sys.stderr)
    return 0


def draw_cells(
    family: Draws,
    made: Sequence[Recipe],
    *,
    init_image: InitImage | None = None,
    given: Files | None = None,
    on_picture: Callable[[int, int], None] | None = None,
    note: Callable[[str], None],
) -> list[Tensor]:
    """The pictures (H,W,3) uint8 of any recipes, in their order; those of one kind are drawn together."""
    from ldm.sampling import jobs
    from ldm.sampling.picture_files import Bar

    found: dict[int, Tensor] = {}
    once = cache(note)
    with Bar(len(made)) as show:
        for places in jobs.alike(made, family.defaults["chunk"]):
            images = jobs.draw(family, [made[i] for i in places], init_image=init_image, given=given, note=once)
            found |= dict(zip(places, images, strict=True))
            show(len(found))
            if on_picture is not None:
                on_picture(len(found), len(made))
    return [found[i] for i in range(len(made))]


def sheet(pictures: Sequence[Any], axes: Sequence[Axis]) -> Any:
    """One picture (H,W,3) uint8 of the cells (H,W,3) of up to three axes, z, y and x, the last changing fastest, with labels."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    one = Axis("", ("",))
    z, y, x = [one] * (3 - len(axes)) + list(axes)
    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    font: Any = ImageFont.load_default(max(11, min(20, width // 8)))

    def fitted(text: str) -> tuple[str, ...]:
        """Lines no longer than a cell is wide, at most three."""
        lines, line = [], ""
        for word in text.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > max(width, 48) - 2 * MARGIN:
                lines.append(line)
                longer = word
            line = longer
        return (*lines, line)[:3]

    def labels(axis: Axis) -> list[tuple[str, ...]]:
        return [fitted(axis.label(value)) if axis.name else () for value in axis.values]

    step = int(font.size * 1.25)
    across, down, over = labels(x), labels(y), labels(z)
    head = max(map(len, across)) * step + (MARGIN if any(across) else 0)
    side = int(max((font.getlength(line) for label in down for line in label), default=0))
    side += 2 * MARGIN if side else 0
    title = max(map(len, over)) * step + (MARGIN if any(over) else 0)
    gap = 2
    block = title + head + len(down) * (height + gap)
    image = Image.new("RGB", (side + len(across) * (width + gap), len(over) * block), "white")
    pen = ImageDraw.Draw(image)
    for k, label in enumerate(over):
        top = k * block
        for n, line in enumerate(label):
            pen.text((side + MARGIN, top + n * step), line, "black", font)
        for i, words in enumerate(across):
            for n, line in enumerate(words):
                pen.text((side + i * (width + gap) + width // 2, top + title + n * step), line, "black", font, anchor="ma")
        for j, words in enumerate(down):
            place = top + title + head + j * (height + gap)
            for n, line in enumerate(words):
                pen.text((MARGIN, place + (height - len(words) * step) // 2 + n * step), line, "black", font)
            for i in range(len(across)):
                cell = pictures[(k * len(down) + j) * len(across) + i]
                image.paste(Image.fromarray(np.asarray(cell)), (side + i * (width + gap), place))
    return np.array(image)
