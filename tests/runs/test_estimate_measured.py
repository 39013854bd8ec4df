"""The plan's memory against the live bytes of a real training, where activations, gradients or neither are the most of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from live_bytes import LiveBytes

from ldm.__main__ import main
from ldm.config.schema import build
from ldm.runs.estimate import estimate
from ldm.runs.run import Run
from ldm.training.loop import Trainer
from ldm.training.settings import Train

pytestmark = pytest.mark.slow
SIZES: dict[str, tuple[dict[str, Any], int, int]] = {  # the U-Net, px, batch
    "activations": ({"channels": [64, 64], "attention": [False, True], "heads": 2}, 32, 8),
    "little attention": ({"channels": [64, 64, 64], "attention": [False, False, False], "heads": 2}, 32, 8),
    "both": ({"channels": [96, 192], "attention": [False, True], "heads": [3, 6]}, 16, 4),
    "gradients": ({"channels": [128, 256, 256], "attention": [False, False, True], "heads": [2, 4, 4]}, 16, 1),
}


@pytest.mark.parametrize(
    ("size", "more"),
    [
        ("activations", {}),
        ("both", {}),
        ("gradients", {}),
        ("activations", {"micro_batch": 2}),
        ("little attention", {"precision": "bf16"}),  # whose scores this CPU's kernels keep, and a GPU's do not
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_peak(
    size: str, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, side, batch = SIZES[size]
    network = {**network, "layers": 1, "context_width": 0}
    stage = {"kind": "train", "model": "diffusion", "resolution": side, "batch": batch, "images": 2 * batch, "samples": 0, "held_out": 0}
    run = {
        "data": {"kind": "scenes", "tier": "one", "images": 16, "val": 4},
        "models": {
            "pixels": {"kind": "pixels"},
            "diffusion": {"kind": "latent_diffusion", "text": "", "autoencoder": "pixels", "network": network},
        },
        "stages": {"train": {**stage, "precision": "fp32", "optim": {"kind": "adamw", "lr": 1e-4}, **more}},
    }
    built = build(run, Run, "run")
    asked = built.stages["train"]
    assert isinstance(asked, Train)
    planned = estimate(built).training(asked).memory(asked.micro_batch or batch)
    live, peaks, update = LiveBytes(), [], Trainer._update

    def measured(self: Trainer, *given: Any, **named: Any) -> Any:
        live.peak = live.now
        found = update(self, *given, **named)
        peaks.append(live.peak)
        return found

    monkeypatch.setattr(Trainer, "_update", measured)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    with live:
        assert main(["train", str(tmp_path / "run.yaml"), f"out={tmp_path / 'out'}"]) == 0
    ratio = sum(planned.values()) / max(peaks)
    print(f"\n{size} {more}: planned {sum(planned.values()) / 1e6:.1f} MB, measured {max(peaks) / 1e6:.1f} MB: {ratio:.3f}")
    assert 0.9 < ratio < 1.1, planned
