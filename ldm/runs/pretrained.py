"""Pretrained models of a run, a base to begin with or used as they are: found, hashed by content, made ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ldm.config.errors import UserError
from ldm.families.family import Found, ModelConfig, Product
from ldm.formats import atomic
from ldm.formats.latent_codec import autoencoder_folder
from ldm.formats.model_folder import say
from ldm.formats.part import content_hash, read_json
from ldm.runs.run import wrong_steps
from ldm.training.settings import Train

if TYPE_CHECKING:
    from ldm.data.cached import CachedLatents
    from ldm.runs.run import Run

FOLDER = "pretrained"  # in a run folder
RECORD = "pretrained.json"


def sources(run: Run) -> dict[str, str]:
    """The models that some stage reads from elsewhere, by name, and the path or hub name of each."""
    every = run.everything()
    needed = [read.model for name in run.stages for read in run.reads(name).values() if read.model]
    return {name: every[name].elsewhere() or run.init for name in dict.fromkeys(needed)}


def find(run: Run, note: Callable[[str], None] = say) -> dict[str, Found]:
    """Every model from elsewhere, by name; files in CompVis' naming are opened on the way.

    Raises:
        UserError: naming what is missing or damaged.
    """
    every, asked = run.everything(), list(run.asked())
    found = {name: every[name].find(path, note) for name, path in sources(run).items()}
    return {name: every[name].found_for(one, {able: where for where, of, able in asked if of == name}) for name, one in found.items()}


def continued(run: Run, name: str, stage: Train, found: Mapping[str, Found]) -> ModelConfig:
    """The configuration of the model that a stage trains; where it continues a base model, that says what it does not.

    Raises:
        UserError: naming what does not suit the base.
    """
    config = run.trained(stage)
    if stage.model not in found or run.reads(name).get("init") is None:
        return config
    return config.continued(found[stage.model].folder)


def check(run: Run, found: Mapping[str, Found]) -> None:
    """Refuse what does not suit a base model, before any work.

    Raises:
        UserError: naming it.
    """
    for name, stage in run.stages.items():
        if isinstance(stage, Train):
            continued(run, name, stage, found)
    every = run.everything()
    read = {name: every[name].counted(str(one.folder), lambda text: None) for name, one in found.items()}
    known = {name: read.get(name, one) for name, one in every.items() if read.get(name) is not one}  # itself: of its files nothing is read
    if wrong := list(wrong_steps(run, known)):
        raise UserError("; ".join(wrong))


def oversized(run: Run, found: Mapping[str, Found]) -> Iterator[str]:
    """What models set larger than their base can use, a line each; the state of random numbers stays."""
    every = run.everything()
    with torch.random.fork_rng(devices=[]):
        for name, stage in run.stages.items():
            if isinstance(stage, Train):
                config = continued(run, name, stage, found)
                others = {role: every[other] for role, other in config.inputs().items() if other in every}
                yield from (f"models.{stage.model}.{line}" for line in config.oversized(others))


def make(run: Run, found: Mapping[str, Found], out: Path, write: bool) -> dict[str, Product]:
    """The models as stages read them; what is used in another form than it lies in is written to OUT/pretrained/NAME.

    Args:
        write: whether this process writes; the others call afterwards and read.
    """
    every = run.everything()
    return {name: _made(every[name], part, out / FOLDER / name, write) for name, part in found.items()}


def _made(model: ModelConfig, found: Found, target: Path, write: bool) -> Product:
    if not model.adopts:
        return Product(found.folder, found.hash)

    def save(inner: Path) -> None:
        model.adopt(found, inner)
        atomic.write_json(inner / RECORD, {"path": found.path, "hash": found.hash})

    if write and not _there(target, found.hash):
        atomic.commit(target, save)
    return Product(target, found.hash)


def _there(folder: Path, wanted: str) -> bool:
    """Whether a folder holds what an earlier start made of the same model, and is whole."""
    try:
        atomic.verify(folder)
        return bool(read_json(folder / RECORD).get("hash") == wanted)
    except (atomic.Damaged, UserError):
        return False


def check_cache(cache: CachedLatents, run: Run, stage: Train, products: Mapping[str, Product]) -> None:
    """Refuse a latent cache from elsewhere that was made for something else.

    Raises:
        UserError: naming what differs.
    """
    from ldm.text.encoder import TextEncoder

    cache.require(autoencoder=content_hash(autoencoder_folder(products["autoencoder"].folder)), resolution=stage.resolution)
    if bool(cache.plan.codes) != run.models[stage.model].reads_codes:
        held, wanted = ("codes", "latents: encode without --codes") if cache.plan.codes else ("latents", "codes: encode with --codes")
        raise UserError(f"{cache.folder}: holds {held}, and {stage.model} reads {wanted}")
    cache.require_shapes(stage.buckets.shapes(stage.resolution) if stage.buckets else [])
    if cache.plan.text:
        cache.require_text(TextEncoder.load(products["text"].folder).encode)
