"""How far pictures of scenes show what views told: objects in their boxes, and pixels of their class."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.scenes.captions import Target, say
from ldm.data.scenes.checker import WORK, Reading, colours, read
from ldm.data.scenes.geometry import HALF_HEIGHT, HALF_WIDTH
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import TONES, Specs, TierName
from ldm.data.scenes.views import KINDS, SceneViews
from ldm.data.views import from_picture, parted
from ldm.diffusion.batch import View
from ldm.diffusion.rng import Rng
from ldm.metrics import adherence
from ldm.metrics.bench import Bench, Values, floats

FOUND = 0.5  # overlap of a box from which on its object counts as found


def exact(specs: Specs, names: tuple[str, ...], resolution: int, seed: int) -> dict[str, View]:
    """Views of scenes, exact ones or what any picture gives, maps in [0,1]; noise in them is addressed by the scenes' order."""
    rolled = Specs(**{name: np.roll(getattr(specs, name), 1, axis=0) for name in Specs.__dataclass_fields__})
    source = SceneViews(specs, lambda: rolled, resolution, Rng(seed, range(len(specs))))
    found = {name: source.view(name) for name in names if parted(name)[0] in KINDS}
    if others := [name for name in names if name not in found]:
        pictures = torch.from_numpy(to_bytes(render(specs, resolution))).permute(0, 3, 1, 2)
        found |= from_picture(others, pictures, Rng(seed, range(len(specs))))
    return {name: v.float() / 255 if isinstance(v, torch.Tensor) and v.dtype == torch.uint8 else v for name, v in found.items()}


def grounded(specs: Specs, reading: Reading) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each scene's picture (N,): the share of objects that are found, in their boxes with their colour and shape; the mean overlap.

    Every object is compared with the one that was read of the same colour and shape and covers its box best; where there is none
    the overlap is 0. An object is found where it is FOUND or more.
    """
    recall, overlap = np.zeros(len(specs)), np.zeros(len(specs))
    for i in range(len(specs)):
        at, there = reading.objects(i), np.flatnonzero(specs.shape[i] >= 0)
        read = [_box(reading.x[k], reading.y[k], reading.side[k], reading.shape[k]) for k in range(at.start, at.stop)]
        shares = []
        for k in there:
            own = _box(specs.x[i, k], specs.y[i, k], specs.side[i, k], specs.shape[i, k])
            like = (reading.colour[at] == specs.colour[i, k]) & (reading.shape[at] == specs.shape[i, k])
            shares.append(max((iou(own, box) for box, same in zip(read, like, strict=True) if same), default=0.0))
        recall[i], overlap[i] = np.mean([share >= FOUND for share in shares]), np.mean(shares)
    return recall, overlap


def labelled(images: NDArray, labels: NDArray) -> float:
    """Intersection over union of the objects' pixels by colour, over all pictures.

    Args:
        images: (N,H,W,3).
        labels: (N,1,h,w) class numbers, as `ldm.data.scenes.views.CLASSES` has them, of the size that pictures are read in.
    """
    told, seen = labels[:, 0] - len(TONES), colours(images)
    return float(((told >= 0) & (told == seen)).sum() / max(1, ((told >= 0) | (seen >= 0)).sum()))


def _box(x: float, y: float, side: float, shape: int) -> tuple[float, float, float, float]:
    wide, high = HALF_WIDTH[shape] * side, HALF_HEIGHT[shape] * side
    return x - wide, y - high, x + wide, y + high


def iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    wide, high = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return wide * high / max(sum(areas) - wide * high, 1e-12)


@config
class Grounding:
    """Whether pictures of scenes show what views tell, read by the exact checker; nothing else need say it."""

    kind: Literal["grounding"] = "grounding"
    tier: TierName  # whose scenes
    prompts: Positive = 100  # with colour-shape pairs seen in training, and as many with held-out pairs
    views: tuple[str, ...] = ()  # that are told; none: all that the model reads and the scenes have
    caption: Literal["whole", "placeless", "empty"] = "placeless"  # all of it; without places and relations; nothing
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of prompts and pictures

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return tuple(f"{pairs}.{name}" for pairs in ("seen", "held_out") for name in ("recall", "overlap", "labels", *adherence.METRICS))

    def run(self, bench: Bench) -> Values:
        """Objects found in their boxes (recall), mean overlap of boxes, overlap of labels, and adherence."""
        names = self.views or tuple(name for name in bench.model.told if name.partition(":")[0] in KINDS)
        wanted, size = bench.wanted(self), bench.model.defaults["size"]
        found: Values = {}
        for pairs in ("seen", "held-out"):
            asked = prompts(self.tier, self.prompts, self.seed, pairs)
            seeds = [self.seed * 1_000_003 + i for i in range(len(asked))]
            edits = bench.model.tell(exact(asked.specs, names, size[0], self.seed), {}, size) if names else ()
            texts = [less(text, target, self.caption) for text, target in zip(asked.text, asked.targets, strict=True)]
            images = bench.model.sample(texts, seeds, wanted, edits=edits, on_step=lambda i, n, pairs=pairs: bench.progress(i, n, pairs))
            reading = read(images.numpy())
            recall, overlap = grounded(asked.specs, reading)
            labels = exact(asked.specs, ("labels",), min(size[0], WORK), self.seed)["labels"]
            scores = adherence.summary(adherence.grade(reading, asked.targets))
            found[pairs.replace("-", "_")] = {
                "recall": round(float(recall.mean()), 4),
                "overlap": round(float(overlap.mean()), 4),
                "labels": round(labelled(images.numpy(), np.asarray(labels)), 4),
                **{name: round(value.mean, 4) for name, value in scores.items()},
            }
            bench.show(f"grounding-{pairs}", floats(images[:32]), 8, texts[:32])
        protocol = {"tier": self.tier, "prompts": self.prompts, "views": list(names), "caption": self.caption, "seed": self.seed}
        return {**found, "protocol": protocol | bench.used(wanted)}


def less(text: str, target: Target, caption: str) -> str:
    """A caption, without places and relations or empty where that is asked."""
    if caption == "whole":
        return text
    silent = tuple(replace(phrase, cell=-1) for phrase in target.phrases)
    return "" if caption == "empty" else say(replace(target, phrases=silent, relation=-1))
