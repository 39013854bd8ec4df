"""Distances between drawn and real pictures in a space of features: FID, KID, CMMD, precision and recall."""

from __future__ import annotations

from typing import Literal

from ldm.config.schema import Count, NonNegative, Positive, config
from ldm.metrics import frechet
from ldm.metrics.bench import Bench, Values, floats
from ldm.metrics.extractors import Features, RandomFeatures, gaussian_distance, kernel_distance, precision_recall

NEIGHBOURS = 3  # of precision and recall


@config
class Frechet:
    """Distances between pictures of validation captions and the validation images, in a space of features.

    With learned features: Fréchet and kernel distance (FID and KID where they are Inception's), Gaussian distance (CMMD
    where they are CLIP's), precision and recall.
    """

    kind: Literal["frechet"] = "frechet"
    images: Positive = 256  # pictures, and real images; fix it, the distance depends on it
    steps: Count = 0  # denoising steps; 0: the model's own
    guidance: NonNegative = 0.0  # 0: the model's own
    sampler: str = ""  # empty: the model's own
    seed: Count = 0  # of the pictures
    features: Features = RandomFeatures()  # what pictures are compared by

    asks = "sample"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        learned = () if isinstance(self.features, RandomFeatures) else ("kernel", "kernel_floor", "gaussian", "precision", "recall")
        return ("distance", "real_real_floor", *learned)

    def check_weights(self) -> None:
        """Raises UserError for weights that are not here."""
        self.features.check()

    def run(self, bench: Bench) -> Values:
        """The distances, and their floor: those between two sets of real images of the same number."""
        extractor = self.features.load(bench.device)
        real = bench.real(2 * self.images)
        half = len(real.image) // 2
        if half < 2:
            return {"skipped": f"{len(real.image)} validation images; a distance needs 4 at least"}
        wanted = bench.wanted(self)
        images = bench.draw(real.caption[:half], self.seed, wanted, "frechet")
        a, b, c = (extractor.features(x) for x in (real.image[:half], real.image[half : 2 * half], floats(images)))
        found: Values = {}
        if isinstance(self.features, RandomFeatures):
            a, b, c = frechet.standardise(a, b, c)
        else:
            found = {"kernel": round(kernel_distance(b, c), 6), "kernel_floor": round(kernel_distance(a, b), 6)}
            found["gaussian"] = round(gaussian_distance(b, c), 4)
            if half > NEIGHBOURS:
                found["precision"], found["recall"] = (round(share, 4) for share in precision_recall(c, b, NEIGHBOURS))
        protocol = {"images": half, **bench.used(wanted), **extractor.protocol}
        distances = {"distance": round(frechet.distance(b, c), 3), "real_real_floor": round(frechet.distance(a, b), 3)}
        return {**distances, **found, "protocol": protocol}
