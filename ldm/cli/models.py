"""The model and the device that a verb's options mean, and notices to whoever called it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from textwrap import shorten

from ldm.cli.given import by_run
from ldm.config.errors import UserError, first_line
from ldm.config.files import at_home
from ldm.formats.model_place import factor_of, no_model
from ldm.sampling.jobs import check_size


def model_for(name: str) -> str:
    """The model that is meant: a folder, a file, a run's name or a name on the hub; by default the newest here."""
    if name and (said := no_model(by_run(name))):
        raise UserError(said)
    return by_run(name) or newest()


def check_sides(shape: tuple[int, int] | None, folder: str, hires: float = 1.0) -> None:
    """Refuse sides (height, width) px that a model's folder says it cannot draw; what else there is, drawing tells.

    Raises:
        UserError: naming the size and the fix.
    """
    if shape is not None:
        check_size(*shape, factor_of(folder), hires)


def newest() -> str:
    """The folder of the newest model of the runs below this folder."""
    found = sorted(Path("runs").glob("*/model/model_index.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise UserError("no model: give --model DIR, or train one (no runs/*/model here)")
    folder = str(found[-1].parent)
    if os.environ.get("RANK", "0") == "0":
        print(f"model: {folder} (the newest here)", file=sys.stderr)
    return folder


def name_of(folder: str) -> str:
    """What a picture says of its model: the run's name, not where it lies."""
    path = at_home(folder.partition("::")[0])
    if path.is_file():
        return path.stem
    if not path.is_dir():
        return folder  # a name on the hub
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def device_for(wanted: str, local: int = 0) -> str:
    """The device, of several GPUs this process' own; the best there is where none is wanted."""
    import torch

    from ldm.models.gpu_form import round_products

    round_products(to_tf32=False)  # float32 pictures are float32's
    if not wanted:
        count = torch.cuda.device_count() if best_device() == "cuda" else 1  # a task may see its own GPU alone, as number 0
        return f"cuda:{local % count}" if count > 1 and local else best_device()
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = shorten(first_line(error), 120, placeholder=" ...")
        raise UserError(f"device: got {wanted!r}, which this machine or this torch lacks ({reason})") from None
    return wanted


def best_device() -> str:
    """The accelerator of this machine, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def tell(text: str) -> None:
    """A notice, of the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
