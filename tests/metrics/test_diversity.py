"""Diversity: pictures of one prompt compared with each other, and with true scenes of the same facts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ldm.config.errors import UserError
from ldm.data.scenes.source import prompts
from ldm.families.draws import DIRECT
from ldm.metrics import adherence, diversity
from ldm.metrics.bench import Bench
from ldm.metrics.diversity import Diversity


@pytest.mark.parametrize("tier", ["one", "T0"])
def test_true_pictures_have_the_facts_of_their_prompt_and_differ(tier: Any) -> None:
    asked = prompts(tier, 3)
    images = diversity.alike(asked, tier, 4, 32)
    assert images.shape == (3, 4, 32, 32, 3) and diversity.spread(images) > 0.01
    for own, target in zip(images, asked.targets, strict=True):
        assert adherence.score(own, [target] * 4)["strict"].mean() >= 0.75  # the checker misreads some at 32 px


def test_spread_is_the_mean_difference_of_pairs() -> None:
    images = np.zeros((2, 3, 2, 2, 3), np.uint8)
    images[0, 0] = 255  # two pairs of three differ by 1, and none of the second prompt
    assert diversity.spread(images) == pytest.approx(1 / 3)


def test_the_metric_compares_what_is_drawn_with_true_pictures() -> None:
    def sample(captions: Any, seeds: Any, wanted: Any, on_step: Any = None) -> torch.Tensor:
        return torch.from_numpy(diversity.alike(prompts("one", 2), "one", 4, 32).reshape(8, 32, 32, 3))

    model = SimpleNamespace(defaults={"size": (32, 32)}, settings=lambda wanted: DIRECT, sample=sample)
    bench = Bench(model, None, 32, 0, torch.device("cpu"), None, lambda done, total, what: None)
    found = Diversity(tier="one", prompts=2, pictures=4).run(bench)
    assert found["share"] == 1 and found["drawn"] == found["real"] > 0
    with pytest.raises(UserError, match="pictures: got 1"):
        Diversity(tier="one", pictures=1)
