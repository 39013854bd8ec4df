"""Nearest training neighbours of drawn pictures: what tells whether a model copies."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.metrics.bench import Bench, Values, floats
from ldm.metrics.extractors import BATCH, Features, RandomFeatures, nearest


@config
class Neighbours:
    """Nearest training pictures of what a model draws, beside those of held-out pictures: copies are nearer than any of these."""

    kind: Literal["neighbours"] = "neighbours"
    images: Positive = 32  # pictures, of validation captions, and as many held-out ones beside them
    nearest: Positive = 3  # training pictures of each
    among: Count = 0  # of how many training pictures, spread evenly; 0: all
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures
    features: Features = RandomFeatures()  # what pictures are compared by

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("distance", "held_out", "closest", "closest_held_out", "closer")

    def check_weights(self) -> None:
        """Raises UserError for weights that are not here."""
        self.features.check()

    def run(self, bench: Bench) -> Values:
        """Median and least cosine distance to the nearest training picture, of drawn and of held-out pictures, and every row.

        `closer` is the share of drawn pictures that are nearer to one than all but 5 % of the held-out pictures are.
        """
        if bench.train is None or not len(bench.train):
            raise UserError("neighbours: there are no training pictures to look among")
        extractor, real = self.features.load(bench.device), bench.real(self.images)
        many, train = len(real.image), bench.train
        if not many:
            return {"skipped": "no validation images; neighbours need some"}
        wanted = bench.wanted(self)
        images = floats(bench.draw(real.caption, self.seed, wanted, "neighbours"))
        side = images.shape[2]
        count = min(self.among or len(train), len(train))
        places = [i * len(train) // count for i in range(count)]
        found = []
        for start in range(0, count, BATCH):
            part = places[start : start + BATCH]
            found.append(extractor.features(train.load(part, part, side, 0, False).image))
            bench.progress(start + len(part), count, "neighbours: training pictures")
        learned = np.concatenate(found)
        index, far = nearest(extractor.features(images), learned, self.nearest)
        beside = nearest(extractor.features(real.image), learned)[1][:, 0]
        rows = []
        shown = []
        for i in range(many):
            samples = [places[k] for k in index[i]]
            rows.append({"caption": real.caption[i], "samples": samples, "distances": [round(float(d), 5) for d in far[i]]})
            shown += [images[i : i + 1].cpu(), train.load(samples, samples, side, 0, False).image]
        bench.show(f"neighbours-{side}", torch.cat(shown), 1 + index.shape[1], real.caption)
        protocol = {"images": many, "among": count, **bench.used(wanted)}
        values = {
            "distance": float(np.median(far[:, 0])),
            "held_out": float(np.median(beside)),
            "closest": float(far[:, 0].min()),
            "closest_held_out": float(beside.min()),
            "closer": float((far[:, 0] < np.quantile(beside, 0.05)).mean()),
        }
        return {**{k: round(v, 5) for k, v in values.items()}, "nearest": rows, "protocol": {**protocol, **extractor.protocol}}
