"""Completion: what is right of scenes of which the upper half is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm.config.errors import UserError
from ldm.data.pictures import to_uint8
from ldm.data.scenes.source import ScenesSource
from ldm.families.draws import DIRECT
from ldm.metrics import completion
from ldm.metrics.bench import Bench
from ldm.metrics.completion import Completion

SIDE = 32
DATA = ScenesSource(tier="one", images=4, val=48, captions=1).build("val")


def test_what_is_shown_is_the_share_of_pixels_rows_above_the_middle() -> None:
    from ldm.data.scenes.views import SceneViews
    from ldm.diffusion.rng import Rng

    specs = DATA.specs(range(48))
    share = completion.shown(specs)[:, 0]
    labels = np.asarray(SceneViews(specs, lambda: specs, 64, Rng(0, range(48))).view("labels"))[:, 0] >= 3  # objects' classes
    rows = labels.any(2)
    measured = rows[:, :32].sum(1) / rows.sum(1)
    assert np.abs(share - measured).max() < 0.1
    told, cut = completion.tellable(specs)
    assert (told >= cut).all() and 0 < cut.sum() < told.sum() < 48


@pytest.mark.parametrize("perfect", [True, False])
def test_a_true_picture_is_right_and_a_grey_half_is_not(perfect: bool) -> None:
    asked: dict[str, Any] = {}

    def sample(captions: Any, seeds: Any, wanted: Any, size: Any, edits: Any, on_step: Any) -> torch.Tensor:
        asked.update(captions=captions)
        true = to_uint8(DATA.load(range(48), range(48), SIDE, 0, False).image)
        return true if perfect else torch.where(edits[0][..., None], 128, true).to(torch.uint8)

    model = SimpleNamespace(
        defaults={"size": (SIDE, SIDE)}, settings=lambda wanted: DIRECT, sample=sample, edits=lambda image, mask: (mask,)
    )
    bench = Bench(model, DATA, 64, 0, torch.device("cpu"), None, lambda done, total, what: None)
    found = Completion(images=48, caption="whole" if perfect else "empty").run(bench)
    assert asked["captions"][0] == (DATA.captions([0], [0], 0)[0] if perfect else "")
    assert found["grey"] < 0.2 and (found["bind"], found["cut"]) == ((1, 1) if perfect else (found["bind"], found["grey"]))
    assert found["psnr"] == 100 if perfect else found["bind"] < 1
    assert set(Completion().names(True)) <= set(found)


def test_scenes_of_which_nothing_can_be_told_are_refused() -> None:
    hidden = [i for i, ok in enumerate(completion.tellable(DATA.specs(range(48)))[0]) if not ok]
    assert hidden
    model = SimpleNamespace(
        defaults={"size": (SIDE, SIDE)},
        settings=lambda wanted: DIRECT,
        edits=lambda image, mask: (),
        sample=lambda captions, *rest, **more: torch.zeros(len(captions), SIDE, SIDE, 3, dtype=torch.uint8),
    )
    low = ScenesSource(tier="one", images=4, val=1, captions=1, seed=next(seed for seed in range(99) if _low(seed))).build("val")
    with pytest.raises(UserError, match="completion: none of 1 scenes can be told of its upper half"):
        Completion(images=1).run(Bench(model, low, 64, 0, torch.device("cpu"), None, lambda done, total, what: None))


def _low(seed: int) -> bool:
    scene = ScenesSource(tier="one", images=4, val=1, captions=1, seed=seed).build("val")
    return not completion.tellable(scene.specs([0]))[0][0]
