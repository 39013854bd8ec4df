"""Run configuration: models by name, stages over them, which stage reads what, and validation."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, Count, PathText, Pixels, Positive, config, plain
from ldm.config.secrets import exposed
from ldm.data.buckets import Buckets, wrong_step
from ldm.data.filter import Filter
from ldm.data.sources import ScenesSource, Source, has_masks
from ldm.data.views import divided, parted
from ldm.families import registry
from ldm.families.draws import AFTER, SMALL
from ldm.families.family import ModelConfig
from ldm.metrics.evaluator import Evaluator
from ldm.runs.prior_preservation import PriorPreservation
from ldm.runs.run_folder import is_stage_name
from ldm.training.copies import overlap, wrong
from ldm.training.settings import Train

RUNS = Path("runs")


@config
class Encode:
    """A stage that encodes the data once, so that later stages read latents instead of images."""

    kind: Literal["encode"] = "encode"
    model: str = "autoencoder"  # what encodes, by its name in models
    resolution: Pixels  # px, height and width
    batch: Positive = 64  # images per call of the encoder
    images: Count = 0  # how many; 0: all that pass the filter
    filter: Filter = Filter()  # which samples are encoded
    flip: bool = False  # keep mirrored latents too, for training with flip (twice the size)
    buckets: Buckets | None = None  # pictures in shapes near their own, as the stages that read them say; null: squares
    codes: bool = False  # keep the numbers of a VQ autoencoder's codes, which token models read; false: latents

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        unsaid = {"batch", "model"} | ({"filter"} if self.filter == Filter() else set())
        unsaid |= {name for name in ("buckets", "codes") if not getattr(self, name)}
        return {name: value for name, value in plain(self).items() if name not in unsaid}


@config
class Evaluate:
    """A stage that measures a model as a stage left it, put together as an export would."""

    kind: Literal["evaluate"] = "evaluate"
    of: str  # the training stage whose result is measured
    metrics: tuple[Evaluator, ...]  # what is measured
    require: dict[str, float] = field(default_factory=dict)  # least values by name, such as reconstruction.bind: 0.97
    on_miss: Literal["stop", "warn"] = "stop"  # when a required value is not reached

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        return plain(self)


@config
class Export:
    """A stage that assembles the finished model: a diffusers pipeline folder with a model card, at RUN/model."""

    kind: Literal["export"] = "export"
    of: str = ""  # the training stage that is exported; empty: the latest of a model that can be

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        return plain(self)


Stage = Annotated[Train | Encode | Evaluate | Export, BY_KIND]


@dataclass(frozen=True)
class Read:
    """Where a stage reads a model from: what an earlier stage left, or else a model from elsewhere."""

    stage: str = ""  # the stage's name
    model: str = ""  # the model's name in the run


@config
class Run:
    """Everything that decides what a run makes; one YAML file."""

    name: str = ""  # of the run and its model; empty: the configuration file's name
    out: PathText = ""  # run folder; empty: runs/NAME
    seed: Count = 0  # of all randomness: equal seeds give equal results
    data: Source  # where images and captions come from
    init: PathText = ""  # a model to begin with: a model or run folder, a checkpoint file, or owner/name on the hub; empty: from nothing
    prior_preservation: PriorPreservation | None = None  # pictures of the data's kind, learned beside it (DreamBooth); null: none
    models: dict[str, registry.Model] = field(default_factory=dict)  # what learns and what is read, by name
    stages: dict[str, Stage]  # what is done, in this order
    mirror: PathText = ""  # a URL such as s3://bucket/NAME where checkpoints and finished stages are copied, and taken from; empty: none
    tracker: Literal["", "wandb", "tensorboard"] = ""  # log there too (wandb: offline unless WANDB_MODE=online); empty: log.jsonl only
    workers: Count = 2  # threads that load data

    def __post_init__(self) -> None:
        if found := list(problems(self)):
            raise UserError("; ".join(found))

    # Which stage reads what

    def everything(self) -> dict[str, ModelConfig]:
        """The models by name, and those that the base model of `init` brings along where the run names none of its own."""
        found: dict[str, ModelConfig] = dict(self.models)
        if self.init:
            for model in self.models.values():
                for role, own in model.from_base(self.init).items():
                    name = model.inputs()[role]
                    if name not in found or not (found[name].continues or found[name].elsewhere()):
                        found[name] = own
        return found

    def trained(self, stage: Train) -> ModelConfig:
        """The configuration of the model that a stage trains, with what the stage itself says of it."""
        return self.models[stage.model].for_stage(stage)

    def others(self, name: str) -> dict[str, ModelConfig]:
        """The inputs of a model, by role."""
        every = self.everything()
        return {role: every[other] for role, other in every[name].inputs().items() if other in every}

    def asked(self) -> Iterator[tuple[str, str, str]]:
        """What models ask of those that they read: the field that names one, its name, and what that must be (`ModelConfig.requires`)."""
        for name, model in self.models.items():
            for role, able in model.requires.items():
                if role in self.others(name):
                    yield f"models.{name}.{role}", model.inputs()[role], able

    def latest(self, before: str) -> dict[str, str]:
        """By model, the last stage before this one that trains it."""
        names = list(self.stages)
        earlier = names[: names.index(before)]
        return {stage.model: name for name in earlier if isinstance(stage := self.stages[name], Train)}

    def measured(self, name: str) -> str:
        """The training stage whose result an evaluate or export stage is about; empty: there is none."""
        stage = self.stages[name]
        assert isinstance(stage, Evaluate | Export)
        if stage.of:
            return stage.of
        for other in reversed(list(self.stages)[: list(self.stages).index(name)]):
            train = self.stages[other]
            if isinstance(train, Train) and self.everything()[train.model].exports:
                return other
        return ""

    def reads(self, name: str) -> dict[str, Read]:
        """What a stage reads, by role: the inputs of its model, `init`, `latents`, or the `model` itself."""
        stage, latest = self.stages[name], self.latest(name)

        def read(model: str) -> Read:
            return Read(stage=latest[model]) if model in latest else Read(model=model)

        if isinstance(stage, Encode):
            return {"model": read(stage.model)}
        if isinstance(stage, Train):
            found = {role: read(other) for role, other in self.everything()[stage.model].inputs().items()}
            if stage.model in latest:
                found["init"] = Read(stage=latest[stage.model])
            elif self.init and self.models[stage.model].continues:
                found["init"] = Read(model=stage.model)
            if stage.latents and not stage.cache:
                found["latents"] = Read(stage=stage.latents)
            return found
        of = self.measured(name)
        train = self.stages[of]
        assert isinstance(train, Train)

        def assembled(model: str) -> dict[str, Read]:
            """What a model is assembled from, and of a model before it in a chain what that is."""
            found: dict[str, Read] = {}
            for role, other in self.everything()[model].assembled_from().items():
                inner = assembled(other) if role == AFTER else {}
                found |= {role: read(other)} | {f"{role}.{name}": each for name, each in inner.items()}
            return found

        return assembled(train.model) | {"model": Read(stage=of)}

    def views_kept(self, name: str) -> tuple[str, ...]:
        """The views that an encode stage keeps: those of the models that read its latents."""
        readers = [self.models[stage.model] for stage in self.stages.values() if isinstance(stage, Train) and stage.latents == name]
        return tuple(dict.fromkeys(view for model in readers for view in model.views()))

    def carried_from(self, name: str) -> str:
        """The earlier stage whose state at its end a stage begins with; empty: none."""
        stage = self.stages[name]
        return self.latest(name)[stage.model] if isinstance(stage, Train) and stage.carry != "ema" else ""

    def carried_on(self, name: str) -> bool:
        """Whether a later stage begins with what this one has at its end, so that it must be kept."""
        return name in (self.carried_from(other) for other in self.stages)


def place(run: Run, file: Path | None) -> tuple[Run, Path]:
    """The run with its name filled in, and its folder: `out`, else the config's own run folder, else runs/NAME.

    Raises:
        UserError: for a setting that holds a password or the like, or a mirror in the folder.
    """
    if secret := list(exposed(plain(run))):
        raise UserError(
            f"{', '.join(secret)}: holds a password, a token or a signed address, and the run folder keeps its settings; put it into the"
            " environment or a credentials file of the library that needs it"
        )
    inside = file is not None and file.name == "config.yaml" and (file.parent / "stages").is_dir()
    name = run.name or (file.stem if file is not None else "run")
    out = Path(run.out) if run.out else file.parent if file is not None and inside else RUNS / name
    if run.mirror and (said := overlap(run.mirror, out)):
        raise UserError(said)
    # The folder is no part of what the run is: it may be moved, and its config.yaml repeats it there.
    return replace(run, name=name, out=""), out


# What is wrong between fields, told before any work

CANNOT = {"encodes_text": "encodes no text", "has_codes": "has no codebook; use kind vq", "has_tower": "has no image tower; use kind clip"}


def problems(run: Run) -> Iterator[str]:
    """What is wrong between the fields of a run."""
    if not run.stages:
        yield "stages: none; a run needs at least one"
    if run.mirror and (said := wrong(run.mirror)):
        yield said
    if run.prior_preservation is not None and run.prior_preservation.prompts and not run.init:
        yield "prior_preservation.prompts: the base model draws them; name it by init, or give prior_preservation.path"
    if (readers := [name for name, model in run.models.items() if model.reads_masks]) and not has_masks(run.data):
        yield f"models.{readers[0]}.masked_loss: no picture has a mask, as data.masks is none; set it to beside or alpha"
    if has_masks(run.data) and not readers:
        yield "data.masks: no model of this run weighs its loss by masks; give one masked_loss: {}, or leave masks out"
    if unknown := list(_unknown_models(run)):
        yield from unknown
        return
    for name, model in run.models.items():
        try:
            for view in model.views():
                divided(view)
        except UserError as error:
            yield f"models.{name}: {error}"
            return
        seen = [name]
        while (before := run.everything()[seen[-1]].assembled_from().get(AFTER)) and before not in seen:
            seen.append(before)
        if before:
            yield f"models.{name}.{AFTER}: {' after '.join([*seen, before])} goes round in a circle; one of them must be the first"
            return
        if before := model.assembled_from().get(AFTER):
            hands, reads = run.everything()[before].hands, ", ".join(model.told()) or "no view"
            if [parted(view)[0] for view in model.told()].count(hands) != 1:
                told = f"{hands}:N" if hands == SMALL else hands
                yield f"models.{name}.{AFTER}: {before} is told as one view {told}, but {name} reads {reads}; name it in its conditions"
            elif hands == SMALL:
                yield from _misfits(run, name, before)
    every = run.everything()
    for where, name, able in run.asked():
        if not getattr(every[name], able):
            source = f" ({path})" if (path := every[name].elsewhere()) else ""
            yield f"{where}: got {name}, a model of kind {every[name].kind}{source}, which {CANNOT.get(able, 'makes no latents')}"
    encoded: dict[str, Encode] = {}
    for name, stage in run.stages.items():
        where = f"stages.{name}"
        if not is_stage_name(name):
            yield f"{where}: a stage's name becomes a folder; use at most 100 letters, digits, - and _"
        if isinstance(stage, Train):
            yield from _untrainable(run, name, stage, where)
            yield from _unreadable_latents(run, stage, encoded, where)
        elif isinstance(stage, Encode):
            encoded[name] = stage
            yield from _missing(run, name, [stage.model], where)
            if not run.everything()[stage.model].encodes:
                yield f"{where}.model: {stage.model} makes no latents; name an autoencoder"
            elif stage.codes and not run.everything()[stage.model].has_codes:
                yield f"{where}.codes: {stage.model} has no codebook; leave codes out, or use an autoencoder of kind vq"
            yield from _wrong_sides(run, stage.model, (stage.resolution,), stage.buckets, where)
        else:
            yield from _unmeasurable(run, name, stage, where)


def _misfits(run: Run, name: str, before: str) -> Iterator[str]:
    """A model in a chain that is told a picture of another size than the model before it learns last."""
    trained = [(f"stages.{where}.resolution", stage) for where, stage in run.stages.items() if isinstance(stage, Train)]
    last = {stage.model: (where, stage.resolution) for where, stage in trained}
    if name not in last or before not in last:
        return
    (where, side), (there, drawn) = last[name], last[before]
    view = next(view for view in run.models[name].views() if parted(view)[0] == SMALL)
    told = side / divided(view)
    if told != drawn:
        yield f"{where}: {name} is told {told:g} px ({view} of {side}), but {before}, which it is after, draws {drawn} ({there})"


def _unknown_models(run: Run) -> Iterator[str]:
    """Names of models that no entry of `models` has."""
    known = list(run.everything())
    asked = {f"stages.{name}.model": stage.model for name, stage in run.stages.items() if isinstance(stage, Train | Encode)}
    read = {name: model.inputs() | model.assembled_from() for name, model in run.models.items()}
    asked |= {f"models.{name}.{role}": other for name, model in run.models.items() for role, other in read[name].items()}
    trained = {stage.model for stage in run.stages.values() if isinstance(stage, Train)}
    for where, name in asked.items():
        needed = where.startswith("stages.") or where.split(".")[1] in trained
        if name not in known and needed:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}" if known else "models is empty"
            yield f"{where}: {name!r} is no entry of models; {hint}"


def _missing(run: Run, name: str, needed: list[str], where: str) -> Iterator[str]:
    """Models that a stage reads and nothing has made before it."""
    every, latest = run.everything(), run.latest(name)
    for model in needed:
        begun = run.init and every[model].continues and not every[model].exports
        if model not in latest and not every[model].elsewhere() and not begun:
            yield f"{where}: needs a stage before it that trains {model} (kind: train, model: {model})"


def wrong_steps(run: Run, models: Mapping[str, ModelConfig]) -> Iterator[str]:
    """Sizes of stages that are no multiples of what their models need.

    Args:
        models: as the files of a base model say, which the run itself does not know; those of which nothing is known are left out.
    """
    for name, stage in run.stages.items():
        if isinstance(stage, Train | Encode) and stage.model in models:
            others = {role: models[other] for role, other in models[stage.model].inputs().items() if other in models}
            sides = (stage.resolution, *stage.also) if isinstance(stage, Train) else (stage.resolution,)
            yield from _uneven(stage.model, sides, models[stage.model].step_px(others), f"stages.{name}")


def _uneven(model: str, sides: tuple[int, ...], factor: int, where: str) -> Iterator[str]:
    for side in sides:
        if side % factor:
            yield f"{where}.resolution: got {side}; {model} needs a multiple of {factor}"


def _wrong_sides(run: Run, model: str, sides: tuple[int, ...], buckets: Buckets | None, where: str) -> Iterator[str]:
    every = run.everything()[model]
    factor = 1 if run.init else every.step_px(run.others(model))  # a base model's own network is not known here: `wrong_steps`
    yield from _uneven(model, sides, factor, where)
    for view in every.views():
        if wrong := [side for side in sides if side % divided(view)]:
            yield f"{where}.resolution: got {wrong[0]}; {model} is told {view}, which needs a multiple of {divided(view)}"
    if buckets:
        yield from wrong_step(buckets, sides[0], factor, f"{where}.buckets")


def _untrainable(run: Run, name: str, stage: Train, where: str) -> Iterator[str]:
    """Why a stage cannot train its model as it says."""
    model, latest = run.everything()[stage.model], run.latest(name)
    if source := model.elsewhere():
        yield f"{where}.model: {stage.model} is taken from {source} as it is; leave this stage out"
        return
    if stage.model in latest and not model.continues:
        yield f"{where}.model: {stage.model} is trained by stages.{latest[stage.model]} already; give that one more images"
    yield from _missing(run, name, list(model.inputs().values()), where)
    yield from _wrong_sides(run, stage.model, (stage.resolution, *stage.also), stage.buckets, where)
    for option, why in model.refuses.items():
        if getattr(stage, option) not in (None, False, "", ()):
            yield f"{where}.{option}: a model of kind {model.kind} {why}; leave it out"
    if stage.buckets and stage.also:
        yield f"{where}.buckets: also (further resolutions) cannot be had beside it"
    begins = f"stages.{latest[stage.model]}" if stage.model in latest else run.init
    yield from model.check(stage, where, begins)
    if stage.carry != "ema":
        yield from _uncarried(run, stage, latest.get(stage.model, ""), where)


def _unreadable_latents(run: Run, stage: Train, encoded: dict[str, Encode], where: str) -> Iterator[str]:
    """Why a stage cannot read the latents that it names."""
    model = run.everything()[stage.model]
    if not stage.latents or "latents" in model.refuses:
        return
    cache = encoded.get(stage.latents)
    if cache is None:
        if not stage.cache:  # one that ldm data encode made says itself what it holds
            yield f"{where}.latents: {stage.latents!r} is no encode stage before this one, and no path, which has a slash"
    elif model.reads_latents and cache.model != model.inputs().get("autoencoder"):
        yield f"{where}.latents: {stage.latents} encodes with {cache.model}, which {stage.model} does not read"
    elif cache.resolution != stage.resolution:
        yield f"{where}.latents: {stage.latents} holds {cache.resolution} px, the stage wants {stage.resolution}"
    elif model.reads_latents and cache.codes != (reads := model.reads_codes):
        kept, wanted = ("codes", "latents") if cache.codes else ("latents", "codes")
        fix = f"set stages.{stage.latents}.codes={str(reads).lower()}"
        yield f"{where}.latents: {stage.latents} holds {kept}, and {stage.model} reads {wanted}; {fix}"
    elif stage.flip and not cache.flip and not isinstance(run.data, ScenesSource):
        yield f"{where}.flip: {stage.latents} holds no mirrored latents; set stages.{stage.latents}.flip=true too"
    elif _shapes(stage) != _shapes(cache):
        yield f"{where}.buckets: {stage.latents} is encoded otherwise; set stages.{stage.latents}.buckets alike"
    if stage.also:
        yield f"{where}.also: cached latents have one resolution"
    if stage.filter.wants():
        yield f"{where}.filter: the stage reads cached latents; write stages.{stage.latents}.filter instead"


def _shapes(stage: Train | Encode) -> list[tuple[int, int]]:
    return stage.buckets.shapes(stage.resolution) if stage.buckets else []


def _uncarried(run: Run, stage: Train, name: str, where: str) -> Iterator[str]:
    """Why a stage cannot begin with what another one had at its end."""
    before = run.stages.get(name)
    if not isinstance(before, Train):
        yield f"{where}.carry: no stage before it trains {stage.model}, so there is nothing to carry on; leave it out"
        return
    if stage.ema and not before.ema:
        yield f"{where}.carry: stages.{name} has no EMA (ema: 0) to carry on; set ema there, or 0 here"
    if stage.carry == "all" and stage.optim.kind != before.optim.kind:
        kinds = f"{stage.optim.kind} cannot take over the state of stages.{name}'s {before.optim.kind}"
        yield f"{where}.carry: {kinds}; set carry=weights, or the same optim.kind"


def _unmeasurable(run: Run, name: str, stage: Evaluate | Export, where: str) -> Iterator[str]:
    """Why a stage cannot measure or export what it names."""
    earlier = list(run.stages)[: list(run.stages).index(name)]
    of = run.measured(name)
    train = run.stages.get(of)
    if not isinstance(train, Train) or of not in earlier:
        if stage.of:
            yield f"{where}.of: {stage.of!r} is no earlier train stage"
        else:
            able = [model for model, config in run.everything().items() if config.exports]
            yield f"{where}: needs a stage before it that trains {' or '.join(able) or 'a model that can be exported'}"
        return
    model = run.models[train.model]
    yield from _missing(run, name, list(model.assembled_from().values()), where)
    if isinstance(stage, Export):
        if not model.exports:
            yield f"{where}.of: {of} trains {train.model}, and a model of kind {model.kind} is not exported by itself"
        return
    scenes = isinstance(run.data, ScenesSource)
    for metric in stage.metrics:
        if metric.asks not in model.answers:
            can = f"can {', '.join(sorted(model.answers))}" if model.answers else "has nothing that is measured so"
            yield f"{where}.metrics: {metric.kind} needs a model that can {metric.asks}, but kind {model.kind} {can}"
        elif getattr(metric, "of_prompts", False) and not model.reads_prompts:
            yield f"{where}.metrics: {metric.kind} asks whether words are followed, and models.{train.model} reads none; leave it out"
    given = {f"{m.kind}.{value}" for m in stage.metrics for value in m.names(scenes)}
    for path in stage.require:
        kind, _, value = path.partition(".")
        if f"{kind.rstrip('_0123456789')}.{value}" not in given:
            yield f"{where}.require: {path} is not measured here; there are {', '.join(sorted(given))}"
