"""What filters are for: a model tuned on raw pictures of the web draws their watermarks, one tuned on those that pass a filter does not.

`python -m pytest -m soak -s tests/soak/test_web.py`, after `make quickstart`; LDM_RUNS names another folder than runs/. About ten minutes.
Prints the table of docs/data.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ldm.__main__ import main
from ldm.data.scene_render import render
from ldm.data.scenes import Prompts, ScenesSource, prompts
from ldm.data.web import corrupt
from ldm.families.running import load
from ldm.metrics.adherence import score

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
RUNS = Path(os.environ.get("LDM_RUNS", "runs"))
SIDE, IMAGES, SHOWN = 64, 12_000, 200

TUNE = """
init: {model}
data: {{kind: scenes, tier: one, images: 16000, val: 16, captions: 1, web: true}}
stages:
  tune:
    kind: train
    family: diffusion
    resolution: {side}
    images: {images}
    batch: 32
    ema: 0.99
    precision: bf16
    {filter}
    optim: {{kind: muon, lr: 4e-3, adamw_lr: 1e-3, warmup_images: 960, schedule: linear, decay_from: 0.4, final_lr: 0.02}}
  export: {{kind: export}}
"""
FILTERS = {"raw": "", "filtered": "filter: {min_aesthetic: 5, max_watermark: 0.5}"}


def marks(images: np.ndarray) -> np.ndarray:
    """How strongly pictures (N,3,R,R) in [0,1] bear the corpus' dashed diagonals: the slope of their fine detail on these."""
    rng = ScenesSource(tier="one", images=4, web=True).build("train").web([0])
    rng.watermarked[:], rng.enlarged[:], rng.blur[:], rng.noise[:] = True, False, 0, 0
    pattern = corrupt(np.zeros((1, 3, SIDE, SIDE), np.float32), rng)[0, 0]

    def fine(grey: np.ndarray) -> np.ndarray:
        return grey - ndimage.uniform_filter(grey, (0, 9, 9) if grey.ndim == 3 else 9)

    wanted = fine(pattern)
    return (fine(images.mean(1)) * wanted).sum((1, 2)) / (wanted**2).sum()


def test_the_filter_keeps_watermarks_out_of_what_is_drawn(tmp_path: Path) -> None:
    base = RUNS / "quickstart" / "model"
    if not base.is_dir():
        pytest.skip(f"no {base}")
    data = ScenesSource(tier="one", images=2000, web=True).build("train")
    web, clean = data.web(np.arange(1000)), render(data.specs(np.arange(1000)), SIDE)
    spoilt = corrupt(clean, web)
    limit = float(np.quantile(marks(spoilt[~web.watermarked]), 0.99))  # one clean picture in a hundred is taken for marked
    caught = float((marks(spoilt[web.watermarked]) > limit).mean())
    print(f"\nof {int(web.watermarked.sum())} marked training pictures {caught:.2f} are recognised, of clean ones 0.01")
    assert caught > 0.9
    asked: Prompts = prompts("one", SHOWN, seed=79)
    found: dict[str, tuple[float, float]] = {}
    for name in ("base", *FILTERS):
        model_folder = base
        if name in FILTERS:
            config = tmp_path / f"{name}.yaml"
            config.write_text(TUNE.format(model=base.resolve(), side=SIDE, images=IMAGES, filter=FILTERS[name]))
            assert main(["train", str(config), f"out={tmp_path / name}"]) == 0
            model_folder = tmp_path / name / "model"
        drawn = np.asarray(load(model_folder).sample(list(asked.text), range(SHOWN)))
        share = float((marks(drawn.transpose(0, 3, 1, 2).astype(np.float32) / 255) > limit).mean())
        found[name] = share, float(score(drawn, asked.targets)["bind"].mean())
        print(f"{name}: {share:.3f} bear the watermark, bind {found[name][1]:.3f}")
    assert found["raw"][0] > 0.05 and found["filtered"][0] <= max(found["raw"][0] / 5, 0.01)
