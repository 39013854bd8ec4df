"""Settings of a training stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, PathText, Pixels, Positive, config, plain
from ldm.data.buckets import Buckets
from ldm.data.filter import Filter
from ldm.data.tags import Tags
from ldm.training.library_optimisers import ScheduleFree
from ldm.training.optim import AdamW, Optim
from ldm.training.post_hoc_ema import PostHocEma

BINS = 8  # of noise levels, by which held-out loss is told
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@config
class Train:
    """A stage that trains one model for a number of images."""

    kind: Literal["train"] = "train"
    model: str  # what learns, by its name in models
    images: Positive  # how many samples the stage sees; progress, schedules and periods count images
    resolution: Pixels  # px, height and width
    also: tuple[Pixels, ...] = ()  # further resolutions, px; updates take all of them in turn
    batch: Positive = 32  # samples of one update, over all processes
    micro_batch: Count = 0  # samples of one forward pass per process; 0: its whole share of the batch
    buckets: Buckets | None = None  # pictures in shapes near their own, of about resolution² pixels; null: squares
    exact: bool = False  # equal weights to the bit for any number of processes; needs micro_batch, and is slower
    shuffle_block: Count = 0  # samples that lie side by side, are read with one request and seen in as many updates; 0: each by itself
    flip: bool = False  # mirror half of the images (data sets whose captions name sides ignore it)
    filter: Filter = Filter()  # which samples are seen (with cached latents: the encode stage's filter)
    caption_dropout: Fraction | None = None  # of this stage; null: as the model says
    tags: Tags | None = None  # captions as tags, shuffled or in part left out each time; null: as they are
    latents: PathText = ""  # the encode stage whose cached latents are read instead of images
    optim: Optim = AdamW()
    ema: Fraction = 0.999  # decay of the averaged weights that are sampled and saved; 0: none
    post_hoc_ema: PostHocEma | None = None  # averages from which `ldm ema` makes an EMA of any length; null: none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of matrix products and convolutions, by autocast
    offload: bool = False  # float32 weights, optimiser and EMA in this machine's memory; the device holds weights of `precision`
    carry: Literal["ema", "weights", "all"] = "ema"  # what it begins with of the stage before it that trained this model
    checkpointing: bool | None = None  # recompute blocks in the backward pass; null: as the network says
    compile: bool = False  # torch.compile of the networks that a step goes through; minutes first, then faster steps on a GPU
    save_every_images: Positive = 100_000  # between checkpoints
    keep: Positive = 2  # checkpoints
    keep_state: bool = True  # keep weights, EMA and optimiser at the stage's end, from which --extend goes on
    save_beside: bool = True  # write checkpoints while training goes on, from a copy of the state in memory
    log_every_steps: Positive = 10  # between lines of the log
    sample_every_images: Count = 0  # between sample grids; 0: only at the end
    samples: Count = 8  # pictures in a grid, of the first validation captions
    prompts: tuple[str, ...] = ()  # pictures in a grid, of these prompts instead
    held_out: Count | None = (
        None  # held-out samples whose loss by noise level is measured, beside as many of training; 0: none; null: 1 % of the time
    )
    held_out_every_images: Count = 0  # between these; 0: as often as that allows, at most 20 times; at the end in any case

    def __post_init__(self) -> None:
        if self.micro_batch and self.batch % self.micro_batch:
            raise UserError(f"micro_batch {self.micro_batch} does not divide batch {self.batch}")
        if self.ema and isinstance(self.optim, ScheduleFree):
            raise UserError(f"ema: {self.ema}, but optim.kind: schedule_free averages the weights itself; set ema=0")
        if self.held_out is not None and 0 < self.held_out < BINS:
            raise UserError(f"held_out: got {self.held_out}; give at least {BINS}, one for each noise level, or 0 for none")
        if self.offload and (self.exact or self.precision == "fp16"):
            other = "exact: true adds up gradients on the device" if self.exact else "precision: fp16 scales gradients on the device"
            raise UserError(f"offload: true moves gradients to the CPU, but {other}; leave one of the two out")
        if self.shuffle_block and self.buckets is not None:
            raise UserError(f"shuffle_block: {self.shuffle_block}, but buckets draws from all over the data; leave one of the two out")
        if self.exact and not self.micro_batch:
            raise UserError("exact: needs micro_batch, the samples that are computed together however many processes there are")

    @property
    def steps(self) -> int:
        """Updates until every image of the stage is seen."""
        return -(-self.images // self.batch)

    @property
    def cache(self) -> Path | None:
        """The latent cache that is read from elsewhere, as `ldm data encode` made it; None: none, or an encode stage's."""
        return Path(self.latents) if "/" in self.latents else None

    @property
    def held_out_plan(self) -> tuple[int, int]:
        """How many held-out samples are measured at a time, as many of training besides, and after how many images each; 0: none.

        A pair costs two forward passes, less than a training step's share of one sample; 1 % of a stage's images are the budget.
        """
        every = self.held_out_every_images
        budget = self.images // 100
        times = -(-self.images // every) if every else min(20, max(1, budget // 64))
        if self.held_out is not None:
            return self.held_out, every or -(-self.images // times)
        samples = min(256, budget // times)
        return (samples if samples >= 16 or every else 0), every or -(-self.images // times)

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

    def unshardable(self) -> Iterator[str]:
        """The settings that sharded weights (FSDP2) cannot be trained with, each with why and what to do."""
        if self.exact:
            yield "exact: true adds up gradients of whole weights; set exact=false"
        if self.precision == "fp16":
            yield "precision: fp16 scales the gradients of whole weights; use bf16 or fp32"
        if self.offload:
            yield "offload: true holds whole weights; set offload=false"
        if self.compile:
            yield "compile: true takes whole weights; set compile=false"
        if self.optim.needs_whole:
            yield f"optim.kind: {self.optim.kind} {self.optim.needs_whole}; use adamw"

    def identity(self) -> dict[str, Any]:
        """What the result depends on: every field but those that only watch or keep."""
        watching = {
            "save_every_images",
            "keep",
            "keep_state",
            "save_beside",
            "log_every_steps",
            "sample_every_images",
            "samples",
            "prompts",
            "held_out",
            "held_out_every_images",
            "checkpointing",
        }
        elsewhere = {"caption_dropout", "model"} | ({"filter"} if self.filter == Filter() else set())  # in the model's, in the data's
        elsewhere |= {
            name for name in ("buckets", "compile", "offload", "post_hoc_ema", "shuffle_block", "tags") if not getattr(self, name)
        }
        elsewhere |= {"carry"} if self.carry == "ema" else set()
        found = {name: value for name, value in plain(self).items() if name not in watching | elsewhere}
        found["optim"] = {name: value for name, value in found["optim"].items() if value is not None}
        return found
