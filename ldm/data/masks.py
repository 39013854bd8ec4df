"""What a data set's masks say as a whole: masks that are the same everywhere teach nothing, or all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ldm.config.errors import UserError
from ldm.data.dataset import DataSet

LOOKED_AT = 16  # pictures, spread evenly over the training part
SIDE = 32  # px at which they are seen


def masks_say(data: DataSet, described: Mapping[str, Any], black_counts: bool) -> str:
    """What is odd about the masks of some training pictures; empty: nothing.

    Args:
        described: what the data says of itself.
        black_counts: what is masked out is learned from, too.

    Raises:
        UserError: if all are black, and nothing would be learned.
    """
    if described.get("with_mask") == 0:
        return "data.masks: no picture has a mask beside it, so all of every picture counts"
    index = np.unique(np.linspace(0, len(data) - 1, LOOKED_AT).astype(int)).tolist()
    mask = data.load(index, index, SIDE, 0, False).mask
    if mask is None:
        return ""
    least, largest = float(mask.min()), float(mask.max())
    looked_at = f"the masks of {len(index)} pictures that were looked at are"
    if largest == 0 and not black_counts:
        raise UserError(
            f"data.masks: {looked_at} black everywhere, and black is not learned; paint what is to be learned white"
            " (masked_loss.unmasked lets black count, too), or leave data.masks and masked_loss out"
        )
    if least < largest or (largest == 1 and described.get("with_mask", described.get("images")) != described.get("images")):
        return ""
    grey = {0.0: "black", 1.0: "white"}.get(largest, f"of one grey, {largest:.2f},")
    return f"data.masks: {looked_at} {grey} everywhere, so no part of a picture counts more than another"
