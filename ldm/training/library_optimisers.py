"""Optimisers of kept libraries: Adafactor, Lion, Prodigy, schedule-free AdamW, 8-bit AdamW, imported when a stage asks for them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch

from ldm.config.errors import UserError
from ldm.config.schema import Decay, NonNegative, PositiveFloat, Share, config
from ldm.training.rate import Rate

Groups = Sequence[list[dict[str, Any]]]  # torch's parameter groups, by who learns
EXTRA = "pip install 'ldm-train[optimisers]'"
WHOLE = "is of a library that takes whole weights"


@config
class Adafactor(Rate):
    """Second moments kept as sums of rows and columns (Shazeer and Stern 2018, arXiv 1804.04235), torch's own."""

    needs_whole: ClassVar[str] = "keeps sums over the rows and columns of whole matrices"
    state_bytes: ClassVar[float] = 0.1
    kind: Literal["adafactor"] = "adafactor"
    lr: PositiveFloat = 1e-3  # peak rate, times the root mean square of each matrix
    weight_decay: NonNegative = 0.0  # of matrices and convolutions

    def made(self, groups: Groups) -> list[torch.optim.Optimizer]:
        """The optimiser of all groups."""
        return [torch.optim.Adafactor([one for each in groups for one in each], lr=self.lr)]


@config
class Lion(Rate):
    """The sign of an interpolated momentum (Chen 2023, arXiv 2302.06675), of lion-pytorch."""

    needs_whole: ClassVar[str] = WHOLE
    package: ClassVar[tuple[str, str]] = ("lion_pytorch", "lion-pytorch")
    state_bytes: ClassVar[float] = 4.0
    kind: Literal["lion"] = "lion"
    lr: PositiveFloat = 1e-5  # peak rate; a third to a tenth of AdamW's
    betas: tuple[Decay, Decay] = (0.9, 0.99)  # of the update and of the momentum
    weight_decay: NonNegative = 0.1  # of matrices and convolutions; three to ten times AdamW's

    def made(self, groups: Groups) -> list[torch.optim.Optimizer]:
        """The optimiser of all groups."""
        return [imported(self).Lion([one for each in groups for one in each], lr=self.lr, betas=self.betas)]


@config
class Prodigy(Rate):
    """AdamW that estimates its own rate from the way that the weights have come (Mishchenko 2023, arXiv 2306.06101), of prodigyopt."""

    needs_whole: ClassVar[str] = "estimates its rate from sums over all weights"
    package: ClassVar[tuple[str, str]] = ("prodigyopt", "prodigyopt")
    state_bytes: ClassVar[float] = 16.0
    kind: Literal["prodigy"] = "prodigy"
    lr: PositiveFloat = 1.0  # times the estimated rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay of the first and second moment
    weight_decay: NonNegative = 0.01  # of matrices and convolutions
    d_coef: PositiveFloat = 1.0  # times the estimate
    bias_correction: bool = False  # of the moments, as Adam has it
    safeguard_warmup: bool = False  # leave the rate out of the estimate, for a long warm-up

    def made(self, groups: Groups) -> list[torch.optim.Optimizer]:
        """An optimiser for each who learns: one estimate holds for one rate."""
        more = {"d_coef": self.d_coef, "use_bias_correction": self.bias_correction, "safeguard_warmup": self.safeguard_warmup}
        return [imported(self).Prodigy(each, lr=self.lr, betas=self.betas, **more) for each in groups if each]


@config
class ScheduleFree(Rate):
    """AdamW that averages its iterates instead of lowering its rate (Defazio 2024, arXiv 2405.15682), of schedulefree.

    What is sampled and saved are the averaged weights.
    """

    needs_whole: ClassVar[str] = WHOLE
    package: ClassVar[tuple[str, str]] = ("schedulefree", "schedulefree")
    kind: Literal["schedule_free"] = "schedule_free"
    lr: PositiveFloat = 1e-3  # rate
    betas: tuple[Share, Decay] = (0.9, 0.999)  # share of the average in the iterate; decay of the second moment
    weight_decay: NonNegative = 0.01  # of matrices and convolutions

    def __post_init__(self) -> None:
        Rate.__post_init__(self)
        if self.schedule != "constant":
            raise UserError(f"schedule: {self.schedule}, but schedule_free has none; leave it out")

    def made(self, groups: Groups) -> list[torch.optim.Optimizer]:
        """The optimiser of all groups, ready to train."""
        made = imported(self).AdamWScheduleFree([one for each in groups for one in each], lr=self.lr, betas=self.betas)
        made.train()
        return [made]


@config
class AdamW8bit(Rate):
    """AdamW with moments of 8 bits (Dettmers 2022, arXiv 2110.02861), of bitsandbytes; tensors below 4096 values keep 32 bits."""

    needs_whole: ClassVar[str] = WHOLE
    package: ClassVar[tuple[str, str]] = ("bitsandbytes", "bitsandbytes")
    state_bytes: ClassVar[float] = 2.04
    kind: Literal["adamw_8bit"] = "adamw_8bit"
    lr: PositiveFloat = 1e-4  # peak learning rate
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # decay of the first and second moment
    weight_decay: NonNegative = 0.01  # of matrices and convolutions; biases and norms have none

    def made(self, groups: Groups) -> list[torch.optim.Optimizer]:
        """The optimiser of all groups."""
        return [imported(self).optim.AdamW8bit([one for each in groups for one in each], lr=self.lr, betas=self.betas)]


def imported(optim: Rate) -> Any:
    """The library of an optimiser.

    Raises:
        UserError: naming what is missing.
    """
    module, distribution = optim.package
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"optim.kind: needs the package {distribution}, which is not installed here; {EXTRA}") from None


@contextmanager
def evaluated(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Within it the weights of schedule-free optimisers are their averages; afterwards their own again, bit for bit."""
    own: Any = [optimizer for optimizer in optimizers if all("train_mode" in group for group in optimizer.param_groups)]
    held = [p for optimizer in own for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in held]
    for optimizer in own:
        optimizer.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(held, kept, strict=True):
                p.copy_(value)
        for optimizer in own:
            for group in optimizer.param_groups:
                group["train_mode"] = True
