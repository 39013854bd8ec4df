"""Plan of a run: what a start would do and why, and its cost in parameters, memory, storage and time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.config.counts import plural
from ldm.config.errors import UserError, first_line
from ldm.data.buckets import bucket_stage, lines
from ldm.data.dataset import offered
from ldm.data.filter import filter_samples
from ldm.data.sources import both_parts
from ldm.data.views import kept_bytes
from ldm.distributed.environment import usable_cores
from ldm.distributed.launcher import Launched, here, unheeded
from ldm.families.family import Found
from ldm.runs.dry_run import Planned, planned
from ldm.runs.estimate import Estimate, estimate
from ldm.runs.launch_checks import by_heart, idle, missing, remarks, shares
from ldm.runs.pretrained import FOLDER, check, find, oversized
from ldm.runs.prior_preservation import PRIOR
from ldm.runs.run import Encode, Run, Stage
from ldm.training.settings import Train
from ldm.training.throughput import Card, Expected, peak

if TYPE_CHECKING:
    from ldm.data.sources import DataSet

CORE_TFLOPS = 0.05  # what a CPU core does in training, in float32 or bfloat16 (docs/benchmarks.md)
GPU_TFLOPS = 100.0  # about a third of what an A100 could do in bfloat16; a well-fed H100 does three times as much


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage before it is done; what does not apply to its kind is 0 or empty."""

    name: str
    kind: str
    skip: bool
    why: str
    samples: int = 0  # that pass its filter; 0: not known
    images: int = 0  # seen in the whole stage
    resolution: int = 0  # px
    steps: int = 0  # optimiser steps, the same for any number of processes
    batch: int = 0  # images of a step, over all processes
    micro_batch: int = 0  # images of one forward pass on one process
    passes: int = 0  # forward passes of a step on one process
    buckets: list[dict[str, Any]] = field(default_factory=list)  # width, height, images, cut, enlarged, updates, missed
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # bytes on each device
    memory_of_machine: int = 0  # bytes in the machine's own memory for each process, where a stage keeps its state there (offload)
    memory_of_device: int = 0  # bytes that a named device has; 0: none is named
    flops_forward: int = 0  # of one image through the part that learns, or through the encoder
    flops: int = 0  # of one image in all, backward pass and frozen parts included
    checkpoint_bytes: int = 0
    kept_bytes: int = 0  # of all checkpoints kept at a time
    carried_bytes: int = 0  # of the state that is kept at its end
    cache_bytes: int = 0
    seconds: float = 0.0  # at the stated speed


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All stages, and what their figures rest on."""

    run: str
    out: str
    processes: int
    tflops: float  # of one process
    speed_from: str  # who said so
    training_images: int  # 0: the data cannot be read here
    validation_images: int
    parameters: dict[str, int]
    notes: list[str]
    stages: list[StagePlan]
    seconds: float  # of the stages that would run; evaluation and export are not counted


def launched(processes: int) -> Launched:
    """This launch, as launchers tell, or the same with so many processes (0: as many as it has)."""
    found = here()
    return replace(found, world=processes) if processes else found


def assumed_tflops() -> tuple[float, str]:
    """The speed of one process, and why it is thought so."""
    if torch.cuda.is_available():
        return GPU_TFLOPS, f"assumed for {torch.cuda.get_device_name()}; --tflops X says better"
    cores = usable_cores()
    return CORE_TFLOPS * cores, f"assumed for {cores} CPU cores; --tflops X says better"


def make(
    run: Run,
    out: Path,
    *,
    processes: int = 0,
    tflops: float = 0.0,
    samples: int = 0,
    extend: bool = False,
    card: Card | None = None,
    mfu: float = 0.35,
) -> RunPlan:
    """The plan of a placed run; nothing is trained, downloaded or written.

    Args:
        processes: how many would work; 0: as many as this launch has.
        tflops: what one of them does, 10^12 floating-point operations a second; 0: assumed.
        samples: how many the data would have, filters passed; 0: as many as it has.
        extend: whether stages with other settings go on from their state.
        card: whose speed in each stage's precision and whose memory count, wherever this is asked; None: as `tflops` says.
        mfu: the share of a card's peak that training reaches.

    Raises:
        UserError: for what `shares` refuses, or where a filter asks for what the data does not know.
    """
    launch = launched(processes)
    processes, work = launch.world, shares(run, launch)
    speed, said = (tflops, "as told") if tflops else assumed_tflops()
    if card is not None:
        speed, said = mfu * card.half / 1e12, f"{mfu:.0%} of the {card.name}'s peak in bf16 or fp16, of fp32 where a stage is in that"
    notes = [*unheeded(launch, work), *missing(run, torch.device("cuda" if torch.cuda.is_available() else "cpu"))]
    data, val = _data(run, notes)
    if run.prior_preservation is not None and data is not None:
        drawn = out / FOLDER / PRIOR
        if run.prior_preservation.path or drawn.is_dir():
            data = run.prior_preservation.mixed(data, drawn)
        else:
            first = plural(run.prior_preservation.images, "picture")
            notes.append(f"of prior_preservation.prompts {first} will be drawn first; counts are without them")
    notes += idle(run)
    notes += remarks(run)
    notes += by_heart(run, samples or (0 if data is None else len(data)))
    elsewhere = _elsewhere(run, notes)
    if data is None or val is None or elsewhere is None:
        doings = _unread(run, "the data" if data is None else "what it begins with")
    else:
        doings = planned(run, out, data, val, elsewhere, extend)
    whole = estimate(run)
    split = {name for name, each in work.items() if launch.splits(each.shardable)}
    stages = []
    for doing in doings:
        precision = getattr(run.stages[doing.name], "precision", "bf16")
        own = speed if card is None else mfu * card.peak(precision) / 1e12
        one = _stage(run, doing, data, whole, own, samples, (processes, doing.name in split))
        stages.append(replace(one, memory_of_device=int(card.memory) if card is not None and one.memory else 0))
    return RunPlan(
        run=run.name,
        out=str(out),
        processes=processes,
        tflops=speed,
        speed_from=said,
        training_images=0 if data is None else len(data),
        validation_images=0 if val is None else len(val),
        parameters=whole.parameters,
        notes=[*notes, *whole.notes],
        stages=stages,
        seconds=sum(stage.seconds for stage in stages if not stage.skip),
    )


def _data(run: Run, notes: list[str]) -> tuple[DataSet | None, DataSet | None]:
    try:
        return both_parts(run.data)
    except UserError as error:
        notes.append(f"planned without the data, so without its counts ({first_line(error, 1000)})")
        return None, None


def _elsewhere(run: Run, notes: list[str]) -> dict[str, Found] | None:
    try:
        found = find(run, notes.append)
    except UserError as error:
        notes.append(f"planned without what it begins with ({first_line(error, 1000)})")
        return None
    check(run, found)
    notes += dict.fromkeys(oversized(run, found))
    return found


def _unread(run: Run, what: str) -> list[Planned]:
    return [Planned(name, False, f"{what} cannot be read here") for name in run.stages]


def _stage(run: Run, doing: Planned, data: DataSet | None, parts: Estimate, speed: float, told: int, launch: tuple[int, bool]) -> StagePlan:
    """The plan of one stage.

    Args:
        launch: how many processes, and whether they share the weights out (FSDP2).
    """
    processes, split = launch
    stage: Stage = run.stages[doing.name]
    said: dict[str, Any] = {"name": doing.name, "kind": stage.kind, "skip": doing.skip, "why": doing.why}
    if not isinstance(stage, Train | Encode):
        return StagePlan(**said)
    seen = None if data is None else filter_samples(data, stage.filter, f"stages.{doing.name}.filter")
    samples = told or (0 if seen is None else len(seen))
    per_second = speed * 1e12 * processes
    if isinstance(stage, Encode):
        images = min(stage.images or samples, samples or stage.images)
        copies = 2 if stage.flip and (data is None or data.mirrors) else 1
        cost, each = parts.encoding(stage, copies)
        kinds = {} if data is None else offered(data, run.views_kept(doing.name))
        each += sum(kept_bytes(kind, stage.resolution) for kind in kinds.values())
        return StagePlan(
            **said,
            samples=samples,
            images=images,
            resolution=stage.resolution,
            flops_forward=cost.forward,
            flops=cost.forward,
            cache_bytes=each * images,
            seconds=cost.forward * images / per_second,
        )
    passes = stage.passes(processes, f"stages.{doing.name}.batch")
    micro = stage.batch // processes // passes
    needs = parts.training(stage)
    shaped = None
    if stage.buckets and seen is not None:
        shaped = bucket_stage(seen, stage.buckets, resolution=stage.resolution, seed=run.seed, batch=stage.batch, steps=stage.steps)
    return StagePlan(
        **said,
        samples=samples,
        images=stage.images,
        resolution=stage.resolution,
        steps=stage.steps,
        batch=stage.batch,
        micro_batch=micro,
        passes=passes,
        buckets=[] if shaped is None else shaped.rows,
        parameters=needs.parameters,
        memory=needs.memory(micro, processes, sharded=split),
        memory_of_machine=needs.host_bytes,
        flops_forward=needs.forward,
        flops=needs.flops,
        checkpoint_bytes=needs.checkpoint_bytes,
        kept_bytes=stage.keep * needs.checkpoint_bytes,
        carried_bytes=needs.checkpoint_bytes if stage.keep_state or run.carried_on(doing.name) else 0,
        seconds=needs.flops * stage.images / per_second,
    )


def expected(run: Run, devices: int, device: str) -> dict[str, Expected]:
    """The stages that train or encode, in their order, for so many devices of that name."""
    with torch.random.fork_rng(devices=[]):  # counting builds networks, and is not to be seen in what is trained
        parts = estimate(run)
        found: dict[str, Expected] = {}
        for name, stage in run.stages.items():
            if isinstance(stage, Train):
                found[name] = Expected(stage.images, parts.training(stage).flops, devices * peak(device, stage.precision))
            elif isinstance(stage, Encode):
                found[name] = Expected(stage.images, parts.encoding(stage, 1)[0].forward)
    return found


# For people


def show(found: RunPlan) -> str:
    """The plan as text."""
    return "\n".join(_lines(found))


def as_json(found: RunPlan) -> str:
    """The plan as JSON: the fields of RunPlan and StagePlan."""
    return json.dumps(asdict(found), indent=2)


def _lines(found: RunPlan) -> Iterator[str]:
    counts = f"; {found.training_images:,} training and {found.validation_images:,} validation images" if found.training_images else ""
    yield f"run {found.run} in {found.out}{counts}"
    yield f"parameters: {', '.join(f'{name} {value:,}' for name, value in found.parameters.items())}"
    work = plural(found.processes, "process", "processes")
    yield f"at {work} of {found.tflops:g} TFLOP/s ({found.speed_from}): {duration(found.seconds)}"
    yield from (f"note: {note}" for note in found.notes)
    for stage in found.stages:
        yield f"  {'skip' if stage.skip else 'run '}  {stage.name:<16} {stage.kind:<9} {_amount(stage)}[{stage.why}]"
        if not stage.skip:
            yield from (f"{'':<8}{line}" for line in _details(stage))


def _amount(stage: StagePlan) -> str:
    if stage.kind == "train":
        return f"{plural(stage.images, 'image')} at {stage.resolution} px, {plural(stage.steps, 'update')}  "
    if stage.kind == "encode":
        return f"{f'{stage.images:,}' if stage.images else 'all'} images at {stage.resolution} px  "
    return ""


def times(passes: float) -> str:
    """How often the data is gone through, in three figures or whole."""
    return f"{passes:.3g}" if passes < 1000 else f"{passes:,.0f}"


def _details(stage: StagePlan) -> Iterator[str]:
    if stage.kind == "encode":
        size = f"; cache {size_of(stage.cache_bytes)}" if stage.cache_bytes else ""
        yield f"{operations(stage.flops)} an image, {duration(stage.seconds)}{size}"
    if stage.kind != "train":
        return
    if stage.samples:
        yield f"{times(stage.images / stage.samples)} times through {plural(stage.samples, 'sample')}"
    split = f"{stage.passes} x {stage.micro_batch}" if stage.passes > 1 else str(stage.micro_batch)
    yield f"batch {stage.batch}: {split} on each process"
    yield from (f"bucket {line}" for line in lines(stage.buckets))
    yield f"{operations(stage.flops_forward)} forward, {operations(stage.flops)} in all an image: {duration(stage.seconds)}"
    parts = ", ".join(f"{name} {'-' * (value < 0)}{size_of(abs(value))}" for name, value in stage.memory.items())
    needs, room = sum(stage.memory.values()), stage.memory_of_device
    yield f"memory of each device, estimated: {size_of(needs)} ({parts})"
    if stage.memory_of_machine:
        yield f"memory of the machine for each process (offload): {size_of(stage.memory_of_machine)}"
    if room:
        yield _verdict(stage, needs, room)
    yield f"checkpoint {size_of(stage.checkpoint_bytes)}, {size_of(stage.kept_bytes)} kept at most"
    if stage.carried_bytes:
        yield f"its state at the end, {size_of(stage.carried_bytes)}, is kept to go on from (keep_state)"


def _verdict(stage: StagePlan, needs: int, room: int) -> str:
    """Whether a stage fits a device, with a tenth of it left for what the estimate does not count, and the micro-batch that does."""
    usable, each = 0.9 * room, stage.memory.get("activations", 0) / max(1, stage.micro_batch)
    said = f"of the device's {size_of(room)}"
    if needs <= usable:
        return f"fits: {needs / room:.0%} {said}"
    rest = needs - stage.memory.get("activations", 0) - stage.memory.get("freed in turn", 0)  # gradients stay from pass to pass
    fitting = int((usable - rest) // each) if each else 0
    if fitting >= 1:
        return f"does not fit: {needs / room:.0%} {said}; a micro_batch of {fitting} or less does"
    fixes = "recompute blocks (checkpointing), keep its state in the machine's memory (offload), shard (FSDP2), or learn a LoRA"
    return f"does not fit: {needs / room:.0%} {said}; {fixes}"


def operations(flops: float) -> str:
    """Floating-point operations as a reader would say them."""
    for unit in ("FLOP", "kFLOP", "MFLOP", "GFLOP"):
        if flops < (1000 if unit != "GFLOP" else 20_000):
            return f"{flops:,.4g} {unit}" if flops < 1000 else f"{flops:,.0f} {unit}"
        flops /= 1000
    return f"{flops:,.1f} TFLOP"


def size_of(count: float) -> str:
    """Bytes in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def duration(seconds: float) -> str:
    """Time as a reader would say it."""
    for unit, size in (("days", 86400.0), ("hours", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"
