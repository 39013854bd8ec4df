"""What a run is: stages linked by content hash, the plan before it starts, and the order in which it happens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ldm import checkpoint
from ldm.config import BY_KIND, Count, config, plain
from ldm.data.buckets import wrong_step
from ldm.data.cached import cache_hash
from ldm.data.filter import sift
from ldm.data.sources import ScenesSource, Source
from ldm.errors import UserError
from ldm.families.autoencoder import KL, VQ
from ldm.families.clip import Clip
from ldm.families.latent_diffusion import LatentDiffusion
from ldm.given import PretrainedAutoencoder, problems, roles
from ldm.prior import Prior
from ldm.redact import exposed
from ldm.stages import Encode, Evaluate, Export, Stage
from ldm.text_pretrained import PretrainedText
from ldm.train import Train

if TYPE_CHECKING:
    from ldm.data.sources import DataSet
    from ldm.given import Found

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
        if problems := list(_problems(self)):
            raise UserError("; ".join(problems))

    def family(self, name: str) -> Any:
        """The configuration of a family by its field's name."""
        return {"text": self.text, "autoencoder": self.autoencoder, "diffusion": self.diffusion}[name]

    def trained(self, stage: Train) -> Clip | KL | VQ | LatentDiffusion:
        """The configuration of the family that a stage trains, with what the stage itself says of it."""
        family: Clip | KL | VQ | LatentDiffusion = self.family(stage.family)
        if stage.caption_dropout is None or not isinstance(family, LatentDiffusion):
            return family
        return replace(family, caption_dropout=stage.caption_dropout)


def _problems(run: Run) -> Iterator[str]:
    """What is wrong between fields, before any work."""
    if not run.stages:
        yield "stages: none; a run needs at least one"
    if run.prior is not None and run.prior.prompts and not run.init:
        yield "prior.prompts: the base model draws them; name it by init, or give prior.path"
    contradictions = list(problems(run))
    yield from contradictions
    if contradictions:
        return
    given = roles(run)
    trained: dict[str, str] = {}  # the families made so far, and by which stage
    encoded: dict[str, Encode] = {}
    own = isinstance(run.autoencoder, KL | VQ) and "autoencoder" not in given
    factor = 2 ** (len(run.autoencoder.network.channels) - 1) if own else 1  # type: ignore[union-attr]
    for name, stage in run.stages.items():
        where = f"stages.{name}"
        if not name or set(name) & set("/\\. ") or name.startswith("-"):
            yield f"{where}: a stage's name becomes a folder; use letters, digits, - and _"
        for needed in _needs(run, stage):
            if needed not in trained and (needed not in given or needed == "diffusion"):
                yield f"{where}: needs a stage before it that trains {needed} (kind: train, family: {needed})"
        sides = (stage.resolution, *stage.also) if isinstance(stage, Train) else (stage.resolution,) if isinstance(stage, Encode) else ()
        for side in sides:
            if side % factor:
                yield f"{where}.resolution: got {side}; the autoencoder needs a multiple of {factor}"
        if isinstance(stage, Train | Encode) and stage.buckets:
            yield from wrong_step(stage.buckets, stage.resolution, factor, f"{where}.buckets")
        if isinstance(stage, Train):
            if stage.buckets:
                yield from _shapeless(stage, where)
            if stage.exact and (stage.family == "text" or (stage.family == "autoencoder" and isinstance(run.autoencoder, VQ))):
                why = "pairs of the whole batch" if stage.family == "text" else "codes of the whole batch"
                yield f"{where}.exact: this family learns from {why}, which depend on how many processes there are; leave it out"
            if stage.latents:
                cache = encoded.get(stage.latents)
                if cache is None:
                    if not kept_cache(stage):  # one that ldm data encode made says itself what it holds
                        yield f"{where}.latents: {stage.latents!r} is no encode stage before this one, and no path, which has a slash"
                elif cache.resolution != stage.resolution:
                    yield f"{where}.latents: {stage.latents} holds {cache.resolution} px, the stage wants {stage.resolution}"
                elif stage.flip and not cache.flip and not isinstance(run.data, ScenesSource):
                    yield f"{where}.flip: {stage.latents} holds no mirrored latents; set stages.{stage.latents}.flip=true too"
                elif _shapes(stage) != _shapes(cache):
                    yield f"{where}.buckets: {stage.latents} is encoded otherwise; set stages.{stage.latents}.buckets alike"
                if stage.also:
                    yield f"{where}.also: cached latents have one resolution"
                if stage.family != "diffusion":
                    yield f"{where}.latents: only family: diffusion reads latents"
                if stage.filter.wants():
                    yield f"{where}.filter: the stage reads cached latents; write stages.{stage.latents}.filter instead"
            if stage.caption_dropout is not None and stage.family != "diffusion":
                yield f"{where}.caption_dropout: only family: diffusion drops captions"
            network = run.diffusion.network
            if stage.family == "diffusion" and run.diffusion.inpaint is None and network.in_channels == 2 * network.out_channels + 1:
                yield f"diffusion.network: has {network.in_channels} input channels, as for inpainting; set diffusion.inpaint={{}} too"
            if stage.family == "diffusion" and stage.latents and run.diffusion.inpaint is not None:
                yield f"{where}.latents: diffusion.inpaint hides parts of pictures, which cached latents do not have; leave latents out"
            if stage.family == "diffusion" and run.diffusion.adapt is not None:
                if "diffusion" not in given:
                    yield "diffusion.adapt: there is no model to adapt; give one by init, or leave adapt out"
                elif "diffusion" in trained:
                    yield f"{where}: stages.{trained['diffusion']} has learned what diffusion.adapt names; give that one more images"
            trained[stage.family] = name
        elif isinstance(stage, Encode):
            encoded[name] = stage
        elif stage.of or isinstance(stage, Evaluate):
            of = run.stages.get(stage.of)
            before = stage.of in list(run.stages)[: list(run.stages).index(name)]
            allowed = ("diffusion",) if isinstance(stage, Export) else ("autoencoder", "diffusion")
            if not isinstance(of, Train) or of.family not in allowed or not before:
                yield f"{where}.of: {stage.of!r} is no earlier train stage of {' or '.join(allowed)}"
            if isinstance(stage, Evaluate):
                yield from _unmeasured(run, stage, where)


def _shapes(stage: Train | Encode) -> list[tuple[int, int]]:
    return stage.buckets.shapes(stage.resolution) if stage.buckets else []


def _shapeless(stage: Train, where: str) -> Iterator[str]:
    """Why a stage cannot have buckets."""
    if stage.family == "text":
        yield f"{where}.buckets: family: text reads squares"
    if stage.also:
        yield f"{where}.buckets: also (further resolutions) cannot be had beside it"


def _unmeasured(run: Run, stage: Evaluate, where: str) -> Iterator[str]:
    """Required values that none of the stage's metrics will give."""
    scenes = isinstance(run.data, ScenesSource)
    given = {f"{m.kind}.{name}" for m in stage.metrics for name in m.names(scenes)}
    for path in stage.require:
        kind, _, name = path.partition(".")
        if f"{kind.rstrip('_0123456789')}.{name}" not in given:
            yield f"{where}.require: {path} is not measured here; there are {', '.join(sorted(given))}"


def _needs(run: Run, stage: Stage) -> tuple[str, ...]:
    """The families that a stage reads, by their field's name."""
    if isinstance(stage, Train):
        return run.family(stage.family).inputs()
    if isinstance(stage, Encode):
        return ("autoencoder",)
    of = run.stages.get(stage.of)
    if isinstance(stage, Evaluate) and isinstance(of, Train) and of.family == "autoencoder":
        return ("autoencoder",)
    return ("text", "autoencoder", "diffusion")


def inputs_of(run: Run, name: str) -> dict[str, str]:
    """The earlier stages whose products a stage reads: by role, the stage's name."""
    latest, stage = _latest(run, name), run.stages[name]
    found = {family: latest[family] for family in _needs(run, stage) if family in latest}
    if isinstance(stage, Train):
        if stage.family in latest:
            found["init"] = latest[stage.family]
        if stage.latents and not kept_cache(stage):
            found["latents"] = stage.latents
    elif isinstance(stage, Evaluate | Export) and stage.of:
        found[run.stages[stage.of].family] = stage.of  # type: ignore[union-attr]
    return found


def kept_cache(stage: Train) -> Path | None:
    """The latent cache that a stage reads from elsewhere, as `ldm data encode` made it; None: none, or an encode stage's."""
    return Path(stage.latents).expanduser() if "/" in stage.latents else None


def _latest(run: Run, name: str) -> dict[str, str]:
    """By family, the last stage before this one that trains it."""
    before = dict(list(run.stages.items())[: list(run.stages).index(name)])
    return {stage.family: other for other, stage in before.items() if isinstance(stage, Train)}


def given_of(run: Run, name: str) -> dict[str, str]:
    """What a stage reads of the parts from elsewhere: by role, the part's family."""
    latest, stage, given = _latest(run, name), run.stages[name], roles(run)
    found = {family: family for family in _needs(run, stage) if family in given and family not in latest}
    if isinstance(stage, Train) and stage.family in given and stage.family not in latest:
        found["init"] = stage.family
    return found


def hashes_of(run: Run, name: str, done: Mapping[str, Finished], given: Mapping[str, Found]) -> dict[str, str]:
    """By role, the hash of everything that a stage reads."""
    own = {role: done[other].product or done[other].key for role, other in inputs_of(run, name).items()}
    return own | {role: given[family].hash for role, family in given_of(run, name).items()}


def identity(run: Run, name: str, data: DataSet, val: DataSet, hashes: Mapping[str, str]) -> dict[str, Any]:
    """Everything that the result of a stage depends on, as plain values: its hash is the stage's key."""
    stage = run.stages[name]
    found: dict[str, Any] = {"stage": name, "seed": run.seed, "settings": stage.identity(), "inputs": dict(hashes)}
    if isinstance(stage, Train):
        family = plain(run.trained(stage))
        found["family"] = {k: v for k, v in family.items() if k != "defaults" and (k, v) not in (("adapt", None), ("inpaint", None))}
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


def finished(folder: Path) -> Finished | None:
    """The finished stage in a folder, or None where it is unfinished or its product is damaged."""
    try:
        values = json.loads((folder / DONE).read_text())
        done = Finished(
            folder=folder, key=values["key"], identity=values["identity"], product=values["product"],
            result=values["result"], seconds=values["seconds"], images=values["images"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError):
        return None
    if done.product:
        try:
            if checkpoint.folder_hash(folder / "model") != done.product:
                return None
        except checkpoint.Damaged:
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
        given: what `ldm.given.find` says.
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
    from ldm.execution import carry_out

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
