"""Two processes learn what one learns, whatever is trained: codes, priors, pixels, links, conditions, and games of two networks.

The gradient's norm at the first step is that of one process up to the order of sums; later steps follow it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import several
import yaml
from systems import ATTNGAN, BEFORE, CVAE, GAN, PIXELS, UNET, VQ, stage

ADAMW = {"kind": "adamw", "lr": 1e-3}
TEXT = {"kind": "clip", "vocabulary": 600, "text": {"width": 16, "layers": 1, "heads": 2, "max_tokens": 20}}
TOKENS = {"kind": "tokens", "network": {"width": 16, "layers": 1, "heads": 2, "size_channels": 4}}
SCENES = {"kind": "scenes", "tier": "one", "images": 16, "val": 4}
VIEW = {"view": "embedding", "port": "vector", "drop": 0.3}


def learns(model: str, resolution: int = 32, **more: Any) -> dict[str, Any]:
    """A stage of three steps, each of them logged."""
    own = {"images": 24, "batch": 8, "save_every_images": 24, "log_every_steps": 1, "precision": "fp32", "optim": ADAMW}
    return stage(model, resolution, **(own | more))


def told_words() -> dict[str, Any]:
    """Everything that is told words, over one text encoder."""
    return {
        "data": SCENES,
        "models": {
            "text": TEXT,
            "autoencoder": {"kind": "vq", "network": VQ, "adversarial": {"weight": 0}},
            "masked": TOKENS | {"order": "masked"},
            "causal": TOKENS | {"order": "causal", "reads": "words"},
            "larger": TOKENS | {"after": "masked", "enlarges": 2},
            "captioner": TOKENS | {"order": "causal", "reads": "image", "writes": "caption"},
            "prior": {"kind": "prior", "network": {"heads": 2, "head_width": 8, "layers": 1}},
            "pixels": {"kind": "pixels"},
            "diffusion": PIXELS | {"autoencoder": "pixels", "conditions": [VIEW]},
            "up": {"kind": "latent_diffusion", "autoencoder": "pixels", "network": UNET, "after": "diffusion", "conditions": BEFORE},
            "gan": GAN,
            "attngan": ATTNGAN,
            "cvae": CVAE,
        },
        "stages": {
            "text": learns("text"),
            "autoencoder": learns("autoencoder"),
            "codes": {"kind": "encode", "model": "autoencoder", "resolution": 32, "codes": True},
            "masked": learns("masked", latents="codes"),
            "causal": learns("causal", latents="codes"),
            "larger": learns("larger", 64),
            "captioner": learns("captioner"),
            "prior": learns("prior"),
            "diffusion": learns("diffusion", 16),
            "up": learns("up"),
            "gan": learns("gan", 16),
            "attngan": learns("attngan", 16),
            "cvae": learns("cvae", 16),
        },
    }


def translated() -> dict[str, Any]:
    """Pictures to pictures, without pairs: four networks."""
    sizes = {"generator": {"kind": "resnet", "channels": 4, "blocks": 1}, "discriminator": {"channels": 4, "layers": 1, "norm": "instance"}}
    data = {"kind": "unpaired", "a": SCENES | {"time": "day"}, "b": SCENES | {"time": "night", "seed": 1}}
    model = {"kind": "cyclegan", "domains": ["day", "night"], **sizes}
    return {"data": data, "models": {"translator": model}, "stages": {"translator": learns("translator")}}


def steps(out: Path) -> dict[str, list[dict[str, float]]]:
    """By stage, what each step logged of losses and norms."""
    found: dict[str, list[dict[str, float]]] = {}
    for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()):
        if "stage" in line and "loss" in line:
            norms = {name: value for name, value in line["gauges"].items() if name.startswith("grad_norm")}
            found.setdefault(line["stage"], []).append({"loss": line["loss"], **line["terms"], **norms})
    return found


@pytest.mark.timeout(600)  # a dozen stages, three processes
@pytest.mark.parametrize("system", ["words", "pictures"])
def test_two_processes_learn_what_one_learns(system: str, tmp_path: Path) -> None:
    config = told_words() if system == "words" else translated()
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    found = []
    for world in (1, 2):
        ended = several.train(world, f"out={tmp_path / str(world)}", config=str(file), sizes=(), within_s=280)
        assert ended.codes == [0] * world, ended.said
        found.append(steps(tmp_path / str(world)))
    one, two = found
    trained = [name for name, of in config["stages"].items() if of["kind"] == "train"]
    assert list(one) == list(two) == trained
    for name in trained:
        assert len(one[name]) == len(two[name]) == 3, name
        assert one[name][0].keys() == two[name][0].keys() and any("grad_norm" in key for key in one[name][0]), name
        for step, tolerance in enumerate((2e-4, 5e-2, 1e-1)):  # Adam's first steps are signs, which tiny slopes change
            assert two[name][step] == pytest.approx(one[name][step], rel=tolerance, abs=1e-5), (name, step)
