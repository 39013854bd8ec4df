"""What a run is: stages linked by content hash, and the plan before it starts."""

from __future__ import annotations

from ldm.training import checkpoint

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ldm.formats import atomic
from ldm.config.schema import BY_KIND, Count, config, plain
from ldm.runs.validation import contradictions
from ldm.data.cached import cache_hash
from ldm.data.filter import sift
from ldm.data.sources import Source
from ldm.config.errors import UserError
from ldm.families.autoencoder import KL, VQ
from ldm.families.clip import Clip
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.runs.pretrained import PretrainedAutoencoder
from ldm.runs.stage_graph import carried_from, given_of, inputs_of, kept_cache
from ldm.runs.prior_preservation import Prior
from ldm.config.secrets import exposed
from ldm.runs.stages import Encode, Evaluate, Export, Stage
from ldm.text.pretrained import PretrainedText
from ldm.training.settings import Train

if TYPE_CHECKING:
    from ldm.data.sources import DataSet
    from ldm.runs.pretrained import Found

Text = Annotated[Clip | PretrainedText, BY_KIND]
Autoencoder = Annotated[KL | VQ | PretrainedAutoencoder, BY_KIND]

RUNS = Path("runs")
DONE = "done.json"


@config
class Run:
    """Everything that decides what a run makes; one YAML file."""

    name: str = ""  # of the run and its model; empty: the configuration file's name
    out: str = ""  # run folder; empty: runs/NAME
    seed: Count = 0  # of all randomness: equal seeds give equal results
    data: Source  # where images and captions come from
    init: str = ""  # a model to begin with: a model or run folder, a checkpoint file, or owner/name on the hub; empty: from nothing
    prior: Prior | None = None  # pictures of the data's kind, learned beside it so that the base keeps knowing them; null: none
    text: Text = Clip()  # the text encoder
    autoencoder: Autoencoder = KL()  # pixels to latents and back
    diffusion: LatentDiffusion = LatentDiffusion()  # noise to latents
    stages: dict[str, Stage]  # what is done, in this order
    tracker: Literal["", "wandb", "tensorboard"] = ""  # log there too (wandb: offline unless WANDB_MODE=online); empty: log.jsonl only
    workers: Count = 2  # threads that load data

    def __post_init__(self) -> None:
        if found := list(contradictions(self)):
            raise UserError("; ".join(found))

    def family(self, name: str) -> Any:
        """The configuration of a family by its field's name."""
        return {"text": self.text, "autoencoder": self.autoencoder, "diffusion": self.diffusion}[name]

    def trained(self, stage: Train) -> Clip | KL | VQ | LatentDiffusion:
        """The configuration of the family that a stage trains, with what the stage itself says of it."""
        family: Clip | KL | VQ | LatentDiffusion = self.family(stage.family)
        if stage.checkpointing is not None and not isinstance(family, Clip):
            family = replace(family, network=replace(family.network, checkpointing=stage.checkpointing))  # type: ignore[arg-type]
        if stage.caption_dropout is None or not isinstance(family, LatentDiffusion):
            return family
        return replace(family, caption_dropout=stage.caption_dropout)


def hashes_of(run: Run, name: str, done: Mapping[str, Finished], given: Mapping[str, Found]) -> dict[str, str]:
    """By role, the hash of everything that a stage reads.

    Raises:
        UserError: where a stage is to carry on what an earlier one has not kept.
    """
    own = {role: done[other].product or done[other].key for role, other in inputs_of(run, name).items()}
    if other := carried_from(run, name):
        if not done[other].carried:
            raise UserError(
                f"stages.{name}.carry: {other} was finished when nothing asked for more than its averaged weights, so no more was kept;"
                f" leave carry out, or move {done[other].folder} away to train it again"
            )
        own["carried"] = done[other].carried
    return own | {role: given[family].hash for role, family in given_of(run, name).items()}


def identity(run: Run, name: str, data: DataSet, val: DataSet, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the result of a stage depends on, as plain values: its hash is the stage's key."""
    stage = run.stages[name]
    found: dict[str, Any] = {"stage": name, "seed": run.seed, "settings": stage.identity(), "inputs": dict(hashes)}
    if isinstance(stage, Train):
        family = plain(run.trained(stage))
        found["family"] = {k: v for k, v in family.items() if k != "defaults" and (k, v) not in (("adapt", None), ("inpaint", None))}
        if "checkpointing" in (network := family.get("network", {})):  # the same to the bit with and without
            network["checkpointing"] = False
        if (process := family.get("process")) and process["offset_noise"] is None:
            del process["offset_noise"]
        if cache := kept_cache(stage):
            found["latents"] = cache_hash(cache)
    if isinstance(stage, Train | Encode):
        found["data"] = sift(data, stage.filter, f"stages.{name}.filter").fingerprint()
    if isinstance(stage, Evaluate):
        found["val"] = val.fingerprint()
    if isinstance(stage, Evaluate | Export) and "diffusion" in hashes:
        found["defaults"] = plain(run.diffusion.defaults)
    return found


def check_filters(run: Run, data: DataSet) -> None:
    """Every stage's filter tried on the data, before any work.

    Raises:
        UserError: for the first that asks for what the data does not know, or that nothing passes.
    """
    for name, stage in run.stages.items():
        if isinstance(stage, Train | Encode):
            sift(data, stage.filter, f"stages.{name}.filter")


def key_of(found: Mapping[str, Any]) -> str:
    """The hash of an identity."""
    text = json.dumps(found, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The leaves in which two identities differ, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in [*old, *(k for k in new if k not in old)]:
            found += differences(old.get(name), new.get(name), f"{path}.{name}" if path else str(name))
        return found
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        old, new = list(old), list(new)
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) > 24 else text


@dataclass(frozen=True)
class Finished:
    """What done.json says of a stage, and where it is."""

    folder: Path
    key: str
    identity: dict[str, Any]
    product: str  # hash of the product's folder; empty: none
    result: dict[str, Any]
    seconds: float
    images: int
    carried: str = ""  # hash of the state that was kept for a later stage; empty: none was


def finished(folder: Path) -> Finished | None:
    """The finished stage in a folder, or None where it is unfinished or its product is damaged."""
    try:
        values = json.loads((folder / DONE).read_text())
        done = Finished(
            folder=folder, key=values["key"], identity=values["identity"], product=values["product"],
            result=values["result"], seconds=values["seconds"], images=values["images"], carried=values.get("carried", ""),
        )
    except (OSError, ValueError, KeyError):
        return None
    if done.product:
        try:
            if atomic.folder_hash(folder / "model") != done.product:
                return None
        except atomic.Damaged:
            return None
    return done


@dataclass(frozen=True)
class Planned:
    """What a start will do with one stage, and why."""

    name: str
    skip: bool
    why: str


def plan(run: Run, out: Path, data: DataSet, val: DataSet, given: Mapping[str, Found]) -> list[Planned]:
    """For every stage whether it runs or is skipped, from what lies in the run folder now.

    Args:
        given: what `ldm.runs.pretrained.find` says.
    """
    check_filters(run, data)
    done: dict[str, Finished] = {}
    found: list[Planned] = []
    for name in run.stages:
        needed = inputs_of(run, name)
        if waiting := [other for other in needed.values() if other not in done]:
            found.append(Planned(name, False, f"because {waiting[0]} runs"))
            continue
        have = finished(out / "stages" / name)
        wanted = identity(run, name, data, val, hashes_of(run, name, done, given))
        if have is not None and have.key == key_of(wanted):
            done[name] = have
            found.append(Planned(name, True, f"done, nothing it depends on has changed ({have.seconds:.0f} s saved)"))
        elif have is not None:
            found.append(Planned(name, False, f"changed: {'; '.join(differences(have.identity, plain_json(wanted))[:3])}"))
        elif checkpoint.states(out / "stages" / name / "state"):
            found.append(Planned(name, False, "was interrupted"))
        else:
            found.append(Planned(name, False, "not done yet"))
    return found


def plain_json(value: Any) -> Any:
    """The value as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))


def place(run: Run, file: Path | None) -> tuple[Run, Path]:
    """The run with its name filled in, and its folder: `out`, else the config's own run folder, else runs/NAME."""
    inside = file is not None and file.name == "config.yaml" and (file.parent / "stages").is_dir()
    name = run.name or (file.stem if file is not None else "run")
    out = Path(run.out) if run.out else file.parent if file is not None and inside else RUNS / name
    # The folder is no part of what the run is: it may be moved, and its config.yaml repeats it there.
    return replace(run, name=name, out=""), out


def execute(run: Run, out: Path, file: Path | None = None) -> int:
    """Do a placed run; `file` is where its settings come from.

    Raises:
        UserError: for a setting that holds a password or the like.
    """
    from ldm.runs.execution import carry_out

    if secret := list(exposed(plain(run))):
        raise UserError(
            f"{', '.join(secret)}: holds a password, a token or a signed address, and the run folder keeps its settings; put it into the"
            " environment or a credentials file of the library that needs it"
        )

    return carry_out(run, out, str(file or "Run"))


def start(run: Run) -> Path:
    """Do a run from Python; returns its folder.

    Raises:
        UserError: on anything the caller can mend.
    """
    placed, out = place(run, None)
    execute(placed, out)
    return out
