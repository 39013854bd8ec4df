"""Benchmark table: what is compared with whom, described without loading anything heavy."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Size = Literal["small", "tiny"]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Benchmark setup: device, size, threads and folder."""

    device: str = "cpu"  # "cpu" or "cuda"
    size: Size = "small"  # tiny: toy shapes that show that the code runs, and measure nothing of interest
    threads: int = 1
    folder: Path  # for the files of this row

    @property
    def tiny(self) -> bool:
        """Whether toy shapes are asked for."""
        return self.size == "tiny"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Benchmark case: two implementations of the same result, ready to be called in turn."""

    name: str
    kind: Literal["equal", "default", "record"]  # equal: same numerics; default: each side as shipped; record: no peer here
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    check: Callable[[], float]  # how far the two results are apart
    tolerance: float  # largest error with which the case counts
    error: str  # what `check` gives, in words
    per_call: float = 1  # units done by one call
    unit: str = "image"
    returned: Literal["", "seconds", "bytes"] = ""  # the calls measure themselves and return this; empty: they are timed
    published: float = 0.0  # units per second that others report for this work; 0: none
    notes: Mapping[str, Any] = field(default_factory=dict)  # for the record


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of the benchmark table."""

    id: str
    title: str
    peer: str
    goal: str
    where: Literal["cpu", "cuda", "any"]  # what it needs to mean anything; "any" follows --device
    seconds: float  # of one round of all its cases in size small: CPU time of one core, or wall time of one GPU
    prepare: str  # module:function of ldm.cli.benchmarks, from a Setup to Cases one by one
    needs: tuple[str, ...] = ("diffusers",)
    missing: str = ""  # why it cannot be run anywhere yet

    def why_not(self, device: str, size: Size) -> str:
        """Why the row cannot be run here; empty where it can."""
        if self.missing:
            return self.missing
        if self.where == "cuda" and device != "cuda" and size != "tiny":
            return "needs a CUDA GPU"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(absent)}, which is not installed" if absent else ""

    def cases(self, setup: Setup) -> Iterator[Case]:
        """The row's cases, each made when it is asked for."""
        module, _, function = self.prepare.partition(":")
        made: Iterator[Case] = getattr(importlib.import_module(f"ldm.cli.benchmarks.{module}"), function)(setup)
        return made


DIFFUSERS_LOOP = "diffusers' UNet2DConditionModel in the loop of its train_text_to_image.py"
PIPELINE = "diffusers' StableDiffusionPipeline"

ROWS = (
    Row(
        id="B1",
        title="UNet training step, cached latents, both fp32",
        peer=DIFFUSERS_LOOP,
        goal="1.10x",
        where="any",
        seconds=14,
        prepare="training:both_fp32",
    ),
    Row(
        id="B2",
        title="UNet training step, cached latents, both bf16 autocast",
        peer=DIFFUSERS_LOOP,
        goal="1.20x",
        where="any",
        seconds=10,
        prepare="training:both_bf16",
    ),
    Row(
        id="B3",
        title="UNet training step, cached latents, ours bf16, theirs fp32",
        peer=DIFFUSERS_LOOP,
        goal="1.75x",
        where="any",
        seconds=12,
        prepare="training:as_shipped",
    ),
    Row(
        id="B4",
        title="three epochs from JPEGs at 256 px, cache built on the way; and a later epoch",
        peer="the structure of diffusers' train_text_to_image.py",
        goal="3.5x; 8x",
        where="any",
        seconds=80,
        prepare="epoch:from_jpegs",
        needs=("diffusers", "datasets", "torchvision"),
    ),
    Row(
        id="B5",
        title="SD1.5 training at 512 px, both bf16, ours from cached latents, as it is and compiled",
        peer=DIFFUSERS_LOOP,
        goal="2.2x",
        where="cuda",
        seconds=16,
        prepare="training:sd1_online",
    ),
    Row(
        id="B6",
        title="SD2 UNet training step, batch 64, cached latents, 512 px",
        peer="MLPerf Training 4.0 on an H200 (published: 129.4 images/s)",
        goal="130 images/s",
        where="cuda",
        seconds=6,
        prepare="training:sd2_record",
    ),
    Row(
        id="B7",
        title="drawing one image, 50 DDIM steps with guidance",
        peer=PIPELINE,
        goal="1.10x; 1.6x",
        where="any",
        seconds=110,
        prepare="sampling:fifty_steps",
    ),
    Row(
        id="B8",
        title="the same with --backend openvino",
        peer=f"{PIPELINE}, and our own torch",
        goal="1.4x; 2.7x",
        where="cpu",
        seconds=150,
        prepare="sampling:on_openvino",
        needs=("diffusers", "openvino"),
    ),
    Row(
        id="B9",
        title="drawing one image, SD1.5 at 512 px, 50 DDIM steps, both bf16",
        peer=f"{PIPELINE}, eager and compiled",
        goal="3x; 1.1x",
        where="cuda",
        seconds=20,
        prepare="sampling:sd1",
    ),
    Row(
        id="B10",
        title="drawing 16 images at a time, SD2 at 512 px, 50 DDIM steps",
        peer="MLPerf Training 4.0's evaluation on an H200 (published: 3.45 images/s)",
        goal="3.6 images/s",
        where="cuda",
        seconds=20,
        prepare="sampling:sd2_record",
    ),
    Row(
        id="B11",
        title="VAE decode, f8 of Stable Diffusion's size",
        peer="diffusers' AutoencoderKL",
        goal="1.12x; 2.2x",
        where="any",
        seconds=8,
        prepare="autoencoders:decode",
    ),
    Row(
        id="B12",
        title="VAE encode, f8 of Stable Diffusion's size",
        peer="diffusers' AutoencoderKL",
        goal="1.05x; 2.15x",
        where="any",
        seconds=4,
        prepare="autoencoders:encode",
    ),
    Row(
        id="B13",
        title="autoencoder step with discriminator",
        peer="CompVis' two passes over diffusers' AutoencoderKL, written anew",
        goal="1.30x; 2.3x",
        where="any",
        seconds=16,
        prepare="autoencoders:adversarial",
    ),
    Row(
        id="B14",
        title="optimiser and moving average",
        peer="torch.optim.AdamW by default, diffusers' EMAModel",
        goal="3x",
        where="cpu",
        seconds=0.5,
        prepare="training:optimiser_and_ema",
    ),
    Row(
        id="B15",
        title="JPEG files to training batches, 256 and 512 px",
        peer="datasets with torchvision's transforms",
        goal="3x; 2.5x",
        where="cpu",
        seconds=4,
        prepare="loading:from_jpegs",
        needs=("datasets", "torchvision"),
    ),
    Row(
        id="B16",
        title="cached latents to training batches",
        peer="an Arrow column of datasets",
        goal="10x",
        where="cpu",
        seconds=2,
        prepare="loading:cached",
        needs=("datasets",),
    ),
    Row(
        id="B17",
        title="cold start: help, and a mistake in a configuration",
        peer=f"the import of {PIPELINE}",
        goal="40x",
        where="cpu",
        seconds=10,
        prepare="starting:words",
    ),
    Row(
        id="B18",
        title="cold start to the first call of the UNet",
        peer=f"{PIPELINE}.from_pretrained",
        goal="2.2x",
        where="cpu",
        seconds=12,
        prepare="starting:first_call",
    ),
    Row(
        id="B19",
        title="peak memory of drawing, SD1.5 at 512 px, bf16",
        peer=PIPELINE,
        goal="2.4 GB",
        where="cuda",
        seconds=60,
        prepare="starting:memory_of_drawing",
    ),
    Row(
        id="B20",
        title="peak memory of training, SD1.5 at 512 px, batch 1, ours with offload",
        peer=f"{DIFFUSERS_LOOP} (published with 8-bit Adam: 9.92 GB)",
        goal="7.5 GB",
        where="cuda",
        seconds=60,
        prepare="starting:memory_of_training",
    ),
    Row(
        id="B21",
        title="training's stall for a checkpoint that is written beside it",
        peer="the same save while training waits",
        goal="20x: a stall of 5 %",
        where="any",
        seconds=2,
        prepare="saving:beside",
        needs=(),
    ),
    Row(
        id="B22",
        title="images a second of two processes, one thread each",
        peer="one of them alone",
        goal="1.8x: 0.9 of each",
        where="cpu",
        seconds=20,
        prepare="scaling:two_processes",
        needs=(),
    ),
    Row(
        id="B23",
        title="token transformer: forward and backward",
        peer="diffusers' UVit2DModel with the same weights",
        goal="1.5x",
        where="any",
        seconds=4,
        prepare="codes:step",
    ),
    Row(
        id="B24",
        title="pictures by codes, 8 masked steps with guidance",
        peer="diffusers' AmusedPipeline with the same weights",
        goal="1.5x",
        where="any",
        seconds=6,
        prepare="codes:drawing",
    ),
    Row(
        id="B25",
        title="a picture of each family, text encoder and decoder included",
        peer="none: the families beside each other",
        goal="one pass 3 ms, masked 8 ms, causal 12 ms",
        where="any",
        seconds=6,
        prepare="pictures:each",
        needs=(),
    ),
    Row(
        id="B26",
        title="UNet training step, cached latents, beside a tuned loop: both fp32, both bf16",
        peer="diffusers' UNet2DConditionModel in a loop with fused AdamW, averages in one call and no look at the loss",
        goal="1.15x; 1.6x",
        where="any",
        seconds=24,
        prepare="training:tuned",
    ),
)
