"""CLIP score (Hessel 2021, arXiv 2104.08718): how well pictures show their captions, by a CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.metrics.bench import Bench, Values
from ldm.metrics.judges import ClipJudge


@config
class ClipScore:
    """How well pictures show their captions, by a CLIP: 100 x the cosine similarity, mean over pictures (arXiv 2104.08718)."""

    kind: Literal["clip_score"] = "clip_score"
    path: Path  # a folder that transformers' CLIPModel opens
    images: Positive = 256  # validation captions
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("score", "real")

    def check_weights(self) -> None:
        """Raises UserError for weights that are not here."""
        ClipJudge.check(self.path.expanduser())

    def run(self, bench: Bench) -> Values:
        """The mean score of pictures, and that of the validation images with the same captions."""
        judge = ClipJudge.load(self.path.expanduser(), bench.device)
        real = bench.real(self.images)
        many = len(real.image)

        wanted = bench.wanted(self)
        images = bench.draw(real.caption, self.seed, wanted, "clip score")
        true = ((real.image + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        score, best = (100 * sum(judge.scores(of, real.caption)) / many for of in (images, true))
        protocol = {"images": many, **bench.used(wanted), "clip": self.path.name}
        return {"score": round(score, 3), "real": round(best, 3), "protocol": protocol}
