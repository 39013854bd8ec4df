"""Two data sets as one, in fixed shares: pictures of something new beside pictures of its kind (DreamBooth's prior preservation)."""

from __future__ import annotations

import hashlib
import json
import math

from ldm.data.concatenation import Concatenation
from ldm.data.dataset import DataSet


class Mixture(Concatenation):
    """Samples of `first` and of `second`, the latter `share` of all; each once in an epoch at least, the fewer ones as often as that takes.

    Args:
        share: of the second, between 0 and 1.
    """

    def __init__(self, first: DataSet, second: DataSet, share: float) -> None:
        total = max(math.ceil(len(first) / (1 - share)), math.ceil(len(second) / share))
        others = max(1, round(total * share))  # samples of the second
        super().__init__((first, second), (total - others, others))
        self.share = share

    def describe(self) -> dict[str, object]:
        """The first's own, and how many there are of the second."""
        return {
            **self.parts[0].describe(),
            "of_its_kind": len(self.parts[1]),
            "share_of_its_kind": self.share,
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Of both parts and the share."""
        said = ["mixed", 1, *(part.fingerprint() for part in self.parts), self.share]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()
