"""Active units of a VAE: how many of its latent numbers say anything of pictures."""

from __future__ import annotations

from typing import Literal

from ldm.config.schema import Positive, config
from ldm.metrics.bench import Bench, Values


@config
class Units:
    """How many numbers of a VAE's z are active: their posterior means vary from picture to picture (Burda 2015, arXiv 1509.00519)."""

    kind: Literal["units"] = "units"
    images: Positive = 1000  # validation pictures

    asks = "units"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result."""
        return ("active", "units", "nats")

    def run(self, bench: Bench) -> Values:
        """Active units, all of them, and the divergence of a picture's posterior from N(0,1), in nats."""
        real = bench.real(self.images)
        found = {name: round(value, 3) for name, value in bench.model.units(real.to(bench.device)).items()}
        return {**found, "protocol": {"images": len(real.image), "resolution": bench.resolution}}
