"""Diversity of pictures of one prompt, which mode collapse lessens, beside that of true pictures of which the prompt says the same."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import ScenePrompts, prompts
from ldm.data.scenes.spec import Specs, draw_specs
from ldm.metrics.bench import Bench, Values, floats

AT_FIRST = 1024  # scenes that are drawn in search of some that have the facts


def spread(images: NDArray[np.uint8]) -> float:
    """Mean |difference|, of values in [0,1], of two of the pictures (P,K,H,W,3) of one prompt, over pairs and prompts."""
    prompts, many = images.shape[:2]
    values = images.reshape(prompts, many, -1).astype(np.float32) / 255
    first, second = np.triu_indices(many, 1)
    return float(np.mean([np.abs(own[first] - own[second]).mean() for own in values]))


def alike(asked: ScenePrompts, tier: str, many: int, size: int) -> NDArray[np.uint8]:
    """True pictures (P,K,size,size,3) of scenes of one object that have the facts of each prompt, and vary in what it leaves open."""
    return np.stack([to_bytes(render(_scenes(asked.specs.take(slice(i, i + 1)), tier, many, i), size)) for i in range(len(asked))])


def _scenes(wanted: Specs, tier: str, many: int, seed: int) -> Specs:
    only, tried = ((int(wanted.colour[0, 0]), int(wanted.shape[0, 0])),), AT_FIRST
    while True:
        drawn = draw_specs(tier, "train", seed, np.arange(tried), only=only)
        same = [getattr(drawn, name)[:, 0] == getattr(wanted, name)[0, 0] for name in ("size", "cell", "fill")]
        same += [getattr(drawn, name) == getattr(wanted, name)[0] for name in ("tone", "texture")]
        rows = np.flatnonzero(np.logical_and.reduce(same))
        if len(rows) >= many:
            return drawn.take(rows[:many])
        tried *= 4


@config
class Diversity:
    """How much pictures of one prompt differ, beside true pictures that the prompt says the same of: what a collapsed generator lacks.

    The differences are mean |differences| of values in [0,1]; `share` is the model's over the true pictures'.
    """

    kind: Literal["diversity"] = "diversity"
    tier: Literal["one", "T0"]  # whose prompts: scenes of one object
    prompts: Positive = 25
    pictures: Positive = 8  # of each prompt, 2 at least
    guidance: NonNegative = 0.0  # 0: the model's own
    steps: Count = 0  # denoising steps; 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of prompts and pictures

    asks = "sample"  # of the model
    of_prompts = True  # and it is to read them, or views of what they say

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise UserError("pictures: got 1; the pictures of a prompt are compared with each other, so 2 at least are needed")

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("drawn", "real", "share")

    def run(self, bench: Bench) -> Values:
        """The differences of drawn and of true pictures, and the share."""
        asked, wanted, size = prompts(self.tier, self.prompts, self.seed), bench.wanted(self), bench.model.defaults["size"]
        text = [one for one in asked.text for _ in range(self.pictures)]
        images = bench.draw(text, self.seed * 1_000_003, wanted, "diversity")
        drawn = spread(images.unflatten(0, (len(asked), self.pictures)).numpy())
        real = spread(alike(asked, self.tier, self.pictures, size[0]))
        bench.show("diversity", floats(images[: 4 * self.pictures]), self.pictures, asked.text[:4])
        protocol = {"tier": self.tier, "prompts": self.prompts, "pictures": self.pictures, "seed": self.seed, "size": size[0]}
        found = {"drawn": round(drawn, 5), "real": round(real, 5), "share": round(drawn / real, 4)}
        return {**found, "protocol": protocol | bench.used(wanted)}
