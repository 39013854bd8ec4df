"""What words name must be there: models, data, adapters are looked for before a verb loads torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ldm.config.errors import UserError
from ldm.config.options import Given
from ldm.data.storage import is_url
from ldm.formats.model_place import no_model
from ldm.sampling.adapters import weighted


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
    return str(folder) if name and "/" not in name and not Path(name).expanduser().exists() and (folder / "model").is_dir() else name


def no_data(option: str, name: str) -> str:
    """What is wrong with where data lie; empty: nothing."""
    path = os.path.expanduser(name)
    if is_url(path) or os.path.exists(path) or any(mark in path for mark in "{*?["):
        return ""
    return f"{name} does not exist; give a folder of images, of tar shards or of parquet files"


def _no_cache(option: str, name: str) -> str:
    return "" if (Path(name) / "cache.json").is_file() else f"{name}: no latent cache here (cache.json is missing)"


def _no_clip(option: str, name: str) -> str:
    judge, folder = option == "judge", Path(name).expanduser()
    names, others = (["own", "scenes"], list[str]()) if judge else (["own"], ["clip", "model/clip"])  # others: of a model and of a run
    if name in names or (folder / "config.json").is_file() or any((folder / own).is_dir() for own in others):
        return ""
    wanted = "a folder that transformers' CLIPModel opens is needed, or " + ("a model with a CLIP of its own run, or " if others else "")
    return f"{option}: {name}: no CLIP here; {wanted}{' or '.join(names)}"


def _no_lora(option: str, name: str) -> str:
    file = Path(weighted(name)[0]).expanduser()
    return "" if file.exists() else f"{file}: no such file; give a LoRA's .safetensors file or its folder"


def _no_embedding(option: str, name: str) -> str:
    wanted = "give an embedding's file (.safetensors, .pt, .bin), or a folder with learned_embeds.safetensors"
    return "" if Path(name).expanduser().exists() else f"{name}: no such file; {wanted}"


def _no_file(option: str, name: str) -> str:
    return "" if Path(name).expanduser().exists() else f"{option}: {name}: No such file or directory"


_LOOKS: dict[Given, Callable[[str, str], str]] = {
    Given.MODEL: lambda option, name: no_model(by_run(name)),
    Given.DATA: no_data,
    Given.CACHE: _no_cache,
    Given.CLIP: _no_clip,
    Given.LORA: _no_lora,
    Given.EMBEDDING: _no_embedding,
    Given.FILE: _no_file,
}
