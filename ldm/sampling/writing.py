"""Writer of pictures: recipes become files as soon as they are drawn; by several processes, the same files as by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.distributed.processes import Processes
from ldm.families.draws import Draws, Guide
from ldm.sampling.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.metrics.judges import Judge
    from ldm.sampling.given import Files
    from ldm.sampling.init_images import InitImage
    from ldm.sampling.safety import SafetyFilter


@dataclass(frozen=True, kw_only=True)
class PictureWriter:
    """What is done with pictures once they are drawn.

    Args:
        first: the number of the first one.
        batch: pictures between two writes.
        best: of how many that follow each other one is kept.
        judge: who chooses then.
        safety: who withholds pictures, or None.
        classifier: what guides recipes that ask for it.
        given: the files of recipes that tell of views.
        drawing: the model with what a recipe has of adapters; None: it is the same for all.
        save_steps: whether a strip of its steps lies beside each.
        tell: told what a user should know.
        told: told every picture's file and recipe.
    """

    out: Path
    first: int
    batch: int = 8
    best: int = 1
    judge: Judge | None = None
    safety: SafetyFilter | None = None
    classifier: Guide | None = None
    given: Files | None = None
    drawing: Callable[[Recipe], Draws] | None = None
    save_steps: bool = False
    tell: Callable[[str], None] = print
    told: Callable[[dict[str, Any]], None] = lambda told: None
    processes: Processes = field(default_factory=Processes)

    def write(self, family: Draws, made: Sequence[Recipe], init_image: InitImage | None = None) -> dict[int, Path]:
        """The files by their places, of all processes; withheld pictures have none."""
        from ldm.sampling import jobs
        from ldm.sampling.picture_files import Bar
        from ldm.sampling.trajectory import Trajectory

        groups = self.processes.share(len(made) // self.best)
        own = made[groups.start * self.best : groups.stop * self.best]
        chunk = family.defaults["chunk"]  # the network draws that many at a time anyway
        note = cache(self.tell)  # what is told of several batches is said once
        waiting: dict[int, tuple[Tensor, Tensor | None]] = {}  # by place: drawn, but its group is not complete
        written: list[tuple[int, Path]] = []
        done = 0
        with Bar(len(own)) as show:
            for places in jobs.alike(own, -(-self.batch // chunk) * chunk):
                part, film = [own[i] for i in places], Trajectory()
                family = family if self.drawing is None else self.drawing(part[0])

                def on_step(step: int, of: int, done: int = done, count: int = len(part)) -> None:
                    show(done + count * step / of)

                watching = family.watch(film.see) if self.save_steps else ()
                if self.save_steps and not watching:
                    family.refuse("save_steps", "does not show its steps; leave --save-steps out")
                images = jobs.draw(
                    family,
                    part,
                    init_image=init_image,
                    edits=watching,
                    classifier=self.classifier,
                    given=self.given,
                    on_step=on_step,
                    note=note,
                )
                done += len(part)
                for row, place in enumerate(places):
                    waiting[place] = images[row], film.strip(row, family.decode) if self.save_steps else None
                for group in sorted({place // self.best for place in places}):
                    members = range(group * self.best, (group + 1) * self.best)
                    if all(place in waiting for place in members):
                        drawn = {place: waiting.pop(place) for place in members}
                        chosen = self._chosen({place: pixels for place, (pixels, _) in drawn.items()}, own)
                        if path := self._save(groups.start + group, own[chosen], *drawn[chosen]):
                            written.append((groups.start + group, path))
        return dict(self.processes.gather(written))

    def _chosen(self, pictures: dict[int, Tensor], recipes: Sequence[Recipe]) -> int:
        """The place of the best of some pictures; of equally good ones the first."""
        if self.judge is None or len(pictures) == 1:
            return next(iter(pictures))
        import torch

        scores = self.judge.scores(torch.stack(list(pictures.values())), [recipes[place].prompt for place in pictures])
        best = max(scores)
        return next(place for place, score in zip(pictures, scores, strict=True) if score == best)

    def _save(self, number: int, recipe: Recipe, pixels: Tensor, strip: Tensor | None) -> Path | None:
        """The file of a picture, unless it is withheld."""
        from ldm.sampling.picture_files import save
        from ldm.sampling.recipe import save_picture

        if self.safety is not None and self.safety.flagged(pixels[None])[0]:
            self.tell(f"the safety filter withheld the picture of seed {recipe.seed} for {recipe.prompt[:40]!r}")
            return None
        values = pixels.numpy()
        if recipe.watermark:
            from ldm.sampling.watermark import hide, seek

            values = hide(values, recipe.watermark)
            if seek(values) != recipe.watermark:
                self.tell(f"the watermark cannot be read back from the picture of seed {recipe.seed}: its pixels leave no room")
        _, path = save(self.out, self.first + number, recipe.seed, partial(save_picture, pixels=values, recipe=recipe))
        if strip is not None:
            save_picture(path.with_name(f"{path.stem}_steps.png"), strip.numpy(), recipe)
        self.told({"file": str(path), **recipe.to_dict()})
        return path


def to_json(told: dict[str, Any]) -> None:
    """A line on standard output."""
    print(json.dumps(told, ensure_ascii=False), flush=True)
