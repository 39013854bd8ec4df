"""CLIP score (Hessel 2021, arXiv 2104.08718) and R-precision: how well pictures show their captions, by a CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.formats.model_folder import whole_clip
from ldm.metrics.bench import Bench, Values
from ldm.metrics.judges import ClipJudge, OwnJudge, has_clip


@config
class ClipScore:
    """How well pictures show their captions, by a CLIP: 100 x the cosine similarity, mean over pictures (arXiv 2104.08718).

    Also the share of pictures whose own caption is the likest of all captions that are measured with (R-precision, Xu 2018, arXiv
    1711.10485, section 4).
    """

    kind: Literal["clip_score"] = "clip_score"
    path: Path  # a folder that transformers' CLIPModel opens, or a run or model that has a CLIP of its own
    images: Positive = 256  # captions
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures

    asks = "sample"  # of the model
    of_prompts = True  # and it is to read them, or views of what they say

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("score", "real", "retrieval", "retrieval_real")

    def check_weights(self) -> None:
        """Raises UserError for weights that are not here."""
        path = at_home(self.path)
        if not (has_clip(path) or whole_clip(path)):
            what = "a folder that transformers' CLIPModel opens is needed, or a model with a CLIP of its own run"
            raise UserError(f"clip: {path}: no CLIP here; {what}")

    def run(self, bench: Bench) -> Values:
        """Of pictures, and of the real images with the same captions."""
        self.check_weights()
        path = at_home(self.path)
        own = has_clip(path)
        judge = OwnJudge.load(path, bench.device) if own else ClipJudge.load(path, bench.device)
        real = bench.real(self.images)
        many = len(real.image)

        wanted = bench.wanted(self)
        images = bench.draw(real.caption, self.seed, wanted, "clip score")
        true = ((real.image + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        captions = list(dict.fromkeys(real.caption))
        right = torch.tensor([captions.index(caption) for caption in real.caption])
        found: Values = {}
        for of, name, share in ((images, "score", "retrieval"), (true, "real", "retrieval_real")):
            likeness = judge.similarities(of, captions)  # (N,M)
            found[name] = round(100 * float(likeness[torch.arange(many), right].mean()), 3)
            found[share] = round(float((likeness.argmax(1) == right).double().mean()), 4)
        clip = f"the own CLIP of {self.path.name}" if own else self.path.name
        return {**found, "protocol": {"images": many, "captions": len(captions), **bench.used(wanted), "clip": clip}}
