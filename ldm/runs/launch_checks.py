"""Launch checks: what every stage shares out to the processes of a launch, and what cannot be trained so, before any work."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.data import remote
from ldm.data.sources import ScenesSource
from ldm.distributed.launcher import Launched, Work
from ldm.metrics.evaluator import check_weights
from ldm.models.inference import check_compiler
from ldm.runs.run import Evaluate, Run
from ldm.training.library_optimisers import EXTRA
from ldm.training.settings import Train

if TYPE_CHECKING:
    import torch

MANY = 200  # passes through the data


def shares(run: Run, launch: Launched) -> dict[str, Work]:
    """What every training stage shares out.

    Raises:
        UserError: with a line for each batch that cannot be shared and each setting that sharded weights cannot be trained with.
    """
    found: dict[str, Work] = {}
    wrong: list[str] = []
    for name, stage in _trained(run):
        shardable = run.trained(stage).shards()
        if launch.splits(shardable):
            wrong += [f"stages.{name}.{line}, or a launch without sharded weights (FSDP2)" for line in stage.unshardable()]
        try:
            passes = stage.passes(launch.world, f"stages.{name}.batch")
        except UserError as error:
            wrong.append(str(error))
            continue
        found[name] = Work(batch=stage.batch, passes=passes, precision=stage.precision, shardable=shardable)
    if wrong:
        raise UserError("\n".join(wrong))
    return found


def missing(run: Run, device: torch.device) -> Iterator[str]:
    """What a stage needs of this machine and is not there, a line each."""
    for name, stage in _trained(run):
        module, distribution = stage.optim.package
        if module and find_spec(module) is None:
            yield f"stages.{name}.optim.kind: {stage.optim.kind} needs the package {distribution}, which is not installed here; {EXTRA}"
        if stage.compile:
            try:
                check_compiler(device)
            except UserError as error:
                yield f"stages.{name}.{error}"
    for name, one in run.stages.items():
        if isinstance(one, Evaluate):
            try:
                check_weights(one.metrics)
            except UserError as error:
                yield f"stages.{name}.metrics: {error}"
    if run.mirror and (unopened := remote.lacking(run.mirror)) is not None:
        yield f"mirror: {unopened}"


def idle(run: Run) -> Iterator[str]:
    """What a run says that changes nothing, though it may do so in another one that is made of the same file; a line each."""
    trained = {stage.model for _, stage in _trained(run)}
    read = trained | {source.model for name in run.stages for source in run.reads(name).values()}
    used = run.everything()
    for name, model in run.models.items():
        if name not in read:
            yield f"models.{name}: no stage of this run trains it or reads it, so it changes nothing"
        elif used[name] is not model:
            yield f"models.{name}: the base model {run.init} brings its own, which is read in its place; leave it out, or give it a path"
    for name, stage in _trained(run):
        rate = stage.optim.warmup_images
        if rate >= stage.images:
            yield f"stages.{name}.optim.warmup_images: {rate:,} of {stage.images:,} images, so the rate never reaches lr"
        if stage.flip and isinstance(run.data, ScenesSource):
            yield f"stages.{name}.flip: captions of scenes name sides, so they are not mirrored"


def remarks(run: Run) -> Iterator[str]:
    """What models that are trained have to say of their settings, a line each."""
    for name in dict.fromkeys(stage.model for _, stage in _trained(run)):
        yield from (f"models.{name}.{line}" for line in run.models[name].remarks())


def by_heart(run: Run, samples: int) -> Iterator[str]:
    """What from nothing learns so few pictures that it will know them by heart, and what suits them better; a line at most."""
    passes = {name: stage.images / samples for name, stage in _trained(run) if samples and not run.init}
    if passes and max(passes.values()) > MANY:
        name = max(passes, key=lambda stage: passes[stage])
        yield (
            f"stages.{name} goes {passes[name]:,.0f} times through {plural(samples, 'picture')}, which networks that begin with nothing"
            " learn by heart; with few pictures fine-tune a model:"
            " python train.py configs/presets/lora-8gb.yaml data.path=DIR --hub (docs/finetune.md)"
        )


def _trained(run: Run) -> Iterator[tuple[str, Train]]:
    return ((name, stage) for name, stage in run.stages.items() if isinstance(stage, Train))
