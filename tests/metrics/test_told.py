"""Agreement with views: perfect answers score nothing wrong, others do, and the entropy of colours is Shannon's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.__main__ import main
from ldm.data.dataset import asked
from ldm.data.scenes.source import ScenesSource
from ldm.metrics import told


@pytest.mark.parametrize("tier", ["one", "T2"])
def test_the_pictures_themselves_agree_and_others_do_not(tier: str) -> None:
    views = ("grey", "edges", "small:4", "labels", "boxes", "sketch")
    data = asked(ScenesSource(tier=tier, images=12, val=2).build("train"), views)  # type: ignore[arg-type]
    batch = data.load(range(12), range(12), 64, 0, False)
    assert batch.views is not None
    image = ((batch.image.permute(0, 2, 3, 1) + 1) * 127.5 + 0.5).to(torch.uint8)
    kinds = data.views()  # type: ignore[attr-defined]
    from ldm.data.views import kind_of

    shaded = 0.06 if tier == "one" else 0.2  # where light falls off, a bright background may look grey
    for name, most, least in (("grey", 0.003, 0.05), ("small:4", 0.003, 0.05), ("labels", shaded, 0.3), ("edges", 0.04, 0.05)):
        kind, given = kind_of(kinds, name), batch.views[name]
        right, wrong = told.error(image, name, given, kind), told.error(image.roll(1, 0), name, given, kind)
        assert right is not None and wrong is not None
        assert right <= most < least <= wrong, (name, right, wrong)
    assert told.error(image, "boxes", batch.views["boxes"], kinds["boxes"]) is None
    assert isinstance(batch.views["sketch"], Tensor) and told.error(image, "sketch", batch.views["sketch"], kinds["sketch"]) is None


def test_a_model_that_reads_no_views_is_not_told_any(kl_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(kl_model), "--told", "4", "--n", "2", "--images", "4", "--steps", "1"]) == 2
    assert "told: this model reads no views of pictures; leave it out" in capsys.readouterr().err


def test_bits_are_of_what_is_there() -> None:
    assert told.bits(np.arange(8)) == 3 and told.bits(np.zeros(9, np.int64)) == 0 and told.bits(np.zeros(0, np.int64)) == 0
    assert told.bits(np.array([0, 0, 1, 2])) == pytest.approx(1.5)
