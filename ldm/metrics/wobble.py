"""How pictures by lines bear an unsteady hand: the same scenes told by sketches that wobble more and more."""

from __future__ import annotations

from typing import Literal

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import TierName
from ldm.data.views import parted
from ldm.diffusion.batch import View
from ldm.metrics import adherence
from ldm.metrics.agreement import Shown, boxed, outline
from ldm.metrics.bench import Bench, Values, floats
from ldm.metrics.grounding import exact, less

LINES = ("edges", "sketch")  # views that are lines
OWN = "own"  # the model's view as it is, beside the wobbles


@config
class Wobble:
    """Whether a model that reads lines still draws what they mean when they wobble, as Koley 2024 (arXiv 2403.07234) asks of sketches.

    The lines of each scene are told as `sketch:W` tells them, displaced by about W 64ths of the picture's side and broken here and
    there, for every W in `by`; what is drawn is compared with the scene, not with the sketch.
    """

    kind: Literal["wobble"] = "wobble"
    tier: TierName  # whose scenes
    prompts: Positive = 100  # scenes, with colour-shape pairs seen in training
    by: tuple[Count, ...] = (0, 1, 2, 3, 4)  # 64ths of the picture's side
    caption: Literal["whole", "placeless", "empty"] = "placeless"  # all of it; without places and relations; nothing
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of scenes, sketches and pictures

    asks = "sample"  # of the model

    def __post_init__(self) -> None:
        if not self.by or max(self.by) > 16 or len(set(self.by)) < len(self.by):
            raise UserError(f"by: got {list(self.by)}; write different numbers from 0 to 16, such as [0, 1, 2, 3, 4]")

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return tuple(f"{w}.{name}" for w in (OWN, *self.by) for name in ("outline", "overlap", *adherence.METRICS))

    def run(self, bench: Bench) -> Values:
        """By wobble: overlap of the objects' pixels (outline) and of their boxes (overlap) with the scene's, and adherence."""
        lines = [name for name in bench.model.told if parted(name)[0] in LINES]
        if len(lines) != 1:
            reads = ", ".join(bench.model.told) or "no views"
            raise UserError(
                f"wobble: is of models that read one view of lines ({' or '.join(LINES)}); this one reads {reads}; leave it out"
            )
        asked, wanted, size = prompts(self.tier, self.prompts, self.seed), bench.wanted(self), bench.model.defaults["size"]
        views = {OWN: lines[0], **{str(w): f"sketch:{w}" for w in self.by}}
        given: dict[str, View] = exact(asked.specs, tuple(dict.fromkeys(views.values())), size[0], self.seed)
        seeds = [self.seed * 1_000_003 + i for i in range(len(asked))]
        texts = [less(text, target, self.caption) for text, target in zip(asked.text, asked.targets, strict=True)]
        found: Values = {}
        for done, (w, view) in enumerate(views.items()):

            def on_step(step: int, steps: int, base: int = done * len(asked), what: str = w) -> None:
                bench.progress(base + len(asked) * step // steps, len(views) * len(asked), f"wobble {what}")

            edits = bench.model.tell({lines[0]: given[view]}, {}, size)
            images = bench.model.sample(texts, seeds, wanted, edits=edits, on_step=on_step)
            shown = Shown.of(asked.specs, asked.targets, images.numpy())
            scores = adherence.summary(
                {"outline": outline(shown), "overlap": boxed(shown), **adherence.grade(shown.reading, asked.targets)}
            )
            found[w] = {name: round(value.mean, 4) for name, value in scores.items()}
            bench.show(f"wobble-{w}", floats(images[:16]), 8, texts[:16])
        protocol = {"tier": self.tier, "prompts": self.prompts, "view": lines[0], "caption": self.caption, "seed": self.seed}
        return {**found, "protocol": protocol | bench.used(wanted)}
