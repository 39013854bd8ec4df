"""Likelihood of held-out captions under a model of captions, beside the entropy of the grammar."""

from __future__ import annotations

from typing import Literal

from ldm.config.errors import UserError
from ldm.config.schema import Positive, config
from ldm.data.scenes import grammar
from ldm.data.scenes.source import Scenes
from ldm.metrics.bench import Bench, Values


@config
class Language:
    """Bits that held-out captions take of a model of captions alone, beside the entropy of the scenes' grammar."""

    kind: Literal["language"] = "language"
    captions: Positive = 400  # held-out ones

    asks = "likelihood"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("bits", "entropy", "excess") if scenes else ("bits",)

    def run(self, bench: Bench) -> Values:
        """Bits of a caption; where it is known in closed form the entropy, and by what share the bits exceed it."""
        if bench.data is None or not len(bench.data):
            raise UserError("language: needs captions to measure on: give --on scenes or --on folder")
        count = min(self.captions, len(bench.data))
        index = list(range(count))
        bits = bench.model.bits(bench.data.captions(index, index, bench.seed))
        found = {"bits": round(sum(bits) / count, 4)}
        least = grammar.entropy(bench.data.source) if isinstance(bench.data, Scenes) else None
        if least:
            found |= {"entropy": round(least, 4), "excess": round(found["bits"] / least - 1, 4)}
        return {**found, "protocol": {"captions": count}}
