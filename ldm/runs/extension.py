"""Extension of a stage: more images, another batch or learning rate, going on from the state that other settings have left."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.schema import config, plain
from ldm.formats import atomic, records
from ldm.runs.keys import IDENTITY, Changed, Finished, differences, key_of, plain_json
from ldm.training import checkpoint
from ldm.training.post_hoc_ema import linked

FILE = "extends.json"  # of a stage's folder: what it goes on from
WORD = "--extend"
SETTINGS = (
    *("images", "batch", "micro_batch", "exact", "shuffle_block", "flip", "filter", "tags"),
    *("optim", "precision", "compile", "offload", "ema"),
)
FREE = (
    "data",
    "inputs.latents",
    *(f"settings.{name}" for name in SETTINGS),
)  # what may be changed: the weights stay those of the same model


@dataclass(frozen=True)
class Decision:
    """What a start does with a stage that is not done."""

    goes_on: bool  # with what its folder holds
    why: str
    extends: Changed | None = None  # else: it goes on from this work of other settings
    odd: str = ""  # what is damaged and could be made good


@config
class History:
    """A stage's changes of settings, the latest last."""

    changes: list[Changed] = field(default_factory=list)


def history(folder: Path) -> list[Changed]:
    """The changes of settings that led to what is in a stage's folder.

    Raises:
        UserError: where their record is damaged.
    """
    try:
        return records.read_as(folder / FILE, History).changes
    except FileNotFoundError:
        return []
    except records.Damaged as error:
        raise UserError(f"{error}; put it back as it was, or move {folder} away to train this stage from the beginning") from None


def decide(folder: Path, have: Finished | None, wanted: Mapping[str, Any], extend: bool) -> Decision:
    """What a start does with a stage that is not done.

    Args:
        have: what is finished in its folder, under another key.
        wanted: the stage's identity now.
        extend: whether work of other settings is gone on from.

    Raises:
        UserError: where that is asked for and cannot be.
    """
    key = key_of(wanted)
    old, why = _identity(folder)
    key_there = checkpoint.newest_key(folder / "state") if why else old.get("key", "")
    same = have is None and key_there == key
    if same and not (extend and not history(folder)):
        return Decision(True, "was interrupted" if checkpoint.states(folder / "state") else "not done yet", odd=why)
    if extend and (found := _former(folder, wanted, key)) is not None:
        own = checkpoint.states(folder / "state") if same else []
        if not own or int(own[0].name.partition("-")[2]) < found.images:
            return Decision(False, f"goes on from {found.images:,} images, with {'; '.join(found.changed[:4])}", found)
    if same:
        return Decision(True, "was interrupted", odd=why)
    if not old and have is None:
        return Decision(False, why or "not done yet")
    changed = differences(have.identity if have else {name: value for name, value in old.items() if name != "key"}, plain_json(wanted))
    try:
        hint = "" if extend or _former(folder, wanted, key) is None else f" ({WORD} goes on from its state instead)"
    except UserError:
        hint = ""
    return Decision(False, f"changed: {'; '.join(changed[:4])}{hint}")


def _identity(folder: Path) -> tuple[dict[str, Any], str]:
    """What the work in a folder is for, or why that cannot be read."""
    try:
        return records.read_object(folder / IDENTITY), ""
    except FileNotFoundError:
        return {}, ""
    except records.Damaged as error:
        return {}, str(error)


def _former(folder: Path, wanted: Mapping[str, Any], key: str) -> Changed | None:
    """What a stage goes on from: its folder's own work of other settings, or else the newest that was put aside."""
    aside = sorted(folder.parent.glob(f"{folder.name}.replaced-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((found for place in (folder, *aside) if (found := _work(place, wanted, key, folder.name)) is not None), None)


def _work(place: Path, wanted: Mapping[str, Any], key: str, name: str) -> Changed | None:
    """The work in a folder that a stage can go on from; None: there is none of its kind.

    Raises:
        UserError: saying what stands in the way of work that differs in what may be changed.
    """
    was = _identity(place)[0]
    old, now = was.pop("key", None), plain_json(wanted)
    changed = differences(was, now)
    free = [line for line in changed if line.partition(":")[0].startswith(FREE)]
    if old == key or not isinstance(old, str) or not isinstance(was.get("settings"), dict):
        return None
    if now["settings"].get("kind") != "train" or not free:
        return None
    if fixed := [line for line in changed if line not in free]:
        raise UserError(f"stages.{name}: cannot go on from {place}, since {fixed[0]}; leave {WORD} out to train it from the beginning")
    if bool(was["settings"].get("ema")) != bool(now["settings"].get("ema")):
        said = f"{was['settings'].get('ema')} -> {now['settings'].get('ema')}"
        raise UserError(f"stages.{name}.ema: {said}: an EMA begins and ends with its stage; leave it as it was to go on from {place}")
    meta = checkpoint.left_in(place)[1]
    images, batch = now["settings"]["images"], now["settings"]["batch"]
    if checkpoint.step_after(meta.images, batch) >= -(-images // batch):
        raise UserError(f"stages.{name}.images: {images:,}, but {meta.images:,} are done; give more to go on from {place}")
    return Changed(folder=place.name, key=old, images=meta.images, identity=was, changed=changed)


def begin(folder: Path, found: Changed, wanted: Mapping[str, Any]) -> None:
    """Begin a stage's folder, all at once, with its identity, the record of what it goes on from, and that one's pictures."""
    place, temporary = folder.with_name(found.folder), folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if (place / "samples").is_dir():
        shutil.copytree(place / "samples", temporary / "samples")
    linked(place, temporary)
    atomic.write_json(temporary / FILE, {"changes": plain([*history(place), found])})
    atomic.write_json(temporary / IDENTITY, {**wanted, "key": key_of(wanted)})
    temporary.rename(folder)
