"""The verb that draws: a model and prompts become picture files, each with its recipe."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli import call, size_of
from ldm.errors import UserError

NUMBER = re.compile(r"^(\d{5,})_seed\d+\.png$")
Option = typer.Option
MAX_SEED = 2**53  # as far as every reader of JSON counts exactly
MAX_SIDE = 8192  # px


def main(words: Sequence[str]) -> int:
    """`ldm sample PROMPT ...`: the exit code."""
    return call(sample, words, "ldm sample")


def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw; several prompts are drawn in turn.")] = None,
    prompts: Annotated[Path | None, Option(help="A text file with one prompt per line; - reads standard input.")] = None,
    recipe: Annotated[Path | None, Option("--from", help="A picture whose recipe is followed where no option says otherwise.")] = None,
    model: Annotated[str, Option(help="A model or run folder, or owner/name on the hub; default: the newest of runs/*.")] = "",
    n: Annotated[int, Option(min=1, help="Pictures per prompt; picture k has the seed SEED + k.")] = 1,
    seed: Annotated[int | None, Option(min=0, max=MAX_SEED, help="Seed of each prompt's first picture; default: 0.")] = None,
    steps: Annotated[int | None, Option(min=1, max=1000, help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, Option(min=0, max=1000, help="Classifier-free guidance; 1: none; default: the model's.")] = None,
    rescale: Annotated[float | None, Option(min=0, max=1, help="Guidance rescale (Lin 2023); default: the model's.")] = None,
    sampler: Annotated[str, Option(help="ddpm ddim plms euler euler_a heun dpmpp_2m dpmpp_2m_sde unipc; default: the model's.")] = "",
    spacing: Annotated[str, Option(help="Of the steps: trailing leading linspace karras; default: the sampler's.")] = "",
    eta: Annotated[float | None, Option(min=0, max=1, help="Noise of ddim's steps; default: 0, none.")] = None,
    precision: Annotated[str, Option(help="Of matrix products and convolutions: fp32 bf16 fp16; default: the model's.")] = "",
    negative: Annotated[str | None, Option(help="What to stay away from; default: nothing.")] = None,
    size: Annotated[str, Option(help="WIDTHxHEIGHT in px; default: the model's.")] = "",
    init: Annotated[Path | None, Option(help="A picture to start from, in place of noise.")] = None,
    strength: Annotated[float | None, Option(help="How much of INIT is drawn anew, 0 to 1; default: 0.75, with MASK 1.")] = None,
    mask: Annotated[Path | None, Option(help="A picture as large as INIT, white where it is to be new; the rest keeps its bytes.")] = None,
    batch: Annotated[int, Option(min=1, help="Pictures between two writes to disk; never changes a picture.")] = 8,
    out: Annotated[Path, Option(help="Folder of the pictures.")] = Path("outputs"),
    grid: Annotated[Path | None, Option(help="Also one PNG of all, a row for each prompt.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per picture.")] = False,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is.")] = "",
) -> int:
    """Draw pictures of prompts. The same seed gives the same picture, whatever the batch and its neighbours."""
    from ldm.recipe import Recipe, read_recipe, save_picture, writable

    found = read_recipe(recipe) if recipe else {}
    old: dict[str, Any] = asdict(found) if isinstance(found, Recipe) else found
    wanted = [writable(text).replace("\0", " ") for text in _prompts(prompt or [], prompts, old.get("prompt"))]
    avoided = writable(old.get("negative", "") if negative is None else negative).replace("\0", " ")
    start = int(old.get("seed", 0) if seed is None else seed)
    shape = _size(size, old)
    for name, value in (("guidance", guidance), ("rescale", rescale), ("eta", eta)):
        if value is not None and not math.isfinite(value):
            raise UserError(f"{name}: got {value}; a finite number is needed")
    strength = _editing(init, strength, mask, old)
    folder = model or _newest()
    out.mkdir(parents=True, exist_ok=True)
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)

    from ldm.families.finished import load

    # As many threads as torch finds by itself: a number found by timing would change the last bits from run to run.
    family = load(folder, device=_device(device))
    chosen: dict[str, Any] = {
        "steps": old.get("steps") if steps is None else steps,
        "guidance": old.get("guidance") if guidance is None else guidance,
        "rescale": old.get("rescale") if rescale is None else rescale,
        "sampler": sampler or old.get("sampler"),
        # A spacing belongs to its sampler, unless it is asked for.
        "spacing": spacing or (None if sampler else old.get("spacing")),
        "eta": old.get("eta", 0.0) if eta is None else eta,
        "precision": precision or old.get("precision"),
    }
    settings = family.settings(**chosen)
    height, width = shape or family.defaults["size"]
    if old.get("model_hash", family.content_hash) != family.content_hash:
        _note(f"{recipe} was made by the model {old['model']}, not by {folder}: the picture will differ")
    for text, read in family.text.overlong([*wanted, avoided]).items():
        most = family.text.max_tokens
        _note(f"{text[:40]!r}... is longer than the model's {most} tokens; it reads up to ...{read[-40:]!r}")

    edits: Any = ()
    edited: dict[str, Any] = {}
    if init is not None:
        edits, edited = _edits(family, init, mask, strength, (height, width), old)

    jobs = [(text, start + k) for text in wanted for k in range(n)]
    name = _name(folder)
    many = -(-batch // family.defaults["chunk"]) * family.defaults["chunk"]  # the network draws that many at a time anyway
    note = cache(_note)  # what is told of several batches is said once
    pictures, number, started = [], _free(out), time.monotonic()
    with _bar(len(jobs)) as show:
        for first in range(0, len(jobs), many):
            part = jobs[first : first + many]

            def on_step(done: int, of: int, first: int = first, count: int = len(part)) -> None:
                show(first + count * done / of)

            images = family.sample(
                [text for text, _ in part], [own for _, own in part], **chosen, negative=avoided, size=(height, width), on_step=on_step,
                edits=edits, note=note,
            )  # fmt: skip
            for (text, own), pixels in zip(part, images, strict=True):
                made = Recipe(
                    prompt=text, negative=avoided, seed=own, **asdict(settings), width=width, height=height, model=name,
                    model_hash=family.content_hash, **edited,
                )  # fmt: skip
                number, path = _save(out, number, own, lambda path, p=pixels, r=made: save_picture(path, p.numpy(), r))  # type: ignore[misc]
                if as_json:
                    print(json.dumps({"file": str(path), **made.to_dict()}, ensure_ascii=False), flush=True)
                if grid is not None:
                    pictures.append(pixels)
    if grid is not None:
        _save_grid(pictures, grid, n if n > 1 or len(wanted) > 8 else min(len(wanted), 8))
    spent = time.monotonic() - started
    where = f"{out}/{f', all on {grid}' if grid else ''}"
    print(f"{len(jobs)} picture{'s' * (len(jobs) > 1)} of {folder} in {spent:.1f} s: {where}", file=sys.stderr)
    return 0


def _prompts(given: Sequence[str], file: Path | None, recipes: str | None) -> list[str]:
    if given and file is not None:
        raise UserError("prompts: give them as words or by --prompts, not both")
    if given:
        return list(given)
    if file is None and recipes is not None:
        return [recipes]
    if file is None and sys.stdin.isatty():
        raise UserError('no prompt: write ldm sample "a red circle", or --prompts FILE, or send lines to standard input')
    source = "standard input" if file is None or str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if file is None or str(file) == "-" else file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{source}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f'{source}: no prompts in it; write one per line, or give them as words: ldm sample "a red circle"')
    return found


def _size(size: str, old: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) px; None where neither the option nor the recipe says."""
    if not size:
        return (old["height"], old["width"]) if "height" in old else None
    shape = size_of(size)
    if max(shape) > MAX_SIDE:
        raise UserError(f"size: got {size}; at most {MAX_SIDE} px a side")
    return shape


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
    path = Path(folder).expanduser()
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


def _free(out: Path) -> int:
    """The number after the highest in a folder of pictures."""
    return max((int(match[1]) for path in out.iterdir() if (match := NUMBER.match(path.name))), default=-1) + 1


def _save(out: Path, number: int, seed: int, write: Callable[[Path], None]) -> tuple[int, Path]:
    """Write a picture under `number` or, where another process has taken it, a later one; the next number and the path."""
    while True:
        path = out / f"{number:05d}_seed{seed}.png"
        try:
            write(path)
        except FileExistsError:
            number = max(number + 1, _free(out))
            continue
        return number + 1, path


def _save_grid(pictures: Sequence[Any], path: Path, columns: int) -> None:
    import torch
    from PIL import Image

    from ldm.pictures import grid

    temporary = path.with_name(f".{path.name}.partial")
    Image.fromarray(grid(torch.stack(list(pictures)), columns).numpy()).save(temporary, format="PNG")
    temporary.replace(path)


class _bar:
    """Progress in pictures on standard error."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=total, rate="")
        self.began = time.monotonic()

    def __enter__(self) -> Any:
        self.progress.start()
        return self.show

    def show(self, done: float) -> None:
        """So many pictures are done, in parts of one."""
        rate = done / max(time.monotonic() - self.began, 1e-9)
        self.progress.update(self.task, completed=round(done, 1), rate=f"{rate:.2f}/s")

    def __exit__(self, *problem: object) -> None:
        self.progress.stop()
