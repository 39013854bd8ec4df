"""How well translated scenes show what they were drawn of: label overlap, content and style by the exact checker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.dataset import DataSet
from ldm.data.scenes.checker import read
from ldm.data.scenes.render import to_bytes
from ldm.data.scenes.source import Scenes
from ldm.data.scenes.spec import COLOUR_RGB, TONE_RGB
from ldm.data.unpaired import Unpaired
from ldm.metrics import adherence

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
