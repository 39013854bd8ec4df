"""What words name must be there: models, data, adapters, pictures are looked for before a verb loads torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.options import Given
from ldm.config.stand_ins import told
from ldm.data.file_names import FORMATS, bare
from ldm.data.storage import is_url
from ldm.formats.model_place import no_model
from ldm.sampling.adapters import weighted

DEVICES = ("cuda", "mps", "cpu", "xpu", "mtia")  # kinds that torch may have been built for


def look(given: Given, option: str, name: str) -> None:
    """Look for what a word names, as far as its place and its files' names tell; whoever opens it sees the rest.

    Args:
        option: that named it, as messages say it: `clip`.

    Raises:
        UserError: where it is not there.
    """
    if said := _LOOKS[given](option, name):
        raise UserError(said)


def by_run(name: str) -> str:
    """A model's name; for a run's, as pictures and the page tell it, its folder."""
    folder = Path("runs") / name
    return str(folder) if name and "/" not in name and not at_home(name).exists() and (folder / "model").is_dir() else name


def no_data(option: str, name: str) -> str:
    """What is wrong with where data lie; empty: nothing."""
    path = os.path.expanduser(name)
    if is_url(path) or os.path.exists(path) or any(mark in path for mark in "{*?["):
        return ""
    return f"{name} does not exist; give a folder of images, of tar shards or of parquet files"


def _no_cache(option: str, name: str) -> str:
    return "" if (Path(name) / "cache.json").is_file() else f"{name}: no latent cache here (cache.json is missing)"


def _no_clip(option: str, name: str) -> str:
    judge, folder = option == "judge", at_home(name)
    names, others = (["own", "scenes"], list[str]()) if judge else (["own"], ["clip", "model/clip"])  # others: of a model and of a run
    if name in names or (folder / "config.json").is_file() or any((folder / own).is_dir() for own in others):
        return ""
    wanted = "a folder that transformers' CLIPModel opens is needed, or " + ("a model with a CLIP of its own run, or " if others else "")
    return f"{option}: {name}: no CLIP here; {wanted}{' or '.join(names)}"


def _no_lora(option: str, name: str) -> str:
    file = at_home(weighted(name)[0])
    return "" if file.exists() else f"{file}: no such file; give a LoRA's .safetensors file or its folder"


def _no_embedding(option: str, name: str) -> str:
    wanted = "give an embedding's file (.safetensors, .pt, .bin), or a folder with learned_embeds.safetensors"
    return "" if at_home(name).exists() else f"{name}: no such file; {wanted}"


def _no_file(option: str, name: str) -> str:
    return "" if at_home(name).exists() else f"{option}: {name}: No such file or directory"


def _no_picture(option: str, name: str) -> str:
    path = at_home(name)
    if not path.is_file():
        return f"{option}: {name}: {'a folder; give one picture' if path.is_dir() else 'No such file or directory'}"
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS):
            return ""
    except UnidentifiedImageError:
        return f"{option}: {name}: not an image: none of {', '.join(FORMATS)}"
    except Exception:  # Pillow raises many kinds; who reads the picture says what is damaged
        return ""


def _no_pictures(option: str, name: str) -> str:
    path = at_home(name)
    return told(partial(_found, path)) if not path.is_dir() or bare(path) else ""


def _found(path: Path) -> str:
    from ldm.sampling.captioning import find

    find([path], lambda text: None)
    return ""


def check_captioned(name: str) -> None:
    """Refuse a folder without pictures, or with nothing that could be their captions, and a file that is no data.

    Raises:
        UserError: as the data set that would be made of it.
    """
    path = at_home(name)
    if path.is_file() or (path.is_dir() and bare(path)):
        told(partial(_made, name))


def _made(name: str) -> str:
    from ldm.data.check import source_at
    from ldm.data.sources import lost

    return lost(source_at(name))


def _no_device(option: str, name: str) -> str:
    kind, colon, number = name.partition(":")
    known = kind in DEVICES and (not colon or number.isdecimal())
    return "" if known else f"{option}: got {name!r}; give cuda, or one of several such as cuda:1, or mps or cpu"


_LOOKS: dict[Given, Callable[[str, str], str]] = {
    Given.MODEL: lambda option, name: no_model(by_run(name)),
    Given.DATA: no_data,
    Given.CACHE: _no_cache,
    Given.CLIP: _no_clip,
    Given.LORA: _no_lora,
    Given.EMBEDDING: _no_embedding,
    Given.FILE: _no_file,
    Given.PICTURE: _no_picture,
    Given.PICTURES: _no_pictures,
    Given.DEVICE: _no_device,
}
