"""Training in bf16 on a CPU: every kind of model, its held-out loss, its previews and its cached latents or codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from systems import SYSTEMS, run_of

from ldm.__main__ import main
from ldm.training import loop, optim
from ldm.training.log import read


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in bf16 also where a CPU has no instructions for it."""
    for module in (loop, optim):
        monkeypatch.setattr(module, "computed_in", lambda precision, device: precision)


def trained(config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The log of a run, whose training stages all compute in bf16."""
    for stage in config["stages"].values():
        if stage["kind"] == "train":
            stage |= {"precision": "bf16", "samples": 2, "sample_every_images": 16}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["train", str(file), f"out={folder / 'run'}"]) == 0
    return read(folder / "run" / "log.jsonl")


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_trains(system: str, kl_model: Path, tmp_path: Path) -> None:
    losses = [line["loss"] for line in trained(run_of(system, kl_model), tmp_path) if "step" in line and line["stage"] == "last"]
    assert losses and all(math.isfinite(loss) for loss in losses)


def test_cached_latents_and_their_held_out_loss(kl_model: Path, tmp_path: Path) -> None:
    config = run_of("residual", kl_model)
    del config["models"]["diffusion"]["conditions"], config["models"]["diffusion"]["learn"]
    latents = {"kind": "encode", "resolution": 32}
    config["stages"] = {"latents": latents, "last": config["stages"]["last"] | {"latents": "latents", "held_out": 8}}
    found = [line for line in trained(config, tmp_path) if "loss_by_level" in line]
    assert found and all(math.isfinite(value) for line in found for value in line["loss_by_level"]["held_out"])
