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

from ldm.cli import call, size_of
from ldm.errors import UserError
from ldm.prompt_files import Asked, read_prompts

Option = typer.Option
MAX_SEED = 2**53  # as far as every reader of JSON counts exactly


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
    wanted = _asked(prompt or [], prompts, old.get("prompt"))
    avoided = writable(old.get("negative", "") if negative is None else negative).replace("\0", " ")
    start = int(old.get("seed", 0) if seed is None else seed)
    own_seeds = _seeds(seeds, seed, n)
    shape = _size(size, old)
    interval = _interval(guidance_interval, old)
    for name, value in (("guidance", guidance), ("rescale", rescale), ("eta", eta)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name}: got {value}; a finite number is needed")
    strength = _editing(init, strength, mask, old)
    hires = _hires(hires, hires_strength, init, old)
    folder = model or _newest()
    out.mkdir(parents=True, exist_ok=True)
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)

    from ldm import jobs
    from ldm.families.finished import load
    from ldm.families.running import Running, ready
    from ldm.picture_files import free, present

    # As many threads as torch finds by itself: a number found by timing would change the last bits from run to run.
    family = load(folder, device=_device(device), low_memory=low_memory)
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
    rest: dict[str, Any] = {"model": _name(folder), "model_hash": family.content_hash, **hires}
    rest["notation"] = not literal and bool(old.get("notation", True))
    if old.get("model_hash", family.content_hash) != family.content_hash:
        _note(f"{recipe} was made by the model {old['model']}, not by {folder}: the picture will differ")
    if init is not None:
        if sizes := [one for one in wanted if one.width or one.height]:
            raise UserError(f"init: the prompt {sizes[0].prompt[:40]!r} has a size of its own; leave out --w and --h, or use --size")
        edits, edited = _edits(family, init, mask, strength, shape or family.defaults["size"], old)
        rest |= edited
    made = jobs.recipes(family, wanted, own_seeds, seed=start, n=n, chosen=chosen, negative=avoided, size=shape, **rest)
    for text in dict.fromkeys(text for one in made for text in (one.prompt, one.negative)):
        _overlong(family, text, rest["notation"])
    if resume and (kept := present(out)):
        missing = [one for one in made if one not in kept]
        _note(f"{len(made) - len(missing)} of {len(made)} pictures are in {out} already")
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
    note = cache(_note)  # what is told of several batches is said once
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


def _overlong(family: Any, text: str, notation: bool) -> None:
    """Say how a prompt is read that is longer than the text encoder reads at once."""
    from ldm.families.script import MAX_CHUNKS
    from ldm.prompt_syntax import literal, read
    from ldm.text_weighted import chunks_of

    parts = (read if notation else literal)(text).at(0, 1)
    chunks = max(len(chunks_of(family.text, pieces)) for pieces in parts)
    if chunks > 1:
        how = f"in {chunks} chunks" if chunks <= MAX_CHUNKS else f"in {MAX_CHUNKS} chunks, and the rest is left out"
        _note(f"{text[:40]!r}... is longer than the model's {family.text.max_tokens} tokens; it is read {how}")


def _seeds(text: str, seed: int | None, n: int) -> list[int] | None:
    if not text:
        return None
    if seed is not None or n != 1:
        raise UserError("seeds: not together with --seed or --n")
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0 or max(found) > MAX_SEED:
        raise UserError(f"seeds: got {text!r}; whole numbers from 0 with commas are needed, such as 1,5,9")
    return found


def _interval(text: str, old: dict[str, Any]) -> dict[str, float]:
    if not text:
        return {"guidance_from": old.get("guidance_from", 0.0), "guidance_to": old.get("guidance_to", 1.0)}
    try:
        first, last = (float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"guidance_interval: got {text!r}; two shares of the steps are needed, such as 0.1,0.8") from None
    return {"guidance_from": first, "guidance_to": last}


def _hires(hires: float | None, strength: float | None, init: Path | None, old: dict[str, Any]) -> dict[str, float]:
    factor = old.get("hires", 1.0) if hires is None else hires
    if factor != 1 and init is not None:
        raise UserError("hires: not together with --init; draw the picture first, and go on from it with a larger --size")
    if factor == 1 and strength is not None:
        raise UserError(f"hires_strength: got {strength}, but there is no second pass; give --hires 2")
    return {"hires": float(factor), "hires_strength": float(old.get("hires_strength", 0.5) if strength is None else strength)}


def _asked(given: Sequence[str], file: Path | None, recipes: str | None) -> list[Asked]:
    """The prompts: words, a file's, a recipe's, or standard input's."""
    from ldm.recipe import writable

    def clean(text: str) -> str:
        return writable(text).replace("\0", " ")

    if given and file is not None:
        raise UserError("prompts: give them as words or by --prompts, not both")
    if given or (file is None and recipes is not None):
        return [Asked(prompt=clean(text)) for text in given or [recipes or ""]]
    if file is None and sys.stdin.isatty():
        raise UserError('no prompt: write ldm sample "a red circle", or --prompts FILE, or send lines to standard input')
    source = "standard input" if file is None or str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    return read_prompts(clean(text), source)


def _size(size: str, old: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) px; None where neither the option nor the recipe says."""
    if not size:
        return (old["height"], old["width"]) if "height" in old else None
    return size_of(size)


def _editing(init: Path | None, strength: float | None, mask: Path | None, old: dict[str, Any]) -> float | None:
    """The strength, once it is sure that the options for editing belong together."""
    if init is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise UserError(f"{name}: got {value}, but no picture to start from; give it by --init")
        if old.get("init"):
            raise UserError("from: this picture was drawn out of another one; give that one by --init, and its mask, if any, by --mask")
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"strength: got {strength}; a number from 0 (the picture as it is) to 1 (all new) is needed")
    return old.get("strength") if strength is None else strength


def _edits(
    family: Any, init: Path, mask: Path | None, strength: float | None, size: tuple[int, int], old: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """What the engine is told, and what the recipe remembers of it."""
    import torch

    from ldm.families.editing import strength_of
    from ldm.originals import read_original

    found = read_original(init, mask, size)
    if found.notice:
        _note(found.notice)
    edited = {"init": found.init_hash, "strength": strength_of(strength, mask is not None), "mask": found.mask_hash}
    for name, path in (("init", init), ("mask", mask)):
        if old.get(name) and old[name] != edited[name]:
            _note(f"{name}: {path or 'nothing'} is not the file that the recipe was made with: the picture will differ")
    new = None if found.mask is None else torch.tensor(found.mask)[None]
    return family.edits(torch.tensor(found.pixels)[None], new, strength), edited


def _newest() -> str:
    found = sorted(Path("runs").glob("*/model/model_index.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no model: give --model DIR, or train one (no runs/*/model here)")
    folder = str(found[-1].parent)
    print(f"model: {folder} (the newest here)", file=sys.stderr)
    return folder


def _name(folder: str) -> str:
    """What a picture says of its model: the run's name, not where it lies."""
    path = Path(folder.partition("::")[0]).expanduser()
    if path.is_file():
        return path.stem
    if not path.is_dir():
        return folder  # a name on the hub
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _device(wanted: str) -> str:
    import torch

    if not wanted:
        return best_device()
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"device: got {wanted!r}, which this machine or this torch lacks ({str(error).splitlines()[0][:100]})") from None
    return wanted


def best_device() -> str:
    """The accelerator of this machine, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
