"""The bench of measurements: what a metric may use, and how it draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.data.dataset import DataSet
from ldm.data.pictures import save_grid
from ldm.families.draws import OWN, Wanted
from ldm.formats.records import Damaged, read_object

Values = dict[str, Any]
PROMPTS = "prompts.json"  # beside example pictures: what each grid was asked for, by its name


class Sampled(Protocol):
    """A metric of drawn pictures: how they are drawn; 0 or empty is the model's own."""

    @property
    def steps(self) -> int:
        """Denoising steps."""
        ...

    @property
    def guidance(self) -> float:
        """The guidance scale."""
        ...

    @property
    def sampler(self) -> str:
        """The sampler's name."""
        ...


class Team(Protocol):
    """The processes that draw together; each runs the whole measurement, and draws its share of the pictures."""

    def share(self, count: int) -> range:
        """Which of `count` pieces are this process'."""
        ...

    def gather(self, values: list[Any]) -> list[Any]:
        """Everyone's values, in the order of their shares."""
        ...


@dataclass(frozen=True)
class Bench:
    """What a measurement may use."""

    model: Any
    data: DataSet | None  # validation images
    resolution: int  # px
    seed: int
    device: torch.device
    pictures: Path | None  # folder for example pictures
    progress: Callable[[int, int, str], None]  # (done, in all, what)
    train: DataSet | None = None  # what the model learned from
    asked: Wanted = OWN  # how pictures are drawn where a metric does not say it
    shown: set[str] = field(default_factory=set)  # names of the pictures written so far
    team: Team | None = None  # None: this process draws all
    drawn: dict[Any, Tensor] = field(default_factory=dict)  # the pictures of the last captions, for the next metric that asks for the same

    def real(self, count: int) -> Any:
        """The first validation images, at most `count`."""
        if self.data is None:
            raise UserError("this measurement needs images to compare with: give --on scenes or --on folder")
        index = list(range(min(count, len(self.data))))
        return self.data.load(index, index, self.resolution, 0, False)

    def draw(self, captions: Sequence[str], seed: int, wanted: Wanted, what: str) -> Tensor:
        """Pictures (N,H,W,3) of captions, uint8, with seeds from `seed` on."""
        key = (tuple(captions), seed, wanted)
        if key not in self.drawn:
            seeds = [seed + i for i in range(len(captions))]
            images = self.sample(captions, seeds, wanted, on_step=lambda done, total: self.progress(done, total, what))
            self.drawn.clear()
            self.drawn[key] = images
        return self.drawn[key]

    def sample(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        wanted: Wanted,
        *,
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """As `Draws.sample`, shared by the processes of the team: a picture depends on its own prompt and seed alone."""
        sized = {} if size is None else {"size": size}
        if self.team is None:
            return self.model.sample(captions, seeds, wanted, **sized, on_step=on_step)  # type: ignore[no-any-return]
        own = self.team.share(len(captions))
        rows = slice(own.start, own.stop)
        part = [self.model.sample(list(captions)[rows], list(seeds)[rows], wanted, **sized, on_step=on_step).cpu()] if own else []
        return torch.cat(self.team.gather(part))

    def wanted(self, metric: Sampled) -> Wanted:
        """The sampler settings that a metric asks for; what it leaves at 0 or empty is the model's own."""
        return replace(self.asked, steps=metric.steps or None, guidance=metric.guidance or None, sampler=metric.sampler or None)

    def used(self, wanted: Wanted) -> Values:
        """The settings that pictures were drawn with, for the protocol."""
        used = self.model.settings(wanted)
        return {"guidance": used.guidance, "steps": used.steps, "sampler": used.sampler, **self.besides()}

    def besides(self) -> Values:
        """What else was asked for of drawing, for the protocol."""
        return {name: value for name, value in asdict(self.asked).items() if value is not None}

    def show(self, name: str, images: Tensor, columns: int, prompts: Sequence[str] = ()) -> None:
        """Write example pictures (N,3,H,W) in [-1,1], and the prompts they answer, where pictures are wanted."""
        if self.pictures is None:
            return
        number = 1
        while (own := name if number == 1 else f"{name}-{number}") in self.shown:
            number += 1
        self.shown.add(own)
        save_grid(images, self.pictures / f"{own}.png", columns)
        if prompts:
            path = self.pictures / PROMPTS
            try:
                known = read_object(path)
            except (OSError, Damaged):
                known = {}
            path.write_text(json.dumps(known | {own: list(prompts)}, indent=1), encoding="utf-8")


def floats(images: Tensor) -> Tensor:
    """Pictures (N,H,W,3), uint8, as (N,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1
