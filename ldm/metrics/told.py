"""Agreement of pictures with the views that a model was told: the same view taken of what it drew."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.dataset import asked as viewed
from ldm.data.scenes.checker import read
from ldm.data.scenes.source import Scenes
from ldm.data.views import ANY, ViewKind, from_picture, parted
from ldm.diffusion.batch import View
from ldm.diffusion.rng import Rng
from ldm.metrics import adherence
from ldm.metrics.bench import Bench, Values, floats


def error(drawn: Tensor, name: str, told: View, kind: ViewKind) -> float | None:
    """Mean absolute difference, in [0,1], of a view of drawn pictures (N,H,W,3) uint8 and the one that was told; None where a drawn
    picture tells no such view.

    Of classes with colours it is the share of pixels of another class, each read as the class whose colour it is nearest to in hue and
    saturation, or among greys in brightness.
    """
    if not isinstance(told, Tensor):
        return None
    image = drawn.permute(0, 3, 1, 2)
    if kind.form == "classes":
        return _misread(image, told, kind) if kind.colours else None
    if parted(name)[0] not in ANY or parted(name)[0] == "sketch" or kind.form == "embedding":
        return None
    again = from_picture([name], image, Rng(0, range(len(image))))[name]
    assert isinstance(again, Tensor)
    return float((again.float() / 255 - told.float()).abs().mean())


def _misread(image: Tensor, told: Tensor, kind: ViewKind) -> float:
    """Share of pixels of known class that are read as another one."""
    own = _chroma(torch.tensor(kind.colours).float().T[None, :, :, None])  # (1,3,K,1)
    seen = _chroma(image.float())
    away = torch.stack([(seen - own[:, :, k : k + 1]).square().sum(1) for k in range(kind.channels)], 1)  # (N,K,H,W)
    read, known = away.argmin(1), told[:, 0] >= 0
    return float(((read != told[:, 0]) & known).sum() / known.sum().clamp(min=1))


def _chroma(rgb: Tensor) -> Tensor:
    """Two numbers of colour, which brightness scales out of, and little of brightness itself: (N,3,H,W) of RGB in 0..255."""
    mean = rgb.mean(1, keepdim=True)
    most = rgb.amax(1, keepdim=True).clamp(min=1)
    return torch.cat([(rgb[:, :2] - mean) / most, 0.1 * mean / 255], 1)


def bits(colour: NDArray[np.int64]) -> float:
    """Entropy of colours (n,), in bits."""
    _, counts = np.unique(colour, return_counts=True)
    shares = counts / counts.sum() if len(counts) else np.zeros(0)
    return float(-(shares * np.log2(shares)).sum())


@config
class ToldViews:
    """Whether pictures agree with the views that the model is told of validation images: the same views taken of what it draws.

    On scenes also what the checker reads, and the entropy of colours, which tells whether a model that is told no colour varies it.
    """

    kind: Literal["told"] = "told"
    images: Positive = 64  # validation images whose views are told
    views: tuple[str, ...] = ()  # those that are told; none: all that the model reads
    captions: bool = True  # tell the images' captions, too
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result; what the checker reads only on scenes."""
        return ("error", *(f"errors.{view}" for view in self.views), *((*adherence.METRICS, "colour_bits") if scenes else ()))

    def run(self, bench: Bench) -> Values:
        """The mean difference of views told and drawn, by view."""
        reads = bench.model.told
        views = self.views or tuple(reads)
        if not reads:
            raise UserError("told: this model reads no views of pictures; leave it out")
        if unknown := [view for view in views if view not in reads]:
            raise UserError(f"told: {', '.join(unknown)} is no view that this model reads; it reads {', '.join(reads)}")
        if bench.data is None:
            raise UserError("told: needs images whose views are told: give --on scenes or --on folder")
        real = replace(bench, data=viewed(bench.data, views)).real(self.images)
        many, side = len(real.image), bench.resolution
        wanted, captions = bench.wanted(self), real.caption if self.captions else ("",) * many
        edits = bench.model.tell(real.views, {}, (side, side))
        seeds = [self.seed * 1_000_003 + i for i in range(many)]

        def on_step(done: int, total: int) -> None:
            bench.progress(done, total, "told")

        images = bench.model.sample(captions, seeds, wanted, size=(side, side), edits=edits, on_step=on_step)
        each = {view: error(images, view, real.views[view], reads[view]) for view in views}
        errors = {view: round(value, 5) for view, value in each.items() if value is not None}
        found: Values = {"error": round(sum(errors.values()) / len(errors), 5)} if errors else {}
        if isinstance(bench.data, Scenes):
            reading = read(images.numpy())
            scores = adherence.grade(reading, bench.data.targets(range(many)))
            found |= {name: round(value.mean, 4) for name, value in adherence.summary(scores).items()}
            found["colour_bits"] = round(bits(reading.colour), 3)
        bench.show("told", torch.stack([real.image[:16], floats(images[:16])], 1).flatten(0, 1), 8, captions[:16])
        protocol = {"images": many, "views": list(views), "captions": self.captions, "resolution": side, **bench.used(wanted)}
        return {**found, "errors": errors, "protocol": protocol}
