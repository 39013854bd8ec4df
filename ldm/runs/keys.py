"""Stage keys: content hashes that decide what is finished, and so what a start will do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, config
from ldm.data.cached import cache_hash
from ldm.data.dataset import asked
from ldm.data.filter import filter_samples
from ldm.families.family import Found
from ldm.formats import records
from ldm.formats.integrity import folder_hash
from ldm.runs.run import Encode, Evaluate, Export, Run
from ldm.training.settings import Train

if TYPE_CHECKING:
    from ldm.data.sources import DataSet

DONE = "done.json"
IDENTITY = "identity.json"  # of a stage's folder: what the work in it is for


@config
class Changed:
    """Settings of a stage that were changed while it had trained: what it was before, and where that lies."""

    folder: str  # beside the stage's own: the former work, put aside
    key: str  # of the stage as it was
    images: Count  # that it had seen
    identity: dict[str, Any]  # as it was
    changed: list[str]  # in words: path: old -> new


@config
class Finished:
    """What done.json says of a stage."""

    stage: str
    kind: str
    key: str
    identity: dict[str, Any]
    inputs: dict[str, str]  # by role, the hash of what was read
    product: str = ""  # hash of the product's folder; empty: none
    result: dict[str, Any]
    seconds: NonNegative
    images: Count
    carried: str = ""  # hash of the state that was kept for a later stage; empty: none was
    version: str = ""  # of ldm
    history: list[Changed] = field(default_factory=list)  # the former settings, where it went on from another's state


def hashes_of(run: Run, name: str, done: Mapping[str, Finished], found: Mapping[str, Found]) -> dict[str, str]:
    """By role, the hash of everything that a stage reads.

    Args:
        found: by model, what comes from elsewhere.

    Raises:
        UserError: where a stage is to carry on what an earlier one has not kept.
    """
    hashes = {
        role: (done[read.stage].product or done[read.stage].key) if read.stage else found[read.model].hash
        for role, read in run.reads(name).items()
    }
    if other := run.carried_from(name):
        if not done[other].carried:
            raise UserError(
                f"stages.{name}.carry: {other} was finished when nothing asked for more than its EMA, so no more was kept;"
                f" leave carry out, or move its folder stages/{other} away to train it again"
            )
        hashes["carried"] = done[other].carried
    return hashes


def identity(run: Run, name: str, data: DataSet, val: DataSet, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the result of a stage depends on, as plain values: its hash is the stage's key."""
    stage = run.stages[name]
    found: dict[str, Any] = {"stage": name, "seed": run.seed, "settings": stage.identity(), "inputs": dict(hashes)}
    if isinstance(stage, Train):
        found["model"] = run.trained(stage).identity()
        if stage.cache:
            found["latents"] = cache_hash(stage.cache)
    if isinstance(stage, Train | Encode):
        views = run.models[stage.model].views() if isinstance(stage, Train) else run.views_kept(name)
        found["data"] = asked(filter_samples(data, stage.filter, f"stages.{name}.filter"), views).fingerprint()
    if isinstance(stage, Evaluate):
        found["val"] = val.fingerprint()
    if isinstance(stage, Evaluate | Export):
        train = run.stages[run.measured(name)]
        assert isinstance(train, Train)
        found |= run.models[train.model].shown()
    return found


def check_data(run: Run, data: DataSet, val: DataSet) -> None:
    """Every stage's filter tried on the data, and whether there is something to measure on, before any work.

    Raises:
        UserError: for the first that asks for what the data does not know or has not, or that nothing passes.
    """
    measuring = [name for name, stage in run.stages.items() if isinstance(stage, Evaluate)]
    if measuring and not len(val):
        raise UserError(
            f"stages.{measuring[0]}: no picture is held out to measure on; set data.val_share (one picture alone cannot be shared), or"
            " leave this stage out"
        )
    for name, stage in run.stages.items():
        if isinstance(stage, Train | Encode):
            filter_samples(data, stage.filter, f"stages.{name}.filter")
        if isinstance(stage, Train):
            for each in (data, val) if len(val) else (data,):
                asked(each, run.models[stage.model].views())


def key_of(found: Mapping[str, Any]) -> str:
    """The hash of an identity."""
    text = json.dumps(found, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves in which two identities differ, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in [*old, *(k for k in new if k not in old)]:
            found += differences(old.get(name), new.get(name), f"{path}.{_short(name)}" if path else _short(name))
        return found
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        old, new = list(old), list(new)
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return f"{text[:12]}…" if len(text) > 24 else text


def finished(folder: Path) -> Finished | None:
    """The finished stage in a folder, or None where it is unfinished.

    Raises:
        UserError: naming what is damaged: nothing that took hours is thrown away or made anew without a word.
    """
    try:
        done = records.read_as(folder / DONE, Finished)
        if done.product and (found := folder_hash(folder / "model")) != done.product:
            raise records.Damaged(f"{folder / 'model'}: another product than the one that was made here ({found[:12]})")
    except FileNotFoundError:
        return None
    except records.Damaged as error:
        raise UserError(f"{error}; put it back as it was, or move {folder} away to make this stage again") from None
    return done


def plain_json(value: Any) -> Any:
    """The value as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))
