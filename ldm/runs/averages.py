"""Averages of a finished or interrupted stage, made into an EMA of any length: as a model folder, and measured."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.config.errors import UserError
from ldm.config.schema import load
from ldm.data.scenes.source import ScenesSource
from ldm.distributed.processes import Learners
from ldm.families.family import Product
from ldm.formats import atomic
from ldm.formats.tensor_file import read_tensors
from ldm.metrics.adherence import Adherence
from ldm.metrics.bench import Bench
from ldm.runs import pretrained
from ldm.runs.execution import Execution
from ldm.runs.keys import finished
from ldm.runs.run import Run, place
from ldm.runs.run_folder import only_one
from ldm.training.checkpoint import left_in
from ldm.training.held_out import HeldOutLoss
from ldm.training.post_hoc_ema import Snapshots, snapshots
from ldm.training.settings import BINS, Train

SWEEP = "ema-sweep.json"  # in a stage's folder
SAMPLES = 256  # of held-out loss, where the stage says nothing
POOR = 0.1  # share of an average that its snapshots cannot tell, from which on the reader is told


class Averages:
    """A stage whose kept averages are made into others.

    Args:
        execution: of its run.
        name: of the stage.

    Raises:
        UserError: where it has kept none, or what it reads is gone.
    """

    def __init__(self, execution: Execution, name: str) -> None:
        stage = execution.run.stages[name]
        assert isinstance(stage, Train)
        self.execution, self.name, self.stage = execution, name, stage
        self.folder = execution.out / "stages" / name
        self.snapshots = Snapshots(self.folder)
        self.device = execution.processes.device
        self.products = execution.products(name)
        self.family, self.context, self.data = execution.begun(name, stage, self.products)
        self._take_the_rest()
        self.family.to(self.device).eval()
        for module in self.family.frozen():
            module.to(self.device).eval()

    def _take_the_rest(self) -> None:
        """What is not averaged (buffers, a discriminator), as the stage left it."""
        averaged = {id(p) for p in self.family.averaged()}
        rest = [name for name, value in self.family.state_dict(keep_vars=True).items() if id(value) not in averaged]
        if not rest:
            return
        try:
            found = read_tensors(left_in(self.folder)[0] / "model.safetensors")[0]
        except UserError:
            raise UserError(f"{self.folder}: holds no state (keep_state: false), but {rest[0]} is not averaged; train it again") from None
        self.family.load_state_dict({name: found[name] for name in rest}, strict=False)

    def take(self, length: float) -> None:
        """Put the average of a length (sigma_rel) at the newest snapshot into the family."""
        made = self.snapshots.made(length)
        own = self.family.averaged()
        if [tuple(p.shape) for p in own] != [tuple(value.shape) for value in made]:
            raise UserError(f"{self.folder}: its snapshots are of another model than config.yaml describes")
        with torch.no_grad():
            for parameter, value in zip(own, made, strict=True):
                parameter.copy_(value)

    @contextmanager
    def _product(self) -> Iterator[dict[str, Product]]:
        """What the stage would have left with these weights, beside what it read."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".ema-") as scratch, torch.no_grad():
            self.family.finish(self.context)
            target = Path(scratch) / "model"
            atomic.commit(target, self.family.save)
            yield {**self.products, "model": Product(target, atomic.folder_hash(target))}

    def _story(self, length: float) -> dict[str, Any]:
        story = self.execution.story()
        said = f"{self.snapshots.images:,} images at {self.stage.resolution} px, EMA of length {length:g} made afterwards"
        return {**story, "stages": {**story["stages"], self.name: said}}

    def write(self, target: Path, length: float) -> None:
        """The finished model with the average of a length, as an export would write it."""
        self.take(length)
        model = self.execution.run.models[self.stage.model]
        with self._product() as products:
            model.assemble(products, target, self._story(length))
            for part in model.beside:
                if (learned := products["model"].folder / part).is_dir():
                    atomic.commit(target.with_name(f"{target.name}-{part}"), partial(shutil.copytree, learned, dirs_exist_ok=True))

    def losses(self, length: float) -> dict[str, float]:
        """Mean losses of training and of held-out samples; none where nothing is held out or the model has no noise levels."""
        held_out = self.context.val if self.context.held_out is None else self.context.held_out
        if not self.family.noised or not len(held_out):
            return {}
        samples = max(self.stage.held_out or SAMPLES, BINS)
        stage = replace(self.stage, held_out=samples)
        processes = self.execution.processes
        seen = HeldOutLoss(
            self.family, self.data, held_out, stage=stage, seed=self.context.seed, own=self.context.own, processes=processes, whole=True
        ).measure(nullcontext)
        assert seen is not None
        return {name: round(value, 6) for name, value in seen.means().items()}

    def adherence(self, prompts: int, length: float) -> dict[str, float]:
        """`bind` of so many prompts with seen and with held-out pairs of the built-in scenes."""
        data = self.execution.run.data
        assert isinstance(data, ScenesSource)
        model = self.execution.run.models[self.stage.model]
        with self._product() as products, tempfile.TemporaryDirectory(dir=self.folder, prefix=".ema-") as scratch:
            drawn = model.measured(products, Path(scratch) / "model", self._story(length), self.device)
            bench = Bench(drawn, None, self.stage.resolution, self.context.seed, self.device, None, lambda done, total, what: None)
            found = Adherence(tier=data.tier, prompts=prompts).run(bench)
        return {f"bind_{pairs}": found[pairs]["bind"] for pairs in ("seen", "held_out")}


@contextmanager
def opened(folder: Path, name: str) -> Iterator[Averages]:
    """The averages of a stage of a run folder; by default of the last that has kept some.

    Raises:
        UserError: where there is no such stage, or another process works there.
    """
    file = folder / "config.yaml"
    run, out = place(load(file, [], Run), file)
    trained = [stage for stage in run.stages if isinstance(run.stages[stage], Train)]
    if name and name not in trained:
        raise UserError(f"stage: got {name}; there are {', '.join(trained)}")
    able = [stage for stage in trained if snapshots(out / "stages" / stage)]
    if not name and not able:
        raise UserError(f"{folder}: no stage has kept averages; train one with stages.{(trained or ['NAME'])[-1]}.post_hoc_ema={{}}")
    chosen = name or able[-1]
    with only_one(out):
        execution = Execution(run, out, Learners())
        try:
            for stage in run.stages:
                if stage != chosen and (have := finished(out / "stages" / stage)) is not None:
                    execution.done[stage] = have
            execution.made = pretrained.make(run, execution.elsewhere, out, write=False)
            if gone := [read.stage for read in run.reads(chosen).values() if read.stage and read.stage not in execution.done]:
                raise UserError(f"{folder}: stage {gone[0]}, which {chosen} reads, is not finished; finish the run first")
            yield Averages(execution, chosen)
        finally:
            execution.log.close()


def sweep(averages: Averages, lengths: Sequence[float], prompts: int) -> list[dict[str, float]]:
    """What each length measures, also written for the report: held-out loss, and with prompts of scenes the adherence.

    Raises:
        UserError: where there is nothing to measure.
    """
    if prompts and not isinstance(averages.execution.run.data, ScenesSource):
        raise UserError("n: is of the prompts of the built-in scenes, and this run has other data; leave it out")
    rows = []
    for length in lengths:
        averages.take(length)
        row = {"length": length, "misfit": round(averages.snapshots.misfit(length), 4), **averages.losses(length)}
        row |= averages.adherence(prompts, length) if prompts else {}
        if len(row) == 2:
            raise UserError(f"{averages.name}: nothing is held out and no prompts are asked for (--n), so lengths cannot be compared")
        rows.append(row)
        averages.execution.log.note(f"{averages.name}: EMA of length {length:g}: {json.dumps(row)}")
    atomic.write_json(averages.folder / SWEEP, {"images": averages.snapshots.images, "rows": rows})
    return rows
