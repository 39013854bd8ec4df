"""The verb that draws: a model and prompts become picture files, each with its recipe."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli import call, size_of
from ldm.errors import UserError

NUMBER = re.compile(r"^(\d{5,})_seed\d+\.png$")
Option = typer.Option


def main(words: Sequence[str]) -> int:
    """`ldm sample PROMPT ...`: the exit code."""
    return call(sample, words, "ldm sample")


def sample(
    prompt: Annotated[list[str] | None, typer.Argument(help="What to draw; several prompts are drawn in turn.")] = None,
    prompts: Annotated[Path | None, Option(help="A text file with one prompt per line; - reads standard input.")] = None,
    model: Annotated[str, Option(help="A model or run folder, or owner/name on the hub; default: the newest of runs/*.")] = "",
    n: Annotated[int, Option(min=1, help="Pictures per prompt; picture k has the seed SEED + k.")] = 1,
    seed: Annotated[int, Option(min=0, help="Seed of each prompt's first picture.")] = 0,
    steps: Annotated[int | None, Option(min=1, help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, Option(min=0, help="Classifier-free guidance scale; 1: none; default: the model's.")] = None,
    rescale: Annotated[float | None, Option(min=0, max=1, help="Guidance rescale (Lin 2023); default: the model's.")] = None,
    sampler: Annotated[str, Option(help="ddpm ddim plms euler euler_a heun dpmpp_2m dpmpp_2m_sde unipc; default: the model's.")] = "",
    spacing: Annotated[str, Option(help="Of the steps: trailing leading linspace karras; default: the sampler's.")] = "",
    eta: Annotated[float, Option(min=0, max=1, help="Noise of ddim's steps; 0: none.")] = 0.0,
    negative: Annotated[str, Option(help="What to stay away from.")] = "",
    size: Annotated[str, Option(help="WIDTHxHEIGHT in px; default: the model's.")] = "",
    batch: Annotated[int, Option(min=1, help="Pictures between two writes to disk; never changes a picture.")] = 8,
    out: Annotated[Path, Option(help="Folder of the pictures.")] = Path("outputs"),
    grid: Annotated[Path | None, Option(help="Also one picture of all, a row for each prompt.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per picture.")] = False,
    device: Annotated[str, Option(help="cuda, mps or cpu; default: the best there is.")] = "",
) -> int:
    """Draw pictures of prompts. The same seed gives the same picture, whatever the batch and its neighbours."""
    wanted = _prompts(prompt or [], prompts)
    folder = model or _newest()
    from ldm.families.latent_diffusion import Settings, load
    from ldm.process import calibrate
    from ldm.recipe import Recipe, save_picture

    calibrate()
    family = load(folder, device=device or best_device())
    settings: Settings = family.settings(
        steps=steps, guidance=guidance, rescale=rescale, sampler=sampler or None, spacing=spacing or None, eta=eta
    )
    shape = size_of(size) if size else family.defaults["size"]
    for text, read in family.text.overlong([*wanted, negative]).items():
        most = family.text.max_tokens
        print(f"note: {text[:40]!r}... is longer than the model's {most} tokens; it reads up to ...{read[-40:]!r}", file=sys.stderr)
    jobs = [(text, seed + k) for text in wanted for k in range(n)]
    out.mkdir(parents=True, exist_ok=True)
    number = _next_number(out)
    pictures, started = [], time.monotonic()
    with _bar(len(jobs)) as show:
        for first in range(0, len(jobs), batch):
            part = jobs[first : first + batch]

            def on_step(done: int, of: int, first: int = first, many: int = len(part)) -> None:
                show(first + many * done / of)

            images = family.sample(
                [text for text, _ in part], [s for _, s in part], steps=steps, guidance=guidance, rescale=rescale,
                sampler=sampler or None, spacing=spacing or None, eta=eta, negative=negative, size=shape, on_step=on_step,
            )  # fmt: skip
            for (text, own), pixels in zip(part, images, strict=True):
                recipe = Recipe(
                    prompt=text, negative=negative, seed=own, steps=settings.steps, guidance=settings.guidance,
                    rescale=settings.rescale, sampler=settings.sampler, spacing=settings.spacing, eta=eta,
                    width=shape[1], height=shape[0], model=str(folder), model_hash=family.content_hash,
                )  # fmt: skip
                path = out / f"{number:05d}_seed{own}.png"
                save_picture(path, pixels.numpy(), recipe)
                number += 1
                if as_json:
                    print(json.dumps({"file": str(path), **recipe.to_dict()}, ensure_ascii=False), flush=True)
            pictures += list(images)
    if grid is not None:
        _save_grid(pictures, grid, n if len(wanted) > 1 or n > 1 else 1)
    spent = time.monotonic() - started
    where = f"{out}/{f', all on {grid}' if grid else ''}"
    print(f"{len(jobs)} pictures of {folder} in {spent:.1f} s: {where}", file=sys.stderr)
    return 0


def _prompts(given: Sequence[str], file: Path | None) -> list[str]:
    if given and file is not None:
        raise UserError("prompts: give them as words or by --prompts, not both")
    if given:
        return list(given)
    if file is None and sys.stdin.isatty():
        raise UserError('no prompt: write ldm sample "a red circle", or --prompts FILE, or send lines to standard input')
    if file is None or str(file) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8 text") from None
    found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise UserError(f"{file or 'standard input'}: no prompts in it")
    return found


def _newest() -> str:
    found = sorted(Path("runs").glob("*/model/model_index.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no model: give --model DIR, or train one (no runs/*/model here)")
    folder = str(found[-1].parent)
    print(f"model: {folder} (the newest here)", file=sys.stderr)
    return folder


def best_device() -> str:
    """The accelerator of this machine, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _next_number(out: Path) -> int:
    taken = [int(match[1]) for path in out.iterdir() if (match := NUMBER.match(path.name))]
    return max(taken, default=-1) + 1


def _save_grid(pictures: Sequence[Any], path: Path, columns: int) -> None:
    import torch
    from PIL import Image

    from ldm.pictures import grid

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns if columns > 1 else min(len(pictures), 8)
    Image.fromarray(grid(torch.stack(list(pictures)), columns).numpy()).save(path)


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
