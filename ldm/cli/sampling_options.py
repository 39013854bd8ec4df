"""What the words of the verbs that draw mean, checked before torch is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli.command import size_of
from ldm.config.errors import UserError
from ldm.families.draws import Draws
from ldm.sampling.prompt_files import Asked, read_prompts

MAX_SEED = 2**53  # as far as every reader of JSON counts exactly
MAX_MARGIN = 4096  # px
EDGES = ("left", "top", "right", "bottom")


def asked_for(given: Sequence[str], file: Path | None, recipes: str | None) -> list[Asked]:
    """The prompts: words, a file's, a recipe's, or standard input's."""
    from ldm.sampling.recipe import writable

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


def size_given(size: str, old: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) px; None where neither the option nor the recipe says."""
    if not size:
        return (old["height"], old["width"]) if "height" in old else None
    return size_of(size)


def seeds_of(text: str, seed: int | None, n: int) -> list[int] | None:
    """The seeds of every prompt, where they are listed."""
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


def interval_of(text: str, old: dict[str, Any]) -> dict[str, float]:
    """Between which shares of the steps there is guidance."""
    if not text:
        return {"guidance_from": old.get("guidance_from", 0.0), "guidance_to": old.get("guidance_to", 1.0)}
    try:
        first, last = (float(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"guidance_interval: got {text!r}; two shares of the steps are needed, such as 0.1,0.8") from None
    return {"guidance_from": first, "guidance_to": last}


def hires_of(hires: float | None, strength: float | None, init: Path | None, old: dict[str, Any]) -> dict[str, float]:
    """What recipes say of a first, smaller pass."""
    factor = old.get("hires", 1.0) if hires is None else hires
    if factor != 1 and init is not None:
        raise UserError("hires: not together with --init; draw the picture first, and go on from it with a larger --size")
    if factor == 1 and strength is not None:
        raise UserError(f"hires_strength: got {strength}, but there is no second pass; give --hires 2")
    return {"hires": float(factor), "hires_strength": float(old.get("hires_strength", 0.5) if strength is None else strength)}


def known(option: str, value: str, names: Sequence[str]) -> None:
    """Refuse what is none of `names`; empty stands for a default."""
    if value and value not in names:
        raise UserError(f"{option}: got {value!r}; choose one of {', '.join(names)}")


def margins_of(text: str, old: dict[str, Any]) -> tuple[int, int, int, int] | None:
    """px to add at left, top, right and bottom; None: nothing."""
    if not text:
        numbers = str(old.get("outpaint", ""))
        return tuple(int(n) for n in numbers.split(",")) if numbers else None  # type: ignore[return-value]
    found = dict.fromkeys(EDGES, 0)
    try:
        for word in text.split(","):
            edge, equals, number = word.strip().partition("=")
            found |= {edge: int(number)} if equals else dict.fromkeys(EDGES, int(word))
    except ValueError:
        found = {}
    if set(found) != set(EDGES) or min(found.values()) < 0 or not 0 < max(found.values()) <= MAX_MARGIN:
        raise UserError(f"outpaint: got {text!r}; px for some of {', '.join(EDGES)} are needed, such as left=64,right=64")
    return found["left"], found["top"], found["right"], found["bottom"]


def edits_asked(
    init: Path | None,
    strength: float | None,
    mask: Path | None,
    invert: Path | None,
    source: str | None,
    margins: tuple[int, ...] | None,
    size: str,
    old: dict[str, Any],
) -> dict[str, Any]:
    """What a recipe says of the picture it starts from besides its hash; empty where there is none.

    Raises:
        UserError: for options that do not belong together.
    """
    if init is None and invert is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise UserError(f"{name}: got {value}, but no picture to start from; give it by --init")
        if old.get("init"):
            fix = "--invert" if old.get("invert") else "--init, and its mask, if any, by --mask"
            raise UserError(f"from: this picture was drawn out of another one; give that one by {fix}")
        if margins:
            raise UserError("outpaint: no picture to go on from; give it by --init")
    if source is not None and invert is None:
        raise UserError("source: says what the picture of --invert shows; give that, too")
    if invert is not None and (init or mask or margins):
        raise UserError("invert: not together with --init, --mask or --outpaint")
    if margins and (mask or size):
        raise UserError("outpaint: not together with --mask or --size; the margins are what is new")
    if strength is not None and not 0 <= strength <= 1:
        raise UserError(f"strength: got {strength}; a number from 0 (the picture as it is) to 1 (all new) is needed")
    for name, path in (("init", init), ("mask", mask), ("invert", invert)):
        if path is not None and not path.exists():
            raise UserError(f"{name}: {path}: No such file or directory")
    if init is None and invert is None:
        return {}
    usual = 1.0 if mask or margins or invert else 0.75
    return {
        "strength": float(old.get("strength", usual) if strength is None else strength),
        "invert": invert is not None,
        "source": str(old.get("source", "") if source is None else source),
        "outpaint": ",".join(map(str, margins or ())),
    }


def guided_by(classifier: Path | None, scale: float | None, old: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of a classifier's guidance besides its hash; empty where there is none.

    Raises:
        UserError: for a scale without a file, a file that is missing, or a recipe that needs one.
    """
    if classifier is None:
        if scale is not None:
            raise UserError(f"classifier_scale: got {scale:g}, but no classifier; give --classifier FILE")
        if old.get("classifier"):
            raise UserError("from: this picture was drawn with a classifier; give its file by --classifier")
        return {}
    if not classifier.exists():
        raise UserError(f"classifier: {classifier}: No such file or directory")
    return {"classifier_scale": float(old.get("classifier_scale") or 1.0) if scale is None else float(scale)}


def model_for(name: str) -> str:
    """The model that is meant: a folder, a file or a name on the hub; by default the newest here."""
    words = name.split("/")
    place = Path(name.partition("::")[0]).expanduser()
    hub = len(words) == 2 and all(words) and not name.startswith((".", "~")) and not Path(words[0]).is_dir()
    if name and not place.exists() and not hub:
        raise UserError(f"{name}: no such folder or file; give a model or run folder, a weights file, or a hub name such as owner/name")
    return name or newest()


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
    path = Path(folder.partition("::")[0]).expanduser()
    if path.is_file():
        return path.stem
    if not path.is_dir():
        return folder  # a name on the hub
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def device_for(wanted: str, local: int = 0) -> str:
    """The device, of several GPUs this process' own; the best there is where none is wanted."""
    import torch

    if not wanted:
        return f"cuda:{local}" if local and best_device() == "cuda" else best_device()
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


def tell_overlong(family: Draws, text: str, notation: bool) -> None:
    """Say how a prompt is read that is longer than the model reads at once."""
    from ldm.text.prompt_syntax import literal, read

    if how := family.overlong((read if notation else literal)(text)):
        tell(f"{text[:40]!r}... {how}")


def tell(text: str) -> None:
    """A notice, of the first of several processes only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
