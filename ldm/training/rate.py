"""Learning rate: warm-up and schedule as a pure function of progress in images."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, NonNegative, Positive, PositiveFloat, config, refuse_unread

Schedule = Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"]


@config
class Rate:
    """What every optimiser has: how its rate changes, and what its gradients are limited to."""

    needs_whole: ClassVar[str] = ""  # why it cannot train sharded weights (FSDP2); empty: it can
    package: ClassVar[tuple[str, str]] = ("", "")  # what it is taken from: its import and its distribution; empty: torch or ldm
    state_bytes: ClassVar[float] = 8.0  # of its state, for each parameter
    warmup_images: Count = 0  # the rate rises linearly over so many images
    schedule: Schedule = "constant"  # after the warm-up, to final_lr at the stage's end
    cycles: Positive | None = None  # of cosine_restarts: how often the rate falls from its peak
    power: PositiveFloat | None = None  # of polynomial: 1 falls linearly, more sooner
    decay_from: Fraction = 0.0  # share of the stage after which the rate begins to fall
    final_lr: Fraction = 0.0  # rate at the stage's end, as a share of the peak
    clip: NonNegative = 1.0  # gradient norm limit of each parameter group; 0: none

    def __post_init__(self) -> None:
        for name, schedule in (("cycles", "cosine_restarts"), ("power", "polynomial")):
            if (getattr(self, name) is not None) != (self.schedule == schedule):
                given = "has no effect" if getattr(self, name) is not None else "is needed"
                raise UserError(f"{name}: {given} with schedule {self.schedule}; it is of {schedule}")
        if self.schedule == "constant":
            refuse_unread(
                self, ("decay_from", "final_lr"), "with schedule constant, which never falls; leave it out, or set schedule=linear"
            )


def lr_factor(rate: Rate, images: int, total_images: int) -> float:
    """The learning rate after `images` of `total_images`, as a share of the peak.

    With f the share that is left of the way to `final_lr` and p the progress in [0,1] after the warm-up: linear 1 - p, cosine
    (1 + cos(pi p)) / 2 (Loshchilov and Hutter 2017, arXiv 1608.03983), cosine_restarts the same of the fraction of cycles * p,
    polynomial (1 - p)^power.
    """
    if images < rate.warmup_images:
        return (images + 1) / (rate.warmup_images + 1)
    start = max(rate.warmup_images, rate.decay_from * total_images)
    if rate.schedule == "constant" or images <= start:
        return 1.0
    done = min(1.0, (images - start) / max(1.0, total_images - start))
    if rate.schedule == "linear":
        left = 1 - done
    elif rate.schedule == "polynomial":
        left = (1 - done) ** (rate.power or 1.0)
    else:
        turn = done if rate.schedule == "cosine" else (done * (rate.cycles or 1)) % 1.0 if done < 1 else 1.0
        left = 0.5 * (1 + math.cos(math.pi * turn))
    return rate.final_lr + (1 - rate.final_lr) * left
