"""The verb that draws: a model and prompts become picture files, each with its recipe."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli import call
from ldm.errors import UserError
from ldm.sample_words import (
    MAX_SEED,
    asked_for,
    device_for,
    hires_of,
    interval_of,
    name_of,
    newest,
    seeds_of,
    size_given,
    strength_given,
    tell,
    tell_overlong,
)  # fmt: skip

Option = typer.Option


def main(words: Sequence[str]) -> int:
    """`ldm sample PROMPT ...`: the exit code."""
    return call(sample, words, "ldm sample")


def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw; several prompts are drawn in turn.")] = None,
    prompts: Annotated[Path | None, Option(help="A file, a prompt a line (flags --n --w --h --d --l --s, or JSON); -: input.")] = None,
    recipe: Annotated[Path | None, Option("--from", help="A picture whose recipe is followed where no option says otherwise.")] = None,
    model: Annotated[str, Option(help="A model or run folder, or owner/name on the hub; default: the newest of runs/*.")] = "",
    n: Annotated[int, Option(min=1, help="Pictures per prompt; picture k has the seed SEED + k.")] = 1,
    seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help="Seed of each prompt's first picture; default: 0.")] = None,
    seeds: Annotated[str, Option(help="The seeds of every prompt, such as 1,5,9; in place of --seed and --n.")] = "",
    steps: Annotated[int | None, Option(min=1, max=1000, help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, Option(min=0, max=1000, help="Classifier-free guidance; 1: none; default: the model's.")] = None,
    guidance_interval: Annotated[str, Option(help="Guide only from one share of the steps to another, such as 0.1,0.8.")] = "",
    guidance_curve: Annotated[str, Option(help="Guidance over the steps: constant, or rising: linear cosine.")] = "",
    rescale: Annotated[float | None, Option(min=0, max=1, help="Guidance rescale (Lin 2023); default: the model's.")] = None,
    sampler: Annotated[str, Option(help="ddpm ddim plms euler euler_a heun dpmpp_2m dpmpp_2m_sde unipc; default: the model's.")] = "",
    spacing: Annotated[str, Option(help="Of the steps: trailing leading linspace karras; default: the sampler's.")] = "",
    eta: Annotated[float | None, Option(min=0, max=1, help="Noise of ddim's steps; default: 0, none.")] = None,
    precision: Annotated[str, Option(help="Of matrix products and convolutions: fp32 bf16 fp16; default: the model's.")] = "",
    negative: Annotated[str | None, Option(help="What to stay away from; default: nothing.")] = None,
    size: Annotated[str, Option(help="WIDTHxHEIGHT in px; default: the model's.")] = "",
    literal: Annotated[bool, Option("--literal", help="Brackets, BREAK and AND in prompts stand for themselves.")] = False,
    hires: Annotated[float | None, Option(min=1, max=8, help="Draw so many times smaller first, enlarge, and draw anew in part.")] = None,
    hires_strength: Annotated[float | None, Option(min=0, max=1, help="How much the second pass draws anew; default: 0.5.")] = None,
    init: Annotated[Path | None, Option(help="A picture to start from, in place of noise.")] = None,
    strength: Annotated[float | None, Option(help="How much of INIT is drawn anew, 0 to 1; default: 0.75, with MASK 1.")] = None,
    mask: Annotated[Path | None, Option(help="A picture as large as INIT, white where it is to be new; the rest keeps its bytes.")] = None,
    batch: Annotated[int, Option(min=1, help="Pictures between two writes to disk; never changes a picture.")] = 8,
    out: Annotated[Path, Option(help="Folder of the pictures.")] = Path("outputs"),
    grid: Annotated[Path | None, Option(help="Also one PNG of all, a row for each prompt.")] = None,
    save_steps: Annotated[bool, Option("--save-steps", help="Beside each picture, a strip of what it was at every step.")] = False,
    resume: Annotated[bool, Option("--resume", help="Leave out the pictures that OUT holds already.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per picture.")] = False,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is.")] = "",
    attention: Annotated[str, Option(help="Kernel: auto sdpa plain xformers sliced; default: auto.")] = "",
    compiled: Annotated[bool, Option("--compile", help="Compile the network first: minutes, then faster steps.")] = False,
    low_memory: Annotated[bool, Option("--low-memory", help="One part of the model in memory at a time.")] = False,
    tile: Annotated[int, Option(min=0, help="Decode pictures larger than TILE x TILE px in stripes; 0: never.")] = 512,
) -> int:
    """Draw pictures of prompts. The same seed gives the same picture, whatever the batch and its neighbours."""
    from ldm.recipe import Recipe, read_recipe, writable

    found = read_recipe(recipe) if recipe else {}
    # Other programs' pictures say nothing of it, and mean the notation.
    old: dict[str, Any] = asdict(found) if isinstance(found, Recipe) else {"notation": True, **found}
    wanted = asked_for(prompt or [], prompts, old.get("prompt"))
    avoided = writable(old.get("negative", "") if negative is None else negative).replace("\0", " ")
    start = int(old.get("seed", 0) if seed is None else seed)
    own_seeds = seeds_of(seeds, seed, n)
    shape = size_given(size, old)
    interval = interval_of(guidance_interval, old)
    for name, value in (("guidance", guidance), ("rescale", rescale), ("eta", eta)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name}: got {value}; a finite number is needed")
    strength = strength_given(init, strength, mask, old)
    passes = hires_of(hires, hires_strength, init, old)
    folder = model or newest()
    out.mkdir(parents=True, exist_ok=True)
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)

    from ldm import jobs
    from ldm.families.finished import load
    from ldm.families.running import Running, ready
    from ldm.picture_files import free, present

    # As many threads as torch finds by itself: a number found by timing would change the last bits from run to run.
    family = load(folder, device=device_for(device), low_memory=low_memory)
    chosen: dict[str, Any] = {
        "steps": old.get("steps") if steps is None else steps,
        "guidance": old.get("guidance") if guidance is None else guidance,
        "rescale": old.get("rescale") if rescale is None else rescale,
        "sampler": sampler or old.get("sampler"),
        # A spacing belongs to its sampler, unless it is asked for.
        "spacing": spacing or (None if sampler else old.get("spacing")),
        "eta": old.get("eta", 0.0) if eta is None else eta,
        "precision": precision or old.get("precision"),
        "guidance_curve": guidance_curve or old.get("guidance_curve", "constant"),
        **interval,
    }
    running = Running(attention=attention or None, compiled=compiled, low_memory=low_memory, tile=tile)  # type: ignore[arg-type]
    ready(family, folder, running, family.settings(**chosen).precision)
    edits: Any = ()
    rest: dict[str, Any] = {"model": name_of(folder), "model_hash": family.content_hash, **passes}
    rest["notation"] = not literal and bool(old.get("notation", True))
    if old.get("model_hash", family.content_hash) != family.content_hash:
        tell(f"{recipe} was made by the model {old['model']}, not by {folder}: the picture will differ")
    if init is not None:
        if sizes := [one for one in wanted if one.width or one.height]:
            raise UserError(f"init: the prompt {sizes[0].prompt[:40]!r} has a size of its own; leave out --w and --h, or use --size")
        edits, edited = _edits(family, init, mask, strength, shape or family.defaults["size"], old)
        rest |= edited
    made = jobs.recipes(family, wanted, own_seeds, seed=start, n=n, chosen=chosen, negative=avoided, size=shape, **rest)
    for text in dict.fromkeys(text for one in made for text in (one.prompt, one.negative)):
        tell_overlong(family, text, rest["notation"])
    if resume and (kept := present(out)):
        missing = [one for one in made if one not in kept]
        tell(f"{len(made) - len(missing)} of {len(made)} pictures are in {out} already")
        made = missing

    started = time.monotonic()
    pictures = _drawn(family, made, edits, out, free(out), batch, save_steps, as_json, grid is not None)
    if grid is not None and pictures:
        from ldm.picture_files import save_sheet

        each = len(own_seeds) if own_seeds else n
        save_sheet(pictures, grid, each if each > 1 or len(wanted) > 8 else min(len(wanted), 8))
    spent = time.monotonic() - started
    where = f"{out}/{f', all on {grid}' if grid else ''}"
    print(f"{len(made)} picture{'s' * (len(made) != 1)} of {folder} in {spent:.1f} s: {where}", file=sys.stderr)
    return 0


def _drawn(
    family: Any, made: Sequence[Any], edits: Any, out: Path, first: int, batch: int, save_steps: bool, as_json: bool, keep: bool
) -> list[Any]:
    """Draw recipes and write each picture as soon as it is there; the pictures in order, where they are to be kept."""
    from ldm import jobs
    from ldm.families.film import Film
    from ldm.picture_files import Bar, save
    from ldm.recipe import save_picture

    chunk = family.defaults["chunk"]  # the network draws that many at a time anyway
    note = cache(tell)  # what is told of several batches is said once
    pictures: dict[int, Any] = {}
    done = 0
    with Bar(len(made)) as show:
        for places in jobs.alike(made, -(-batch // chunk) * chunk):
            part, film = [made[i] for i in places], Film()

            def on_step(step: int, of: int, done: int = done, count: int = len(part)) -> None:
                show(done + count * step / of)

            watching = (*edits, film.edit()) if save_steps else edits
            images = jobs.draw(family, part, edits=watching, on_step=on_step, note=note)
            done += len(part)
            for row, (place, recipe, pixels) in enumerate(zip(places, part, images, strict=True)):
                _, path = save(out, first + place, recipe.seed, partial(save_picture, pixels=pixels.numpy(), recipe=recipe))
                if save_steps:
                    save_picture(path.with_name(f"{path.stem}_steps.png"), film.strip(row, family.codec).numpy(), recipe)
                if as_json:
                    print(json.dumps({"file": str(path), **recipe.to_dict()}, ensure_ascii=False), flush=True)
                if keep:
                    pictures[place] = pixels
    return [pictures[place] for place in sorted(pictures)]


def _edits(
    family: Any, init: Path, mask: Path | None, strength: float | None, size: tuple[int, int], old: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """What the engine is told, and what the recipe remembers of it."""
    import torch

    from ldm.families.editing import strength_of
    from ldm.originals import read_original

    found = read_original(init, mask, size)
    if found.notice:
        tell(found.notice)
    edited = {"init": found.init_hash, "strength": strength_of(strength, mask is not None), "mask": found.mask_hash}
    for name, path in (("init", init), ("mask", mask)):
        if old.get(name) and old[name] != edited[name]:
            tell(f"{name}: {path or 'nothing'} is not the file that the recipe was made with: the picture will differ")
    new = None if found.mask is None else torch.tensor(found.mask)[None]
    return family.edits(torch.tensor(found.pixels)[None], new, strength), edited
