"""What filters are for: a model trained on raw pictures of the web draws watermarks, one trained on those that pass a filter does not.

`python -m pytest -m soak -s tests/soak/test_web.py`: the quickstart twice on the "web" corpus, text encoder and autoencoder
shared, about 40 minutes. Prints the table of docs/data.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from ldm.__main__ import main
from ldm.data.scenes.render import render
from ldm.data.scenes.source import ScenesSource, prompts
from ldm.data.scenes.web import corrupt
from ldm.families.registry import load
from ldm.metrics.adherence import score

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600)]
ROOT = Path(__file__).parents[2]
SIDE, SHOWN = 64, 200
WHITE = 2  # the tone on which marks, which lighten, can hardly be seen
FILTER = "{min_aesthetic: 5, max_watermark: 0.5}"
QUICK = ["data.web=true", *(f"stages.{name}=null" for name in ("autoencoder-gate", "evaluation-low", "evaluation"))]


def marks(images: np.ndarray) -> np.ndarray:
    """How strongly pictures (N,3,R,R) in [0,1] bear the corpus' dashed diagonals: the slope of their fine detail on these."""
    rng = ScenesSource(tier="one", images=4, web=True).build("train").web([0])
    rng.watermarked[:], rng.enlarged[:], rng.blur[:], rng.noise[:] = True, False, 0, 0
    pattern = corrupt(np.zeros((1, 3, SIDE, SIDE), np.float32), rng)[0, 0]

    def fine(grey: np.ndarray) -> np.ndarray:
        return grey - ndimage.uniform_filter(grey, (0, 9, 9) if grey.ndim == 3 else 9)

    wanted = fine(pattern)
    return (fine(images.mean(1)) * wanted).sum((1, 2)) / (wanted**2).sum()


def test_the_filter_keeps_watermarks_out_of_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    data = ScenesSource(tier="one", images=4000, web=True).build("train")
    numbers = np.flatnonzero(data.specs(np.arange(3000)).tone != WHITE)
    web = data.web(numbers)
    spoilt = marks(corrupt(render(data.specs(numbers), SIDE), web))
    limit = float(np.quantile(spoilt[~web.watermarked], 0.999))
    caught = float((spoilt[web.watermarked] > limit).mean())
    print(f"\nof {int(web.watermarked.sum())} marked training pictures {caught:.3f} are recognised, of others 0.001")
    assert caught > 0.9
    assert main(["train", "configs/quickstart.yaml", *QUICK, f"out={tmp_path / 'raw'}"]) == 0
    shutil.copytree(tmp_path / "raw", tmp_path / "filtered")
    words = [f"stages.latents-{size}.filter={FILTER}" for size in ("low", "high")]
    assert main(["train", "configs/quickstart.yaml", *QUICK, *words, f"out={tmp_path / 'filtered'}"]) == 0
    asked = prompts("one", SHOWN * 2, seed=79)
    rows = np.flatnonzero(asked.specs.tone != WHITE)[:SHOWN]
    texts, targets = [asked.text[i] for i in rows], [asked.targets[i] for i in rows]
    found: dict[str, float] = {}
    for name in ("raw", "filtered"):
        model = load(tmp_path / name / "model")
        drawn = np.asarray(model.sample(texts, range(len(rows))))
        found[name] = float((marks(drawn.transpose(0, 3, 1, 2).astype(np.float32) / 255) > limit).mean())
        print(f"{name}: {found[name]:.3f} bear the watermark, bind {score(drawn, targets)['bind'].mean():.3f}")
    assert found["raw"] > 0.05 and found["filtered"] <= found["raw"] / 5
