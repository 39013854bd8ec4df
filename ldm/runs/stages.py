"""The kinds of stages besides training: cached latents, evaluation, export."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from ldm.config.schema import BY_KIND, Count, Positive, config, plain
from ldm.data.buckets import Buckets
from ldm.data.filter import Filter
from ldm.metrics.evaluator import Evaluator
from ldm.training.settings import Train


@config
class Encode:
    """A stage that encodes the data once, so that diffusion reads latents instead of images."""

    kind: Literal["encode"] = "encode"
    resolution: Positive  # px, height and width
    batch: Positive = 64  # images per call of the encoder
    images: Count = 0  # how many; 0: all that pass the filter
    filter: Filter = Filter()  # which samples are encoded
    flip: bool = False  # keep mirrored latents too, for training with flip (twice the size)
    buckets: Buckets | None = None  # pictures in shapes near their own, as the stages that read them say; null: squares

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        unsaid = {"batch"} | ({"filter"} if self.filter == Filter() else set()) | (set() if self.buckets else {"buckets"})
        return {name: value for name, value in plain(self).items() if name not in unsaid}


@config
class Evaluate:
    """A stage that measures the autoencoder, or the whole model as it would be exported."""

    kind: Literal["evaluate"] = "evaluate"
    of: str  # the training stage whose result is measured
    metrics: tuple[Evaluator, ...]  # what is measured
    require: dict[str, float] = field(default_factory=dict)  # least values by name, such as reconstruction.bind: 0.97
    on_miss: Literal["stop", "warn"] = "stop"  # when a required value is not reached

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        return plain(self)


@config
class Export:
    """A stage that assembles the finished model: a diffusers pipeline folder with a model card, at RUN/model."""

    kind: Literal["export"] = "export"
    of: str = ""  # the diffusion stage that is exported; empty: the latest

    def identity(self) -> dict[str, Any]:
        """What the result depends on."""
        return plain(self)


Stage = Annotated[Train | Encode | Evaluate | Export, BY_KIND]
