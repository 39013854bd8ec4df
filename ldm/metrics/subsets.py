"""Every subset of the words and views that a model may be told, and whether being told more ever makes it agree less."""

from __future__ import annotations

from itertools import combinations
from typing import Literal

from ldm.config.errors import UserError
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.data.scenes.source import prompts
from ldm.data.scenes.spec import TierName
from ldm.metrics import adherence
from ldm.metrics.agreement import AGREEMENTS, WORDS, Shares, Shown, agreement
from ldm.metrics.bench import Bench, Values, floats
from ldm.metrics.grounding import exact

NAMED = ", "  # between the members of a subset, as the result names it


@config
class Subsets:
    """Pictures of scenes by every subset of words and views but the empty one, from the same noise, and their agreement with each member.

    A product of experts (Huang 2022, arXiv 2112.05130) must do both: draw by any subset, and lose nothing of what was told when told more.
    """

    kind: Literal["subsets"] = "subsets"
    tier: TierName  # whose scenes
    prompts: Positive = 100  # scenes, with colour-shape pairs seen in training
    views: tuple[str, ...] = ()  # beside the words; none: all that the model reads
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of scenes and pictures

    asks = "sample"  # of the model

    def __post_init__(self) -> None:
        self._known(self.views)

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("gain",)

    def run(self, bench: Bench) -> Values:
        """Mean agreement by subset and member; `gain`: the least that a further member changes that of one told before, and which."""
        reads = tuple(bench.model.told)
        views = self.views or reads
        if not reads:
            raise UserError("subsets: this model reads no views of pictures; leave it out")
        if unknown := [view for view in views if view not in reads]:
            raise UserError(f"subsets: {', '.join(unknown)} is no view that this model reads; it reads {', '.join(reads)}")
        self._known(views)
        asked, wanted, size = prompts(self.tier, self.prompts, self.seed), bench.wanted(self), bench.model.defaults["size"]
        given, seeds = exact(asked.specs, views, size[0], self.seed), [self.seed * 1_000_003 + i for i in range(len(asked))]
        every = [told for many in range(1, len(views) + 2) for told in combinations((WORDS, *views), many)]
        found: dict[tuple[str, ...], dict[str, Shares]] = {}
        for done, told in enumerate(every):
            own = {name: given[name] for name in told if name != WORDS}
            edits = bench.model.tell(own, {}, size) if own else ()
            texts = asked.text if WORDS in told else ("",) * len(asked)

            def on_step(step: int, steps: int, base: int = done * len(asked), what: str = NAMED.join(told)) -> None:
                bench.progress(base + len(asked) * step // steps, len(every) * len(asked), what)

            images = bench.model.sample(texts, seeds, wanted, edits=edits, on_step=on_step)
            shown = Shown.of(asked.specs, asked.targets, images.numpy())
            found[told] = {name: agreement(name, shown) for name in told}
            bench.show(f"subsets-{'-'.join(told).replace(':', '')}", floats(images[:8]), 8, texts[:8])
        protocol = {"tier": self.tier, "prompts": self.prompts, "views": list(views), "seed": self.seed, **bench.used(wanted)}
        means = {NAMED.join(told): {name: round(float(each.mean()), 4) for name, each in own.items()} for told, own in found.items()}
        worst = least(found)
        return {"gain": worst["mean"], "worst": worst, "subsets": means, "protocol": protocol}

    def _known(self, views: tuple[str, ...]) -> None:
        strange = [view for view in views if view.partition(":")[0] not in AGREEMENTS or view == WORDS]
        if strange:
            known = ", ".join(name for name in AGREEMENTS if name != WORDS)
            raise UserError(f"subsets: {', '.join(strange)}: what agrees with it cannot be read; name views among {known}")


def least(found: dict[tuple[str, ...], dict[str, Shares]]) -> Values:
    """The member whose agreement a further one changes least, or lowers most: the mean change over scenes with its bootstrap interval.

    Args:
        found: agreement (N,) with each member, by subset.
    """
    changes = {
        (told, name, further): found[both][name] - found[told][name]
        for told in found
        for both in found
        if len(both) == len(told) + 1 and set(told) < set(both)
        for further in set(both) - set(told)
        for name in told
    }
    (told, name, further), change = min(changes.items(), key=lambda each: float(each[1].mean()))
    mean = adherence.summary({"change": change})["change"]
    rounded = {key: round(value, 4) for key, value in mean.to_dict().items()}
    return {"told": NAMED.join(told), "further": further, "of": name, **rounded}
