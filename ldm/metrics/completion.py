"""Completion: whether a picture of which the upper half is shown is completed to the scene that it is of."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.pictures import to_uint8
from ldm.data.scenes.geometry import HALF_HEIGHT
from ldm.data.scenes.source import Scenes
from ldm.data.scenes.spec import Specs
from ldm.metrics import adherence
from ldm.metrics.bench import Bench, Values, floats

LEAST = 0.25  # share of an object's height that must be shown for its facts to be known


def hidden(height: int, width: int) -> Tensor:
    """True (1,H,W) in the lower half."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, height // 2 :] = True
    return mask


def shown(specs: Specs) -> NDArray[np.float64]:
    """The share (N,K) of each object's height that lies in the upper half, 1 where there is no object."""
    half = HALF_HEIGHT[specs.shape] * specs.side
    return np.where(specs.shape >= 0, np.clip((0.5 - specs.y + half) / np.maximum(2 * half, 1e-9), 0, 1), 1.0)


def tellable(specs: Specs) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Scenes (N,) whose objects are all shown at least in part, and those of them that the border cuts at least one of."""
    share = shown(specs)
    told, cut = np.asarray((share >= LEAST).all(1)), np.asarray((share <= 1 - LEAST).any(1))
    return told, told & cut


def error(made: Tensor, true: Tensor) -> float:
    """PSNR, dB, of the lower half of pictures (N,H,W,3) uint8."""
    low = made.shape[1] // 2
    away = (made[:, low:].double() - true[:, low:].double()).square().mean() / 255**2
    return float(-10 * torch.log10(away.clamp_min(1e-10)))


@config
class Completion:
    """Whether pictures of held-out images are completed of their upper half alone: what is right of a scene that the half tells.

    Of scenes those count of whose objects a quarter of the height at least is shown; `cut` is `bind` of those of which as much is hidden,
    and `grey` the same where the lower half is filled with grey.
    """

    kind: Literal["completion"] = "completion"
    images: Positive = 200  # validation images
    caption: Literal["empty", "whole"] = "empty"  # what a model that reads prompts is told besides
    guidance: NonNegative = 0.0  # 0: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of pictures

    asks = "complete"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result; what the checker reads only on scenes."""
        return ("psnr", *(("bind", "colour", "shape", "cell", "count", "bg", "cut", "grey") if scenes else ()))

    def run(self, bench: Bench) -> Values:
        """PSNR of the hidden half, and means over scenes."""
        size, wanted = bench.model.defaults["size"], bench.wanted(self)
        real = replace(bench, resolution=size[0]).real(self.images)
        true = to_uint8(real.image)
        count, mask = len(true), hidden(size[0], size[1])
        captions = list(real.caption) if self.caption == "whole" else [""] * count
        made = bench.model.sample(
            captions,
            [self.seed * 1_000_003 + i for i in range(count)],
            wanted,
            size=size,
            edits=bench.model.edits(true, mask),
            on_step=lambda done, total: bench.progress(done, total, "completion"),
        )
        bench.show("completion", floats(torch.stack([torch.where(mask[..., None], 128, true), made], 1).flatten(0, 1)[:64]), 8)
        found: Values = {"psnr": round(error(made, true), 3)}
        counted = {}
        if isinstance(bench.data, Scenes):
            index = np.arange(count)
            told, cut = tellable(bench.data.specs(index))
            grey = torch.where(mask[..., None], 128, true).to(torch.uint8)
            for name, images, rows in (("", made, told), ("cut", made, cut), ("grey", grey, cut)):
                if not rows.any():
                    raise UserError(f"completion: none of {count} scenes can be told of its upper half; give it more images")
                scores = adherence.summary(adherence.score(images[rows].numpy(), bench.data.targets(index[rows].tolist())))
                if name:
                    found[name] = round(scores["bind"].mean, 4)
                else:
                    found |= {one: round(scores[one].mean, 4) for one in self.names(True) if one in scores}
            counted = {"told": int(told.sum()), "cut": int(cut.sum())}
        return {**found, "protocol": {"images": count, "caption": self.caption, "seed": self.seed, **counted} | bench.used(wanted)}
