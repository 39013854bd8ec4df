"""The verb that compares settings: a table of pictures with a label at each row and column."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldm.cli.command import call
from ldm.cli.sampling_options import MAX_SEED, device_for, edits_asked, known, model_for, name_of, size_given, tell
from ldm.config.errors import UserError
from ldm.families.draws import PRECISIONS, Draws, Wanted
from ldm.sampling.adapters import refuse, scaled, with_adapters
from ldm.sampling.axes import Axis, cells, read_axis
from ldm.sampling.prompt_files import Asked
from ldm.sampling.recipe import NAMES, SPACINGS, Recipe, read_recipe, save_picture, writable

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.sampling.init_images import InitImage

Option = typer.Option
MARGIN = 6  # px around a label


def main(words: Sequence[str]) -> int:
    """`ldm grid PROMPT --x NAME=VALUES`: the exit code."""
    return call(grid, words, "ldm grid")


def grid(
    prompt: Annotated[str, typer.Argument(help="What to draw; may be left out with --from.")] = "",
    x: Annotated[str, Option(help="What changes from column to column, such as guidance=1,3,7, or prompt=red,green,blue.")] = "",
    y: Annotated[str, Option(help="From row to row.")] = "",
    z: Annotated[str, Option(help="From table to table, one below the other.")] = "",
    recipe: Annotated[Path | None, Option("--from", help="A picture whose recipe is followed where no option says otherwise.")] = None,
    model: Annotated[str, Option(help="A folder or file of a model; default: the newest of runs/*.")] = "",
    seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help="Default: 0.")] = None,
    steps: Annotated[int | None, Option(min=1, max=1000, help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, Option(min=0, max=1000, help="Default: the model's.")] = None,
    sampler: Annotated[str, Option(help=f"{' '.join(NAMES)}; default: the model's.")] = "",
    spacing: Annotated[str, Option(help=f"{' '.join(SPACINGS)}; default: the sampler's.")] = "",
    precision: Annotated[str, Option(help="fp32 bf16 fp16; default: the model's.")] = "",
    negative: Annotated[str | None, Option(help="What to stay away from.")] = None,
    size: Annotated[str, Option(help="WIDTHxHEIGHT in px; default: the model's.")] = "",
    init: Annotated[Path | None, Option(help="A picture to start from.")] = None,
    strength: Annotated[float | None, Option(help="How much of INIT is drawn anew, 0 to 1.")] = None,
    mask: Annotated[Path | None, Option(help="White where it is to be new.")] = None,
    lora: Annotated[list[str] | None, Option(help="FILE[:WEIGHT], as often as wanted; --x lora=0,0.5,1 multiplies the weights.")] = None,
    embedding: Annotated[list[str] | None, Option(help="A file of a word that textual inversion learned; as often as wanted.")] = None,
    out: Annotated[Path, Option(help="The table, a PNG; never replaces a file.")] = Path("grid.png"),
    pictures: Annotated[Path | None, Option(help="A folder for the single pictures, too.")] = None,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is.")] = "",
) -> int:
    """Draw a table of pictures; each is the one that `ldm sample` draws with these settings."""
    axes = [read_axis(text, name) for name, text in (("z", z), ("y", y), ("x", x)) if text]
    if not axes:
        raise UserError("x: what changes from picture to picture? Give --x guidance=1,3,7, and --y and --z for more")
    if out.exists():
        raise UserError(f"out: {out} is there already; choose another name")
    found = read_recipe(recipe) if recipe else {}
    old: dict[str, Any] = asdict(found) if isinstance(found, Recipe) else {"notation": True, **found}
    refuse(old, "ldm grid")
    words = writable(prompt or str(old.get("prompt", ""))).replace("\0", " ")
    if not words:
        raise UserError('prompt: what to draw? Write ldm grid "a red circle" --x ..., or --from PICTURE')
    known("sampler", sampler, tuple(NAMES))
    known("spacing", spacing, SPACINGS)
    known("precision", precision, PRECISIONS)
    edited = edits_asked(init, strength, mask, None, None, None, size, old)
    if not edited and any(axis.name == "strength" for axis in axes):
        raise UserError("strength: changes nothing without a picture to start from; give it by --init")
    if not edited and old.get("init"):
        raise UserError("from: this picture was drawn out of another one; give that one by --init")
    folder, shape = model_for(model), size_given(size, old)
    out.parent.mkdir(parents=True, exist_ok=True)

    from ldm.diffusion.samplers import SAMPLERS
    from ldm.sampling import jobs
    from ldm.sampling.init_images import init_image_of

    place = device_for(device)
    family, added = with_adapters(folder, place, lora or [], embedding or [], old, tell)
    wanted = Wanted(steps=steps, guidance=guidance, sampler=sampler, precision=precision, spacing=spacing).over(old)
    rest: dict[str, Any] = {"model": name_of(folder), "model_hash": family.content_hash, **edited, **added}
    rest["notation"] = bool(old.get("notation", True))
    rest |= {name: old[name] for name in ("to", "share", "variation", "variation_seed", "hires", "hires_strength") if name in old}
    init_image = None
    if init is not None:
        init_image = init_image_of(init, mask, None, shape or family.defaults["size"], old, tell)
        rest |= {"init": init_image.init_hash, "mask": init_image.mask_hash}
    first, avoided = int(old.get("seed", 0) if seed is None else seed), str(old.get("negative", "") if negative is None else negative)
    (base,) = jobs.recipes(family, [Asked(prompt=words)], jobs.Common(seed=first, wanted=wanted, negative=avoided, size=shape, rest=rest))
    made = cells(base, axes, lambda name: spacing or SAMPLERS[name].spacing)
    started = time.monotonic()
    factors = next((axis.values for axis in axes if axis.name == "lora"), ())
    if not factors:
        drawn = draw_cells(family, made, init_image=init_image, note=tell)
    else:
        found_at: dict[int, Tensor] = {}
        for factor in factors:  # its weights are merged into a model of its own
            family, _ = with_adapters(folder, place, lora or [], embedding or [], old, lambda text: None, factor)
            places = [i for i, one in enumerate(made) if one.loras == scaled(base.loras, factor)]
            found_at |= dict(zip(places, draw_cells(family, [made[i] for i in places], init_image=init_image, note=tell), strict=True))
        drawn = [found_at[i] for i in range(len(made))]
    save_picture(out, table(drawn, axes), base)
    if pictures is not None:
        from ldm.sampling.picture_files import free, save

        pictures.mkdir(parents=True, exist_ok=True)
        number = free(pictures)
        for one, pixels in zip(made, drawn, strict=True):
            number, _ = save(pictures, number, one.seed, partial(save_picture, pixels=pixels.numpy(), recipe=one))
    print(f"{len(made)} pictures of {folder} in {time.monotonic() - started:.1f} s: {out}", file=sys.stderr)
    return 0


def draw_cells(
    family: Draws,
    made: Sequence[Recipe],
    *,
    init_image: InitImage | None = None,
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
            images = jobs.draw(family, [made[i] for i in places], init_image=init_image, note=once)
            found |= dict(zip(places, images, strict=True))
            show(len(found))
            if on_picture is not None:
                on_picture(len(found), len(made))
    return [found[i] for i in range(len(made))]


def table(pictures: Sequence[Any], axes: Sequence[Axis]) -> Any:
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
    sheet = Image.new("RGB", (side + len(across) * (width + gap), len(over) * block), "white")
    pen = ImageDraw.Draw(sheet)
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
                sheet.paste(Image.fromarray(np.asarray(cell)), (side + i * (width + gap), place))
    return np.array(sheet)
