"""The only training loop: any family, any number of processes, stopped anywhere and continued exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ldm import checkpoint, optim
from ldm.alarms import Alarms
from ldm.batch import rows
from ldm.config import Count, Fraction, Positive, config
from ldm.data.buckets import Buckets, Sorted, sort
from ldm.data.filter import Filter
from ldm.data.loader import batches
from ldm.data.order import Order, Shuffled
from ldm.data.sources import DataSet
from ldm.ema import Ema
from ldm.errors import UserError
from ldm.exact import exact_gradients
from ldm.families.family import Context, Family, Product, Ranks
from ldm.optim import AdamW, Optim
from ldm.pictures import save_grid
from ldm.processes import ALONE, Learners, Stopped, stop_requests
from ldm.rng import Rng, mix
from ldm.sharded import gathered
from ldm.skipped import Skipped, rows_not_finite
from ldm.train_state import States
from ldm.trial import compile_networks, try_shapes

if TYPE_CHECKING:
    from ldm.log import Log, StageLog

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SKIPPED_UPDATES = 50  # so many in a row, and the run stops


@config
class Train:
    """A stage that trains one family for a number of images."""

    kind: Literal["train"] = "train"
    family: Literal["text", "autoencoder", "diffusion"]  # which part of the model learns
    images: Positive  # how many samples the stage sees; progress, schedules and periods count images
    resolution: Positive  # px, height and width
    also: tuple[Positive, ...] = ()  # further resolutions, px; updates take all of them in turn
    batch: Positive = 32  # samples of one update, over all processes
    micro_batch: Count = 0  # samples of one forward pass per process; 0: its whole share of the batch
    buckets: Buckets | None = None  # pictures in shapes near their own, of about resolution² pixels; null: squares
    exact: bool = False  # equal weights to the bit for any number of processes; needs micro_batch, and is slower
    flip: bool = False  # mirror half of the images (data sets whose captions name sides ignore it)
    filter: Filter = Filter()  # which samples are seen (with cached latents: the encode stage's filter)
    caption_dropout: Fraction | None = None  # of this stage, family: diffusion; null: as diffusion.caption_dropout
    latents: str = ""  # the encode stage whose cached latents are read instead of images
    optim: Optim = AdamW()
    ema: Fraction = 0.999  # decay of the averaged weights that are sampled and saved; 0: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of matrix products and convolutions, by autocast
    carry: Literal["averages", "weights", "all"] = "averages"  # what it begins with of the stage before it that trained this family
    checkpointing: bool | None = None  # recompute blocks in the backward pass, not family: text; null: as the network says
    compile: bool = False  # torch.compile of the denoising network, family: diffusion; minutes first, then faster steps
    save_every_images: Positive = 100_000  # between checkpoints
    keep: Positive = 2  # checkpoints
    save_beside: bool = True  # write checkpoints while training goes on, from a copy of the state in memory
    log_every_steps: Positive = 10  # between lines of the log
    sample_every_images: Count = 0  # between sample grids; 0: only at the end
    samples: Count = 8  # pictures in a grid, of the first validation captions
    prompts: tuple[str, ...] = ()  # pictures in a grid, of these prompts instead

    def __post_init__(self) -> None:
        if self.micro_batch and self.batch % self.micro_batch:
            raise UserError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")
        if self.exact and not self.micro_batch:
            raise UserError("exact: needs micro_batch, the samples that are computed together however many processes there are")

    @property
    def steps(self) -> int:
        """Updates until every image of the stage is seen."""
        return -(-self.images // self.batch)

    def passes(self, world: int, where: str) -> int:
        """Forward passes of one update on each of `world` processes.

        Raises:
            UserError: naming the field `where`, the batch and the processes, when it cannot be shared equally.
        """
        share = self.batch // world
        if self.batch % world or (self.micro_batch and share % self.micro_batch):
            raise UserError(
                f"{where}: {self.batch} cannot be shared by {world} processes"
                f" in micro-batches of {self.micro_batch or 'any size'}; make it a multiple of their product"
            )
        return share // self.micro_batch if self.micro_batch else 1

    def identity(self) -> dict[str, Any]:
        """What the result depends on: every field but those that only watch or keep."""
        from ldm.config import plain

        watching = {
            "save_every_images", "keep", "save_beside", "log_every_steps", "sample_every_images", "samples", "prompts", "checkpointing",
        }  # fmt: skip
        elsewhere = {"caption_dropout"} | ({"filter"} if self.filter == Filter() else set())  # in the family's, in the data's
        elsewhere |= {name for name in ("buckets", "compile") if not getattr(self, name)}
        elsewhere |= {"carry"} if self.carry == "averages" else set()
        return {name: value for name, value in plain(self).items() if name not in watching | elsewhere}


class Trainer:
    """One stage being trained.

    Args:
        stage: its settings.
        family: the networks with their loss, freshly built.
        context: what the family was built from.
        data: what is read: images or cached latents.
        folder: stages/NAME.
        key: hash of everything the result depends on; a checkpoint of another key is not continued.
        carried: what an earlier stage has kept for this one, as its `carry` asks.
        keeps: whether the state at the end is kept for a later stage.
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
        carried: Product | None = None,
        keeps: bool = False,
    ) -> None:
        stage.passes(processes.world, "batch")
        self.stage, self.family, self.context, self.data = stage, family, context, data
        self.folder, self.key, self.workers, self.keeps = folder, key, workers, keeps
        self.processes, self.log = processes, log
        self.seed = context.seed
        self.device = processes.device
        if stage.exact and processes.launch.sharded:
            raise UserError("exact: not for sharded weights (FSDP2); leave one of them out")
        family.ranks = Ranks() if stage.exact else processes.ranks()
        family.to(self.device).train()
        for module in family.frozen():
            module.to(self.device).eval()
        if processes.split(family, stage.precision, stage.optim.kind):
            log.note(f"{folder.name}: weights, optimiser and averages are sharded over {processes.world} processes (FSDP2)")
        elif processes.launch.sharded:
            log.note(f"{folder.name}: this family is held whole by every process (DDP)")
        if stage.compile:
            compile_networks(family, self.device, processes.sharded)
        self.players = family.players()
        self.optimizers = optim.build(stage.optim, self.players)
        self.ema = Ema(family.averaged(), stage.ema) if stage.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=stage.precision == "fp16")
        self.states = States(
            stage, folder, key, family=family, optimizers=self.optimizers, ema=self.ema, scaler=self.scaler,
            processes=processes, log=log,
        )  # fmt: skip
        self.step = self.states.restore()
        if carried is not None and not self.step:
            self.states.take_over(carried, optimiser=stage.carry == "all")
        self.skipped = 0

    @cached_property
    def buckets(self) -> Sorted | None:
        """The shapes that the data's pictures are seen in; None: squares."""
        stage = self.stage
        if stage.buckets is None:
            return None
        return sort(self.data, stage.buckets, resolution=stage.resolution, seed=self.seed, batch=stage.batch, steps=stage.steps)

    @cached_property
    def order(self) -> Order:
        """Which samples make up each batch."""
        if self.buckets is not None:
            return self.buckets.order
        return Shuffled(self.seed, len(self.data), self.stage.batch, (self.stage.resolution, *self.stage.also))

    def run(self) -> dict[str, Any]:
        """Train to the end, write the product to `folder/model`, and return what `finish` measured.

        Raises:
            Stopped: after a stop was asked for and the state was saved.
            UserError: when updates stay non-finite or checkpoints cannot be written.
        """
        stage = self.stage
        model = self.processes.wrap(self.family)
        feed = batches(
            self.data, seed=self.seed, batch=stage.batch, order=self.order, flip=stage.flip, start=self.step, stop=stage.steps,
            rank=self.processes.rank, world=self.processes.world, workers=self.workers,
        )  # fmt: skip
        start = self.step * stage.batch
        name = self.folder.name
        with stop_requests() as stopping, self.log.stage(name, stage.steps * stage.batch, start) as log, self.states.writing():
            if self.buckets is not None:
                try_shapes(self, model, self.buckets)
            alarms = self._alarms() if self.processes.main else None
            self._at("reading data", 0)
            for batch in log.waiting(feed):
                terms, gauges, stop = self._update(model, batch, stopping())
                self.step += 1
                last = self.step == stage.steps
                if self.step % stage.log_every_steps == 0 or last:
                    self._report(log, terms, gauges, alarms)
                self.processes.alone(name, self.step - 1, "saving or drawing")
                self.states.settle(wait=False)
                if not last and (stop or self._due(stage.save_every_images)):
                    self.states.save(self.step, must=stop)
                if stop and not last:
                    raise Stopped
                if last or (stage.sample_every_images and self._due(stage.sample_every_images)):
                    self._sample(log)
                self._at("reading data", 0)
            self.processes.alone(name, self.step, "finishing")
            self.states.close()
            return self._finish()

    def _at(self, doing: str, part: int) -> None:
        self.processes.at(self.folder.name, self.step, doing, part)

    def _due(self, every_images: int) -> bool:
        """Whether this step crossed a multiple of `every_images`."""
        batch = self.stage.batch
        return (self.step * batch) // every_images > ((self.step - 1) * batch) // every_images

    def _update(
        self, model: torch.nn.Module, batch: Any, stopping: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
        """One optimiser step; returns terms and gauges averaged over micro-batches, and whether any process is to stop."""
        stage, step = self.stage, self.step
        self.family.progress(step * stage.batch)
        factor = optim.lr_factor(stage.optim, step * stage.batch, stage.images)
        optim.set_lr(self.optimizers, factor)
        # Dropout inside networks draws from torch's own generator: address it too.
        torch.manual_seed(mix(self.seed, "torch", step, self.processes.rank) % 2**63)
        buffers = {name: buffer.clone() for name, buffer in self.family.named_buffers()}
        terms, gauges = self.gradients(model, batch)
        for parameter in self.family.idle():
            parameter.grad = None
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norms = optim.clip(self.players, stage.optim.clip)
        gauges |= {f"grad_norm_{name}": norm.detach() for name, norm in norms.items()}
        self._at("agreeing on the update", ALONE - 1)
        numbers = torch.stack([value.detach().float().to(self.device) for value in (*norms.values(), *terms.values())])
        bad, stop = self.processes.any(not bool(torch.isfinite(numbers).all()), stopping)
        self.states.still()
        if not bad:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            if self.ema:
                self.ema.update()
            gauges |= self.family.after_step(step, Rng(self.seed, [step]))
            self.skipped = 0
        else:
            with torch.no_grad():
                for name, buffer in self.family.named_buffers():
                    buffer.copy_(buffers[name])
            self._skip(batch, norms)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return terms, gauges, stop

    def gradients(self, model: torch.nn.Module, batch: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a batch's gradients up, a micro-batch at a time; returns terms and gauges averaged over these."""
        if self.stage.exact:
            return exact_gradients(self, model, batch)
        count = len(batch.position)
        size = self.stage.micro_batch or count
        terms: dict[str, Tensor] = {}
        gauges: dict[str, Tensor] = {}
        for first in range(0, count, size):
            here = rows(batch, first, first + size)
            part, share = here.to(self.device), len(here.position) / count
            waiting = first + size < count and self.processes.world > 1
            with self.processes.apart(model) if waiting else nullcontext():
                self._at("forward pass", 2 * first + 1)
                with self._autocast():
                    found, seen = model(part, Rng(self.seed, here.position))  # not the device's: reading them there would wait for it
                self._at("backward pass", 2 * first + 2)
                loss = torch.stack([value.float() for value in found.values()]).sum()
                self.scaler.scale(loss * share).backward()
            for sums, values in ((terms, found), (gauges, seen)):
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach() * share
        return terms, gauges

    def _autocast(self) -> torch.autocast:
        kind = PRECISION[self.stage.precision]
        return torch.autocast(self.device.type, kind, enabled=kind != torch.float32)

    def _skip(self, batch: Any, norms: dict[str, Tensor]) -> None:
        """Tell of an update that was skipped on all processes together, and of the samples it was made of.

        Raises:
            UserError: after too many in a row.
        """
        self.skipped += 1
        # fp16 finds its loss scale by overflowing a few times; that is no news.
        if not self.scaler.is_enabled() or self.skipped > 10:
            found = Skipped(self.data, self.stage.batch, self.order, self.step, {name: float(norm) for name, norm in norms.items()})
            found.tell(self.folder.name, self.processes.gather(rows_not_finite(batch)), self.log)
        if self.skipped >= SKIPPED_UPDATES:
            newest = next(iter(checkpoint.states(self.folder / "state")), None)
            raise UserError(
                f"{self.folder.name}: {self.skipped} updates in a row, up to step {self.step}, had losses or gradients that are not"
                f" finite; the weights are as before the first of them. The samples are in log.jsonl. Lower optim.lr, set optim.clip"
                f" or use precision=bf16; the same command goes on from {newest or 'the beginning'}"
            )

    def _alarms(self) -> Alarms:
        stage, before = self.stage, self.log.steps(self.folder.name)
        weights, averages = (self.ema.parameters, self.ema.averages) if self.ema else ([], [])
        return Alarms(lambda images: optim.lr_factor(stage.optim, images, stage.images), stage.batch, weights, averages, before)

    def _report(self, log: StageLog, terms: dict[str, Tensor], gauges: dict[str, Tensor], alarms: Alarms | None) -> None:
        names = [*terms, *gauges]
        values = torch.stack([v.detach().float().to(self.device) for v in (*terms.values(), *gauges.values())])
        numbers = dict(zip(names, self.processes.mean(values).tolist(), strict=True))
        if alarms is not None:
            images, lr = self.step * self.stage.batch, self.optimizers[-1].param_groups[0]["lr"]
            summands, seen = ({name: numbers[name] for name in group} for group in (terms, gauges))
            log.step(step=self.step, images=images, terms=summands, gauges=seen, lr=lr)
            for text in alarms.look(images, summands, seen, lr):
                self.log.note(f"warning: {self.folder.name}: {text}")
                self.log.record({"alarm": text, "stage": self.folder.name, "images": images})

    # Pictures

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Averaged weights in place and no dropout, as in the product; every process enters, the first one then works."""
        self.states.still()
        self.family.eval()
        with self.ema.applied() if self.ema else nullcontext(), gathered(self.family, self.processes.main), torch.no_grad():
            yield
        self.family.train()

    def _sample(self, log: StageLog) -> None:
        count = len(self.stage.prompts) or self.stage.samples
        count = min(count, len(self.context.val))
        if not count:
            return
        pictures = None
        with self._averaged(), self._autocast():
            if self.processes.main:
                index = list(range(count))
                batch = self.context.val.load(index, index, self.stage.resolution, 0, False).to(self.device)
                if self.stage.prompts:
                    batch = replace(batch, caption=self.stage.prompts[:count])
                pictures = self.family.preview(batch, seed=0)
        if pictures is None:
            return
        path = self.folder / "samples" / f"{self.step * self.stage.batch:09d}.png"
        try:
            save_grid(pictures, path, self.family.preview_columns)
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
                checkpoint.commit(self.folder / "model", self.family.save)
        self.processes.wait()
        return result

