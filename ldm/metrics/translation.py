"""How well translated scenes show what they were drawn of: label overlap, content and style by the exact checker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ldm.config.schema import Positive, config
from ldm.data.dataset import DataSet
from ldm.data.scenes.checker import read
from ldm.data.scenes.render import to_bytes
from ldm.data.scenes.source import Scenes
from ldm.data.scenes.spec import COLOUR_RGB, TONE_RGB
from ldm.data.unpaired import OTHER, Unpaired
from ldm.diffusion.batch import rows
from ldm.metrics import adherence, frechet
from ldm.metrics.bench import Bench, Values
from ldm.metrics.extractors import Features, RandomFeatures
from ldm.metrics.reconstruction import psnr

SHADE = (0.6, 1.15)  # of a class' colour, as light and texture make it darker or brighter


def held_out(data: DataSet | None, views: tuple[str, ...]) -> DataSet | None:
    """Scenes with the colour-shape pairs that training never shows, with their views; None where there are none such."""
    if not isinstance(data, Scenes) or data.source.pairs:
        return None
    other: Any = Scenes(replace(data.source, certified=True), "held-out")  # type: ignore[arg-type]
    return other.with_views(views)  # type: ignore[no-any-return]


def classes(images: Tensor) -> Tensor:
    """The class of `ldm.data.scenes.views.CLASSES` that each pixel of pictures (N,3,H,W) in [0,1] is nearest to, at any shade, (N,H,W)."""
    colours = torch.tensor(np.concatenate([TONE_RGB, COLOUR_RGB]))
    pixels = images.permute(0, 2, 3, 1)[..., None, :]
    shade = ((pixels * colours).sum(-1) / colours.square().sum(-1)).clamp(*SHADE)[..., None]
    return (pixels - shade * colours).square().sum(-1).argmin(-1)


def label_overlap(images: Tensor, labels: Tensor) -> float:
    """Intersection over union of the objects' classes, all pixels together, of pictures (N,3,H,W) in [0,1] and labels (N,1,H,W)."""
    found, wanted = classes(images), labels[:, 0].long()
    objects = range(len(TONE_RGB), len(TONE_RGB) + len(COLOUR_RGB))
    both = sum(int(((found == c) & (wanted == c)).sum()) for c in objects)
    either = sum(int(((found == c) | (wanted == c)).sum()) for c in objects)
    return both / max(either, 1)


def shown(images: Tensor, data: DataSet, count: int) -> Mapping[str, float]:
    """What the checker says of pictures (N,3,H,W) in [0,1] drawn of the first scenes; nothing where the data are no scenes.

    Of unpaired domains the objects must be those of the first, tone and texture those of the second.
    """
    index = list(range(count))
    if isinstance(data, Scenes):
        targets = data.targets(index)
    elif isinstance(data, Unpaired) and isinstance(data.a, Scenes) and isinstance(data.b, Scenes):
        style = data.b.specs([0])
        tone, texture = int(style.tone[0]), int(style.texture[0])
        targets = [replace(target, tone=tone, texture=texture) for target in data.a.targets(index)]
    else:
        return {}
    scores = adherence.grade(read(to_bytes(images.numpy())), targets)
    return {name: round(value.mean, 4) for name, value in adherence.summary(scores).items()}


@config
class Translation:
    """How well translated pictures show what they were drawn of.

    PSNR, mean |difference| of pairs, Fréchet distance from true pictures; on scenes the overlap of objects' labels and what the checker
    reads, of pairs seen in training and of held-out ones. Of unpaired scenes `bind` is the content kept, `bg` the style reached.
    """

    kind: Literal["translation"] = "translation"
    images: Positive = 100  # validation images
    features: Features = RandomFeatures()  # what pictures are compared by

    asks = "translate"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        of_scenes = (*adherence.METRICS, "label_iou", "held_out.bind", "held_out.label_iou")
        return ("psnr", "l1", "frechet", "real_real_floor", *(of_scenes if scenes else ()))

    def check_weights(self) -> None:
        """Raises UserError for weights that are not here."""
        self.features.check()

    def run(self, bench: Bench) -> Values:
        """Means over validation images, and over scenes with held-out pairs."""
        real = bench.real(self.images)
        found, made = self._compared(bench, bench.data, real, "translation")
        extractor, half = self.features.load(bench.device), len(real.image) // 2
        true = real.image if bench.model.paired else 2 * real.views[OTHER] - 1
        if half > 1:
            sets = [extractor.features(x) for x in (true[:half], true[half : 2 * half], made[:half])]
            a, b, c = frechet.standardise(*sets) if isinstance(self.features, RandomFeatures) else sets
            found |= {"frechet": round(frechet.distance(b, c), 3), "real_real_floor": round(frechet.distance(a, b), 3)}
        other = held_out(bench.data, bench.model.views)
        if other is not None:
            count = min(self.images, len(other))
            batch = other.load(list(range(count)), list(range(count)), bench.resolution, 0, False)
            found["held_out"] = self._compared(bench, other, batch, "translation-held-out")[0]
        return {**found, "protocol": {"images": len(real.image), "resolution": bench.resolution, **extractor.protocol}}

    def _compared(self, bench: Bench, data: Any, batch: Any, name: str) -> tuple[Values, Tensor]:
        with torch.no_grad():
            made = bench.model.translate(batch.to(bench.device)).cpu().float()
            bench.show(name, bench.model.preview(rows(batch, 0, 24).to(bench.device), 0).cpu(), bench.model.preview_columns)
        a, b = (made + 1) / 2, (batch.image + 1) / 2
        found: Values = {}
        if bench.model.paired:
            found = {"psnr": round(float(psnr(a, b).clamp(max=100).mean()), 3), "l1": round(float((a - b).abs().mean()), 5)}
        if isinstance(data, Scenes):
            index = list(range(len(a)))
            labels = data.with_views(("labels",)).load(index, index, bench.resolution, 0, False).views
            assert labels is not None
            found["label_iou"] = round(label_overlap(a, labels["labels"]), 4)  # type: ignore[arg-type]
        return found | dict(shown(a, data, len(a))), made
