"""What a model that learned inpainting does better than blending: an object of a scene is replaced by another, its place kept.

`python -m pytest -m soak -s tests/soak/test_painting.py`, after `make quickstart` and `python train.py configs/finetune-inpaint.yaml`;
LDM_RUNS names another folder than runs/. Prints the table of docs/finetune.md.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data.scenes.captions import say, stated
from ldm.data.scenes.render import render, to_bytes
from ldm.data.scenes.source import prompts
from ldm.families.registry import load
from ldm.metrics.adherence import score

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
RUNS = Path(os.environ.get("LDM_RUNS", "runs"))
SIDE, COUNT = 64, 200


def around(x: np.ndarray, y: np.ndarray, side: np.ndarray) -> torch.Tensor:
    """Squares (N,H,W) that hold an object of the size of the one that is there."""
    places = (np.arange(SIDE) + 0.5) / SIDE
    half = 0.75 * side + 0.04
    rows, columns = (np.abs(places[None] - centre) <= half for centre in (y, x))
    return torch.from_numpy(rows[:, :, None] & columns[:, None, :])


def test_an_object_is_replaced() -> None:
    names = {"blending, the base": "quickstart", "inpainting model": "finetune-inpaint"}
    if missing := [name for name in names.values() if not (RUNS / name / "model").is_dir()]:
        pytest.skip(f"no {RUNS / missing[0]}")
    before, other = prompts("one", COUNT, seed=77), prompts("one", COUNT, seed=78)
    asked = replace(before.specs, colour=other.specs.colour, shape=other.specs.shape)
    targets = stated(asked, "one")
    texts = [say(target) for target in targets]
    images = torch.from_numpy(to_bytes(render(before.specs, SIDE)))
    mask = around(asked.x[:, :1], asked.y[:, :1], asked.side[:, :1])
    print(f"\nas it was: bind {score(images.numpy(), targets)['bind'].mean():.3f}; masks cover {mask.float().mean():.2f} of the picture")
    found = {}
    for label, name in names.items():
        model = load(RUNS / name / "model")
        drawn = model.sample(texts, range(COUNT), edits=model.edits(images, mask, 1.0))
        assert torch.equal(drawn[~mask], images[~mask])  # the bytes outside stay
        scores = score(drawn.numpy(), targets)
        found[label] = {key: float(np.nanmean(scores[key])) for key in ("bind", "colour", "shape", "cell", "strict", "bg")}
        print(f"{label}: " + ", ".join(f"{key} {value:.3f}" for key, value in found[label].items()))
    assert found["inpainting model"]["bind"] > found["blending, the base"]["bind"] - 0.05
