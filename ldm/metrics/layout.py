"""Exactness of written scenes, mark by mark."""

from __future__ import annotations

from typing import Literal

from ldm.config.schema import Count, Positive, config
from ldm.data.scenes import marks
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import TierName
from ldm.metrics.bench import Bench, Values


@config
class Layout:
    """Whether a written scene is the one that a prompt states, mark by mark; how it looks when drawn is what adherence measures."""

    kind: Literal["layout"] = "layout"
    tier: TierName  # whose prompts
    prompts: Positive = 100  # with colour-shape pairs seen in training, and as many with held-out pairs
    seed: Count = 0  # of prompts and scenes

    asks = "scene"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("exact", "marks", "held_out_exact", "held_out_marks")

    def run(self, bench: Bench) -> Values:
        """Shares of scenes that are right in every mark, and of marks that are right."""
        found: Values = {}
        for pairs, name in (("seen", ""), ("held-out", "held_out_")):
            asked = prompts(self.tier, self.prompts, self.seed, pairs)  # type: ignore[arg-type]
            made = bench.model.marks_of(asked.text, [self.seed * 1_000_003 + i for i in range(len(asked))])
            bench.progress(len(asked), len(asked), f"scenes, {pairs}")
            true = marks.to_marks(asked.specs)
            right = (made == true) | ((made == marks.END) & (true == marks.END))
            counted = (true != marks.END) | (made != marks.END)
            found[f"{name}exact"] = round(float(right.all(1).mean()), 4)
            found[f"{name}marks"] = round(float(right[counted].mean()), 4)
        return {**found, "protocol": {"tier": self.tier, "prompts": self.prompts, "seed": self.seed}}
