"""Output files: numbered pictures that are never replaced, one sheet of all; and the progress bar meanwhile."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.terminal import raw
from ldm.sampling.recipe import Recipe, read_recipe, save_picture

NUMBER = re.compile(r"^(\d{5,})_seed\d+\.png$")


def free(out: Path) -> int:
    """The number after the highest in a folder of pictures."""
    return max((int(match[1]) for path in out.iterdir() if (match := NUMBER.match(path.name))), default=-1) + 1


def save(out: Path, number: int, seed: int, write: Callable[[Path], None]) -> tuple[int, Path]:
    """Write a picture under `number` or, where another process has taken it, a later one; the next number and the path."""
    while True:
        path = out / f"{number:05d}_seed{seed}.png"
        try:
            write(path)
        except FileExistsError:
            number = max(number + 1, free(out))
            continue
        return number + 1, path


def save_all(out: Path, pictures: Sequence[Any], recipes: Sequence[Recipe]) -> None:
    """Write pictures (H,W,3) uint8 tensors into a folder, each with its recipe."""
    out.mkdir(parents=True, exist_ok=True)
    number = free(out)
    for pixels, recipe in zip(pictures, recipes, strict=True):
        number, _ = save(out, number, recipe.seed, partial(save_picture, pixels=pixels.numpy(), recipe=recipe))


def present(out: Path) -> dict[Recipe, Path]:
    """The pictures of a folder by their recipes; files that carry none of ours are left out."""
    found: dict[Recipe, Path] = {}
    for path in sorted(out.glob("*.png")) if out.is_dir() else []:
        try:
            recipe = read_recipe(path)
        except UserError:
            continue
        if isinstance(recipe, Recipe):
            found.setdefault(recipe, path)
    return found


def read_pixels(path: Path) -> Any:
    """A picture's bytes, a tensor (H,W,3) uint8."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def save_sheet(pictures: Sequence[Any], path: Path, columns: int) -> None:
    """One PNG of pictures (H,W,3) uint8 tensors, row after row; smaller ones stand on black."""
    import torch
    from PIL import Image

    from ldm.data.pictures import grid

    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    even = torch.zeros(len(pictures), height, width, 3, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        even[i, : picture.shape[0], : picture.shape[1]] = picture
    temporary = path.with_name(f".{path.name}.partial")
    Image.fromarray(grid(even, columns).numpy()).save(temporary, format="PNG")
    temporary.replace(path)


class Bar:
    """Progress in pictures on standard error."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=raw(sys.stderr))
        self.progress = Progress(
            TextColumn("sampling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
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
