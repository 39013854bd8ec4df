"""Training loop, the only one: any family, any number of processes, stopped anywhere and resumed exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.config.counts import plural
from ldm.config.errors import UserError, first_line, out_of_memory
from ldm.data.buckets import BucketedStage, bucket_stage, lines
from ldm.data.captions import cut_at_most, prompt_marks
from ldm.data.loader import Foreseen, fed
from ldm.data.order import BatchSampler, BlockBatches, ShuffledBatches
from ldm.data.pictures import save_grid
from ldm.data.sources import DataSet
from ldm.diffusion.batch import Fed, rows, sent
from ldm.diffusion.rng import Makers, Rng, mix
from ldm.distributed.environment import computed_in
from ldm.distributed.processes import ALONE, Learners, Stopped, stop_requests
from ldm.distributed.sharding import collected, gathered
from ldm.families.family import Context, Family, Product, Ranks
from ldm.formats import atomic
from ldm.models.gpu_form import channel_last, round_products
from ldm.models.inference import check_compiler, compile_each
from ldm.text.lengths import spread
from ldm.training import checkpoint, core_share, optim
from ldm.training.alarms import Alarms
from ldm.training.checkpoint import Former, Learning, States
from ldm.training.copies import Copies
from ldm.training.ema import Ema
from ldm.training.held_out import HeldOutLoss, LossByLevel
from ldm.training.library_optimisers import evaluated
from ldm.training.log import Log
from ldm.training.offload import Offload
from ldm.training.pace import Pace, SlowRank, Spent, logged
from ldm.training.post_hoc_ema import SNAPSHOTS, PostHocEma, PowerAverages, drop_beyond, keep
from ldm.training.settings import PRECISION, Train

if TYPE_CHECKING:
    from ldm.training.log import Log, StageLog

SKIPPED_UPDATES = 50  # so many in a row, and the run stops


@dataclass(frozen=True)
class Handover:
    """The training state between stages: what an earlier one has kept for this one, and whether this one keeps its own."""

    carried: Product | None = None
    keeps: bool = False
    former: Former | None = None  # a stage of other settings that this one goes on from
    copies: Copies | None = None  # where checkpoints are copied to, by the first process


class Trainer:
    """One stage being trained.

    Args:
        stage: its settings.
        family: the networks with their loss, freshly built.
        context: what the family was built from.
        data: what is read: images or cached latents.
        folder: stages/NAME.
        key: hash of everything the result depends on; a checkpoint of another key is not continued.
        handover: what is taken over from an earlier stage, and kept for a later one.
    """

    def __init__(
        self,
        stage: Train,
        family: Family,
        context: Context,
        *,
        data: DataSet,
        folder: Path,
        key: str,
        workers: int,
        processes: Learners,
        log: Log,
        handover: Handover = Handover(),
    ) -> None:
        stage.passes(processes.world, "batch")
        self.stage, self.family, self.context, self.data = stage, family, context, data
        self.folder, self.key, self.workers, self.keeps = folder, key, workers, handover.keeps
        self.processes, self.log = processes, log
        self.seed = context.seed
        self.device = processes.device
        if processes.launch.splits(family.shardable) and (refused := list(stage.unshardable())):
            raise UserError(f"sharded weights (FSDP2): {'; '.join(refused)}")
        family.ranks = Ranks() if stage.exact else processes.ranks()
        self.precision = computed_in(stage.precision, self.device.type)
        family.compute_in(PRECISION[self.precision])
        family.to(self.device).train()
        for module in family.frozen():
            module.to(self.device).eval()
        if self.device.type == "cuda":
            channel_last((family, *family.frozen()))
            round_products(to_tf32=self.precision != "fp32" and not stage.exact)
        if processes.split(family):
            log.note(f"{folder.name}: weights, optimiser and EMA are sharded over {processes.world} processes (FSDP2)")
        if stage.compile:
            compile_networks(family, self.device)
        self.groups, averaged = family.parameter_groups(), family.averaged()
        self.offload = Offload(family, self.groups, PRECISION[self.precision]) if stage.offload else None
        if self.offload is not None:
            self.groups, averaged = self.offload.groups, self.offload.on_cpu(averaged)
            if self.device.type == "cpu":
                log.note(f"{folder.name}: offload saves nothing here, since the device is the CPU itself")
        self.optimizers = optim.build(stage.optim, self.groups)
        self.ema = Ema(averaged, stage.ema) if stage.ema else None
        if self.precision != stage.precision:
            log.note(f"{folder.name}: this CPU has no instructions for {stage.precision}; computed in {self.precision}")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.power = PowerAverages(averaged, stage.post_hoc_ema.lengths) if stage.post_hoc_ema else None
        learning = Learning(family, self.optimizers, self.scaler, self.ema, self.power, self.offload)
        self.states = States(stage, folder, key, learning, processes=processes, log=log, copies=handover.copies)
        self.step = self.states.restore()
        self.former = handover.former
        if self.former is not None and not self.step:
            self.step = self.states.extend(self.former)
        elif handover.carried is not None and not self.step:
            self.states.take_over(handover.carried, optimiser=stage.carry == "all")
        self.skipped = 0
        self.pace, self.slow = Pace(self.device), SlowRank()
        self.foreseen: Foreseen = {}  # what the loss draws, so that the loader's threads make it
        self.levels: LossByLevel | None = None  # as measured last, on the first process

    @cached_property
    def buckets(self) -> BucketedStage | None:
        """The shapes that the data's pictures are seen in; None: squares."""
        stage = self.stage
        if stage.buckets is None:
            return None
        return bucket_stage(self.data, stage.buckets, resolution=stage.resolution, seed=self.seed, batch=stage.batch, steps=stage.steps)

    @cached_property
    def order(self) -> BatchSampler:
        """Which samples make up each batch."""
        if self.buckets is not None:
            return self.buckets.order
        stage, shapes = self.stage, (self.stage.resolution, *self.stage.also)
        if not stage.shuffle_block:
            return ShuffledBatches(self.seed, len(self.data), stage.batch, shapes)
        order = BlockBatches(self.seed, len(self.data), stage.batch, shapes, stage.shuffle_block)
        if order.block < stage.shuffle_block:
            few = plural(len(self.data), "sample is", "samples are")
            few += f" fewer than batch x shuffle_block ({stage.batch} x {stage.shuffle_block})"
            self.log.note(f"{self.folder.name}: {few}; blocks of {order.block} are shuffled")
        return order

    def run(self) -> dict[str, Any]:
        """Train to the end, write the product to `folder/model`, and return what `finish` measured.

        Raises:
            Stopped: after a stop was asked for and the state was saved.
            UserError: when updates stay non-finite or checkpoints cannot be written.
        """
        stage = self.stage
        model = self.processes.wrap(self.family)
        feed = fed(
            self.data,
            foreseen=self.foreseen,
            pin=self.device.type == "cuda",
            seed=self.seed,
            batch=stage.batch,
            order=self.order,
            flip=stage.flip,
            start=self.step,
            stop=stage.steps,
            rank=(self.processes.rank, self.processes.world),
            workers=self.workers,
        )
        start = self.step * stage.batch
        name = self.folder.name
        if self.processes.main:
            looked_at = [text for texts in self.data.all_captions(spread(len(self.data))) for text in texts]
            if cut := self.family.cut_captions(looked_at):
                self.log.note(f"{name}: {cut}")
            if idle := stage.tags.idle(looked_at) if stage.tags is not None else "":
                self.log.note(f"{name}: {idle}")
            if marked := prompt_marks(looked_at):
                self.log.note(f"{name}: {marked}")
            if whole := cut_at_most(looked_at):
                self.log.note(f"{name}: {whole}")
        measuring = self._measuring()
        if self.power is not None and self.processes.main:
            drop_beyond(self.folder, start)
            each = sum(t.numel() * t.element_size() for t in self.power.state().values())
            times = -(-stage.images // self._snapshot_images(stage.post_hoc_ema or PostHocEma()))
            self.log.note(f"{name}: averages for ldm ema: {times} snapshots of {each / 1e6:,.0f} MB each")
        with stop_requests() as stopping, self.log.stage(name, stage.steps * stage.batch, start) as log, self.states.writing():
            if self.buckets is not None:
                preflight(self, model, self.buckets)
            alarms = self._alarms() if self.processes.main else None
            self._at("reading data", 0)
            share = core_share.of_stage(stage.exact) if self.device.type == "cpu" else None
            ended = time.perf_counter()
            for shape, batch in log.waiting(feed):
                began = time.perf_counter()
                self.pace.batch(began - ended)
                terms, gauges, stop = self._update(model, batch, stopping(), self.foreseen[shape])
                if share is not None and (said := share.step(time.perf_counter() - began, self.order.at(self.step, 0, 1)[1])):
                    self.log.note(f"{name}: {said} (process {self.processes.rank}, step {self.step})")
                self.step += 1
                last = self.step == stage.steps
                if self.step % stage.log_every_steps == 0 or last:
                    self._report(log, terms, gauges, alarms)
                self.processes.alone(name, self.step - 1, "saving or drawing")
                self.states.settle(wait=False)
                if measuring is not None and (last or self._due(stage.held_out_plan[1])):
                    self._measure(measuring, log)  # before saving: what a checkpoint has seen is in the log, once
                if stage.post_hoc_ema is not None and (last or self._due(self._snapshot_images(stage.post_hoc_ema))):
                    self._keep_averages()
                if not last and (stop or self._due(stage.save_every_images)):
                    self.states.save(self.step, must=stop)
                if stop and not last:
                    raise Stopped
                if last or (stage.sample_every_images and self._due(stage.sample_every_images)):
                    self._sample(log)
                self._at("reading data", 0)
                ended = time.perf_counter()
            self.processes.alone(name, self.step, "finishing")
            self.states.close()
            return self._finish()

    def _snapshot_images(self, asked: PostHocEma) -> int:
        """Images between two snapshots of the averages."""
        return asked.every_images or -(-self.stage.images // SNAPSHOTS)

    def _keep_averages(self) -> None:
        """Leave a snapshot of the averages; one that fails is told, and training goes on."""
        assert self.power is not None
        averages = collected(self.power.state(), self.processes.main) if self.processes.sharded else self.power.state()
        if not self.processes.main:
            return
        try:
            keep(self.folder, self.step * self.stage.batch, averages, self.power.lengths, self.power.updates)
        except OSError as error:
            self.log.note(f"{self.folder.name}: snapshot of averages not written ({error.strerror or error}); training goes on")

    def _measuring(self) -> HeldOutLoss | None:
        """What measures held-out loss; None: nothing does, and where nothing can the reader is told."""
        context, name = self.context, self.folder.name
        samples, _ = self.stage.held_out_plan
        if not samples or not self.family.noised:
            return None
        held_out = context.val if context.held_out is None else context.held_out
        if not len(held_out):
            self.log.note(f"{name}: no sample is held out, so nothing will tell what the model memorises; data.val_share holds some out")
            return None
        whole = not self.processes.sharded
        options: dict[str, Any] = {"stage": self.stage, "seed": self.seed, "own": context.own, "processes": self.processes, "whole": whole}
        return HeldOutLoss(self.family, self.data, held_out, **options)

    def _measure(self, measuring: HeldOutLoss, log: StageLog) -> None:
        with self._averaged():
            self.levels = measuring.measure(self._autocast)
        if self.levels is not None:
            log.levels(self.step * self.stage.batch, self.levels)

    def _at(self, doing: str, part: int) -> None:
        self.processes.at(self.folder.name, self.step, doing, part)

    def _due(self, every_images: int) -> bool:
        """Whether this step crossed a multiple of `every_images`."""
        batch = self.stage.batch
        return (self.step * batch) // every_images > ((self.step - 1) * batch) // every_images

    def _update(
        self, model: torch.nn.Module, batch: Any, stopping: bool = False, asked: Makers | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
        """One optimiser step; returns terms and gauges averaged over micro-batches, and whether any process is to stop.

        Args:
            batch: of the data, or `Fed`.
            asked: is told what the loss draws that was not made ahead.
        """
        stage, step = self.stage, self.step
        self.family.progress(step * stage.batch)
        factor = optim.lr_factor(stage.optim, step * stage.batch, stage.images)
        optim.set_lr(self.optimizers, factor)
        # Dropout inside networks draws from torch's own generator: address it too.
        torch.manual_seed(mix(self.seed, "torch", step, self.processes.rank) % 2**63)
        buffers = {name: buffer.clone() for name, buffer in self.family.named_buffers()}
        terms, gauges = self.gradients(model, batch, asked)
        for parameter in self.family.idle():
            parameter.grad = None
        if self.offload is not None:
            self.offload.bring_gradients()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norms = optim.clip(self.groups, stage.optim.clip)
        gauges |= {f"grad_norm_{name}": norm.detach() for name, norm in norms.items()}
        self._at("agreeing on the update", ALONE - 1)
        numbers = torch.stack([value.detach().float().to(self.device) for value in (*norms.values(), *terms.values())])
        bad, stop = self.processes.any(not bool(torch.isfinite(numbers).all()), stopping)
        self.states.still()
        if not bad:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            if self.offload is not None:
                self.offload.hand_out()
            if self.ema:
                self.ema.update()
            if self.power:
                self.power.update()
            gauges |= self.family.after_step(step, Rng(self.seed, [step]))
            self.skipped = 0
        else:
            with torch.no_grad():
                for name, buffer in self.family.named_buffers():
                    buffer.copy_(buffers[name])
            self._skip(Fed.of(batch).batch, norms)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return terms, gauges, stop

    def gradients(self, model: torch.nn.Module, batch: Any, asked: Makers | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a batch's gradients up, a micro-batch at a time; returns terms and gauges averaged over these."""
        whole = Fed.of(batch)
        if self.stage.exact:
            return exact_gradients(self, model, whole, asked)
        count = len(whole.batch.position)
        size = self.stage.micro_batch or count
        terms: dict[str, Tensor] = {}
        gauges: dict[str, Tensor] = {}
        for first in range(0, count, size):
            here = rows(whole, first, first + size)
            position = here.batch.position  # not the device's: reading them there would wait for it
            part, share = here.to(self.device), len(position) / count
            waiting = first + size < count and self.processes.world > 1
            with self.processes.apart(model) if waiting else nullcontext():
                self._at("forward pass", 2 * first + 1)
                with self.pace.forward(), self._autocast():
                    found, seen = model(part.batch, Rng(self.seed, position, part.draws, asked))
                self._at("backward pass", 2 * first + 2)
                loss = torch.stack([value.float() for value in found.values()]).sum()
                self.scaler.scale(loss * share).backward()
            for sums, values in ((terms, found), (gauges, seen)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach() * share
        return terms, gauges

    def _autocast(self) -> torch.autocast:
        kind = PRECISION[self.precision]
        return torch.autocast(self.device.type, kind, enabled=kind != torch.float32)

    def _skip(self, batch: Any, norms: dict[str, Tensor]) -> None:
        """Tell of an update that was skipped on all processes together, and of the samples it was made of.

        Raises:
            UserError: after too many in a row.
        """
        self.skipped += 1
        # fp16 finds its loss scale by overflowing a few times; that is no news.
        if not self.scaler.is_enabled() or self.skipped > 10:
            found = NonFiniteUpdate(self.data, self.stage.batch, self.order, self.step, {name: float(norm) for name, norm in norms.items()})
            found.tell(self.folder.name, self.processes.gather(rows_not_finite(batch)), self.log)
        if self.skipped >= SKIPPED_UPDATES:
            newest = next(iter(checkpoint.states(self.folder / "state")), None)
            raise UserError(
                f"{self.folder.name}: {self.skipped} updates in a row, up to step {self.step}, had losses or gradients that are not"
                f" finite; the weights are as before the first of them. The samples are in log.jsonl. Lower optim.lr, set optim.clip"
                f" or use precision=bf16; the same command goes on from {newest or 'the beginning'}"
            )

    def _alarms(self) -> Alarms:
        stage, changed_at = self.stage, self.former.images if self.former is not None else -1
        before = [line for line in self.log.steps(self.folder.name) if line.get("images", 0) > changed_at]
        weights, averages = (self.ema.parameters, self.ema.averages) if self.ema else ([], [])
        return Alarms(lambda images: optim.lr_factor(stage.optim, images, stage.images), stage.batch, weights, averages, before)

    def _report(self, log: StageLog, terms: dict[str, Tensor], gauges: dict[str, Tensor], alarms: Alarms | None) -> None:
        names = [*terms, *gauges]
        rank, world = self.processes.rank, self.processes.world
        own = self.pace.look()
        paces = torch.zeros(world, 2)
        paces[rank] = torch.tensor([own.data, own.forward]) * world  # each process fills its row, so the mean over them is all of them
        values = [v.detach().float().to(self.device) for v in (*terms.values(), *gauges.values())]
        found = self.processes.mean(torch.cat([torch.stack(values), sent(paces.flatten(), self.device)])).tolist()
        numbers, rest = dict(zip(names, found, strict=False)), found[len(names) :]
        spent = [Spent(*rest[2 * i : 2 * i + 2]) for i in range(world)]
        if alarms is not None:
            images, lr = self.step * self.stage.batch, self.optimizers[-1].param_groups[0]["lr"]
            summands, seen = ({name: numbers[name] for name in group} for group in (terms, gauges))
            log.step(step=self.step, images=images, terms=summands, gauges=seen, lr=lr, ranks=logged(spent) if world > 1 else {})
            if world > 1 and (said := self.slow.look(spent)):
                self.log.note(f"warning: {self.folder.name}: {said}")
                self.log.record({"alarm": said, "stage": self.folder.name, "images": images})
            for text in alarms.look(images, summands, seen, lr):
                self.log.note(f"warning: {self.folder.name}: {text}")
                self.log.record({"alarm": text, "stage": self.folder.name, "images": images})

    # Pictures

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Averaged weights in place and no dropout, as in the product; every process enters, the first one then works."""
        self.states.still()
        self.family.eval()
        own = self.ema.applied() if self.ema else evaluated(self.optimizers)
        held = nullcontext() if self.offload is None else self.offload.whole()
        with own, held, gathered(self.family, self.processes.main), torch.no_grad():
            yield
        self.family.train()

    def _sample(self, log: StageLog) -> None:
        held_out = self.context.val if len(self.context.val) else self.context.data
        count = len(self.stage.prompts) or min(self.stage.samples, len(held_out))
        if not count:
            return
        shared = self.family.preview_by_sample and not self.processes.sharded  # of sharded weights the first process alone has all
        own = self.processes.share(count) if shared else range(count * self.processes.main)
        drawn: list[Tensor] = []
        with self._averaged():
            if own:
                index = [number % len(held_out) for number in own]
                batch = held_out.load(index, index, self.stage.resolution, 0, False).to(self.device)
                if self.stage.prompts:
                    batch = replace(batch, caption=self.stage.prompts[own.start : own.stop])
                with self._autocast():
                    pictures = self.family.preview(batch, seed=own.start)
                drawn = [] if pictures is None else [pictures.cpu()]
        if shared:
            drawn = self.processes.gather(drawn)
        if not self.processes.main or not drawn:
            return
        path = self.folder / "samples" / f"{self.step * self.stage.batch:09d}.png"
        try:
            save_grid(torch.cat(drawn), path, self.family.preview_columns)
        except OSError as error:
            self.log.note(f"{path}: not written ({error.strerror or error}); training goes on")
            return
        log.pictures(path)

    def _finish(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if self.keeps:
            self.states.keep(self.step)
        with self._averaged():
            if self.processes.main:
                result = self.family.finish(self.context)
                atomic.commit(self.folder / "model", self.family.save)
        self.processes.wait()
        if self.levels is not None:
            means = {name: round(value, 6) for name, value in self.levels.means().items()}
            self.log.note(f"{self.folder.name}: loss {means['train']:.4g} of training samples, {means['held_out']:.4g} of held-out ones")
            result = {**result, "loss": {**means, **asdict(self.levels)}}
        return result


def exact_gradients(
    trainer: Trainer, model: torch.nn.Module, whole: Fed, asked: Makers | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients of a batch: of every micro-batch by itself, added one after the other in the order of its samples.

    Floating-point sums depend on their order. Here the order is that of the samples, whoever computes them: each process
    hands the sum so far to the next, and the last one tells all. Returns terms and gauges as `Trainer.gradients` does.
    """
    stage, device = trainer.stage, trainer.device
    count, size = len(whole.batch.position), stage.micro_batch
    parameters = [parameter for group in trainer.groups for parameter in group.parameters]
    terms: dict[str, Tensor] = {}
    gauges: dict[str, Tensor] = {}
    parts: list[Tensor] = []
    live: list[torch.nn.Parameter] = []
    for first in range(0, count, size):
        here = rows(whole, first, first + size)
        position, part = here.batch.position, here.to(device)
        # Dropout inside networks draws from torch's own generator: by the samples, not by who computes them.
        torch.manual_seed(mix(trainer.seed, "torch", int(position[0])) % 2**63)
        with trainer.processes.apart(model):
            with trainer._autocast(), trainer.pace.forward():
                found, seen = model(part.batch, Rng(trainer.seed, position, part.draws, asked))
            loss = torch.stack([value.float() for value in found.values()]).sum()
            trainer.scaler.scale(loss * (size / stage.batch)).backward()
        live = [parameter for parameter in parameters if parameter.grad is not None]
        parts.append(torch.cat([parameter.grad.flatten() for parameter in live if parameter.grad is not None]))
        for parameter in live:
            parameter.grad = None
        for sums, values in ((terms, found), (gauges, seen)):
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach() * (size / count)
    total = trainer.processes.chained(parts)
    for parameter, values in zip(live, total.split([parameter.numel() for parameter in live]), strict=True):
        parameter.grad = values.view_as(parameter)
    return terms, gauges


def preflight(trainer: Trainer, model: torch.nn.Module, buckets: BucketedStage) -> None:
    """Tell of the buckets, and make a forward and a backward pass in each shape, the largest first; nothing is learned.

    Raises:
        UserError: naming the shape that needs more memory than there is.
    """
    stage, name, log = trainer.stage, trainer.folder.name, trainer.log
    log.note(f"{name}: {plural(len(buckets.rows), 'bucket')}, each batch in one shape")
    for line in lines(buckets.rows):
        log.note(f"  {line}")
    if buckets.missed:
        missed = plural(buckets.missed, "picture is", "pictures are")
        log.note(f"{name}: {missed} never reached in {plural(stage.steps, 'update')}; lower batch or raise images")
    log.record({"buckets": buckets.rows, "stage": name, "images": trainer.step * stage.batch})
    count = stage.micro_batch or stage.batch // trainer.processes.world
    buffers = {key: buffer.clone() for key, buffer in trainer.family.named_buffers()}
    trainer.family.progress(stage.images)  # with every part of the loss
    one = {shape: int(members[0]) for shape, members in zip(buckets.order.shapes, buckets.order.members, strict=True)}
    for shape in buckets.shapes:
        batch = trainer.data.load([one[shape]] * count, range(count), shape, trainer.seed, False)
        try:
            with trainer.processes.apart(model):
                trainer.gradients(model, batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"stages.{name}: {plural(count, 'picture')} of {shape[1]}x{shape[0]} px {_too_many(trainer, error)}") from None
        finally:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for key, buffer in trainer.family.named_buffers():
            buffer.copy_(buffers[key])


def too_large(trainer: Trainer, error: Exception) -> UserError:
    """What to tell where memory ran out in the middle of training."""
    count = trainer.stage.micro_batch or trainer.stage.batch // trainer.processes.world
    what = f"at step {trainer.step} {plural(count, 'picture')} of {trainer.stage.resolution} px"
    goes_on = "the same command goes on from the last checkpoint, with checkpointing too; another changed setting begins the stage anew"
    return UserError(f"stages.{trainer.folder.name}: {what} {_too_many(trainer, error)}; {goes_on}")


def _too_many(trainer: Trainer, error: Exception) -> str:
    """That they do not fit, and what helps, most first."""
    stage, name = trainer.stage, trainer.folder.name
    count = stage.micro_batch or stage.batch // trainer.processes.world
    helps = [f"set stages.{name}.micro_batch={count // 2} (the update stays that of {stage.batch} pictures)"] if count > 1 else []
    if stage.precision == "fp32":
        helps.append(f"stages.{name}.precision=bf16")
    if (blocks := _recomputing(trainer.family)) and not any(blocks):
        helps.append(f"stages.{name}.checkpointing=true")
    helps.append("a lower resolution")
    return f"do not fit into the memory ({first_line(error)}); {', or '.join(helps)}"


def _recomputing(family: Family) -> list[bool]:
    """Of each network that can recompute its blocks, whether it does; a base that is adapted is not among its modules."""
    parts = [part for network in (family, *family.compilable()) for part in network.modules()]
    return [bool(vars(part)["checkpointing"]) for part in parts if "checkpointing" in vars(part)]


def compile_networks(family: Family, device: torch.device) -> None:
    """Have torch compile what nearly all of a step goes through, in place, when it is first called; names of weights stay.

    Raises:
        UserError: for a family that has no such network, or without a compiler.
    """
    networks = family.compilable()
    if not networks:
        raise UserError("compile: this model has no network that torch.compile takes; leave it out")
    check_compiler(device)
    compile_each(networks)


NAMED = 4  # samples in the line for the reader; log.jsonl names all


def rows_not_finite(batch: Any) -> list[int]:
    """The global positions of a batch's samples that hold NaN or infinity as they come from the data."""
    bad = torch.zeros(len(batch.position), dtype=torch.bool)
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            bad |= ~torch.isfinite(value.flatten(1)).all(1).cpu()
    return [int(position) for position in batch.position[bad.to(batch.position.device)]]


@dataclass(frozen=True)
class NonFiniteUpdate:
    """One such update."""

    data: DataSet
    batch: int  # rows of one, over all processes
    order: BatchSampler
    step: int
    norms: dict[str, float]  # of each parameter group's gradient

    def tell(self, stage: str, bad: list[int], log: Log) -> None:
        """A line for the reader, and all samples of the batch in log.jsonl.

        Args:
            bad: positions of samples that were not finite before any network saw them.
        """
        first, last = self.step * self.batch, (self.step + 1) * self.batch
        index, _ = self.order.at(self.step, 0, self.batch)
        names = {first + i: self.data.origin(int(number)) for i, number in enumerate(index)}
        guilty = {position: names[position] for position in sorted(set(bad)) if position in names}
        norms = {name: norm if np.isfinite(norm) else str(norm) for name, norm in self.norms.items()}
        log.record(
            {
                "skipped": {
                    "positions": [first, last - 1],
                    "samples": list(names.values()),
                    "not_finite": list(guilty.values()),
                    "norms": norms,
                },
                "stage": stage,
                "at_step": self.step,
                "images": last,
            }
        )
        said = ", ".join(f"{name} {norm}" for name, norm in norms.items())
        more = f" and {len(guilty) - NAMED} more" if len(guilty) > NAMED else ""
        why = f"not finite as read: {', '.join(list(guilty.values())[:NAMED])}{more}; " if guilty else ""
        log.note(
            f"{stage}: step {self.step}: loss or gradient not finite (norms: {said}); this update is skipped by all processes."
            f" {why}its samples, positions {first} to {last - 1}, are named in log.jsonl"
        )
