"""Exact views of scenes: labels, edges, depth, boxes, graph, style, marks, and the same scene by day or by night."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.data.scenes.geometry import HALF_HEIGHT, HALF_WIDTH, distance, relation_of
from ldm.data.scenes.marks import to_marks
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.spec import COLOUR_RGB, COLOURS, RELATIONS, SHAPES, TONE_RGB, TONES, Specs
from ldm.data.views import ViewKind, number, parted, sketch
from ldm.diffusion.batch import Boxes, Graph, Points, View
from ldm.diffusion.rng import Rng

CLASSES = (*TONES, *COLOURS)  # of labels: the background by its tone, objects by their colour; the shape lies in the map itself
PARTS = ("left", "top", "right", "bottom")  # of each object's points
_SHADES = tuple((int(r * 255), int(g * 255), int(b * 255)) for r, g, b in np.concatenate([TONE_RGB, COLOUR_RGB]).tolist())
KINDS: dict[str, ViewKind] = {
    "labels": ViewKind(form="classes", channels=len(CLASSES), names=CLASSES, colours=_SHADES),
    "edges": ViewKind(form="map", channels=1),
    "sketch": ViewKind(form="map", channels=1),
    "depth": ViewKind(form="map", channels=1),
    "boxes": ViewKind(form="boxes"),
    "points": ViewKind(form="points", names=PARTS),
    "graph": ViewKind(form="graph"),
    "style": ViewKind(form="map", channels=3),
    "source": ViewKind(form="map", channels=3),
    "marks": ViewKind(form="marks"),
}


def by_day(specs: Specs) -> Specs:
    """The same scenes before a white, plain background, lit evenly from the top left."""
    return _lit(specs, TONES.index("white"), 0, (1.25 * np.pi, 0.10))


def by_night(specs: Specs) -> Specs:
    """The same scenes before a black, striped background, lit from the right."""
    return _lit(specs, TONES.index("black"), 1, (0.0, 0.30))


def _lit(specs: Specs, tone: int, texture: int, light: tuple[float, float]) -> Specs:
    n = len(specs)
    return replace(specs, tone=np.full(n, tone), texture=np.full(n, texture), light=np.tile(light, (n, 1)))


@dataclass(frozen=True)
class SceneViews:
    """Views of some scenes at one size.

    Args:
        specs: the scenes.
        others: as many other scenes, whose objects pictures of the same style show.
        resolution: px.
        rng: of what is drawn at random, by position.
    """

    specs: Specs
    others: Callable[[], Specs]
    resolution: int
    rng: Rng

    def view(self, name: str) -> View:
        """One view by its name, maps as bytes."""
        make: dict[str, Callable[[], View]] = {
            "labels": self.labels,
            "edges": self.edges,
            "sketch": lambda: sketch(self.edges(), self.rng, number(name, 2, 0, 16) * self.resolution / 64),
            "depth": self.depth,
            "boxes": self.boxes,
            "points": self.points,
            "graph": self.graph,
            "style": self.style,
            "source": lambda: _bytes(by_day(self.specs), self.resolution),
            "marks": lambda: torch.from_numpy(to_marks(self.specs).astype(np.int16))[:, None, None],
        }
        return make[parted(name)[0]]()

    @cached_property
    def top(self) -> NDArray[np.int64]:
        """The number of the object that each pixel shows, (N,R,R); -1: the background."""
        specs, r = self.specs, self.resolution
        centre = ((np.arange(r) + 0.5) / r).astype(np.float32)
        found = np.full((len(specs), r, r), -1)
        for k in range(specs.shape.shape[1]):
            for shape in range(len(SHAPES)):
                rows = np.flatnonzero(specs.shape[:, k] == shape)
                if len(rows):
                    x, y, side = (v[rows, k].astype(np.float32)[:, None, None] for v in (specs.x, specs.y, specs.side))
                    dx, dy = np.broadcast_arrays(centre[None, None, :] - x, centre[None, :, None] - y)
                    part = found[rows]
                    part[distance(shape, dx, dy, side) < 0] = k
                    found[rows] = part
        return found

    def labels(self) -> Tensor:
        """Class numbers (N,1,R,R) int16, of `CLASSES`."""
        specs = self.specs
        colour = np.take_along_axis(specs.colour, self.top.clip(0).reshape(len(specs), -1), 1).reshape(self.top.shape)
        found = np.where(self.top < 0, specs.tone[:, None, None], len(TONES) + colour)
        return torch.from_numpy(found.astype(np.int16))[:, None]

    def edges(self) -> Tensor:
        """Where an object ends, (N,1,R,R) uint8, 0 or 255, one pixel wide."""
        found = np.zeros(self.top.shape, np.uint8)
        found[:, :, :-1][self.top[:, :, 1:] != self.top[:, :, :-1]] = 255
        found[:, :-1][self.top[:, 1:] != self.top[:, :-1]] = 255
        return torch.from_numpy(found)[:, None]

    def depth(self) -> Tensor:
        """How near what a pixel shows lies, (N,1,R,R) uint8: 0 the background, 255 the object that was painted last."""
        most = np.maximum(self.specs.count, 1)[:, None, None]
        return torch.from_numpy(((self.top + 1) * 255 // most).astype(np.uint8))[:, None]

    def boxes(self) -> Boxes:
        """The objects' bounding boxes, each with a phrase such as "a red circle"."""
        specs = self.specs
        there = specs.shape >= 0
        half = np.stack([HALF_WIDTH[specs.shape], HALF_HEIGHT[specs.shape]], -1) * specs.side[..., None]
        centre = np.stack([specs.x, specs.y], -1)
        box = np.concatenate([centre - half, centre + half], -1) * there[..., None]
        phrases = tuple(tuple(f"a {name}" if name else "" for name in row) for row in self.names)
        return Boxes(box=torch.from_numpy(box).float(), there=torch.from_numpy(there), phrases=phrases)

    def points(self) -> Points:
        """The middles of the sides of the objects' bounding boxes, four of each object, of `PARTS`."""
        boxes = self.boxes()
        left, top, right, bottom = boxes.box.unbind(-1)
        x, y = (left + right) / 2, (top + bottom) / 2
        point = torch.stack([torch.stack(at, -1) for at in ((left, y), (x, top), (right, y), (x, bottom))], 2).flatten(1, 2)
        there = boxes.there.repeat_interleave(len(PARTS), 1)
        return Points(point=point, there=there, part=torch.arange(len(PARTS)).repeat(len(there), boxes.there.shape[1]))

    def graph(self) -> Graph:
        """What lies where: every plain relation between two objects; of an only object what it lies on."""
        specs, found = self.specs, []
        for i, names in enumerate(self.names):
            triples = []
            for a in range(len(names)):
                for b in range(len(names)):
                    dx, dy = specs.x[i, b] - specs.x[i, a], specs.y[i, b] - specs.y[i, a]
                    relation = int(relation_of(dx, dy)) if a != b and names[a] and names[b] else -1
                    if relation >= 0:
                        triples.append((names[a], RELATIONS[relation], names[b]))
            ground = f"{TONES[specs.tone[i]]} background"
            found.append(tuple(triples) or tuple((name, "on", ground) for name in names if name))
        return Graph(triples=tuple(found))

    def style(self) -> Tensor:
        """Pictures (N,3,R,R) uint8 of other objects before the same background in the same light."""
        own = self.specs
        return _bytes(replace(self.others(), tone=own.tone, texture=own.texture, wave=own.wave, light=own.light), self.resolution)

    @cached_property
    def names(self) -> list[list[str]]:
        """Colour and shape of each object; empty where there is none."""
        pairs = zip(self.specs.colour.tolist(), self.specs.shape.tolist(), strict=True)
        return [[f"{COLOURS[c]} {SHAPES[s]}" if s >= 0 else "" for c, s in zip(*pair, strict=True)] for pair in pairs]


def _bytes(specs: Specs, resolution: int) -> Tensor:
    return torch.from_numpy(to_bytes(render(specs, resolution)).transpose(0, 3, 1, 2).copy())
