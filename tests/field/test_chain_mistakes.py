"""Chains that cannot fit together are refused before anything is trained; conditions that could never be told, too."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.runs.run import Run

SMALL = {"view": "small:2", "port": {"kind": "concat", "noise": 0.3}}


def run(side: int = 32, condition: dict[str, Any] = SMALL) -> Run:
    def stage(model: str, resolution: int) -> dict[str, Any]:
        return {"kind": "train", "model": model, "resolution": resolution, "images": 8, "batch": 4, "optim": {"kind": "adamw", "lr": 1e-3}}

    models = {
        "text": {"kind": "clip"},
        "autoencoder": {"kind": "pixels"},
        "diffusion": {"kind": "latent_diffusion"},
        "up": {"kind": "latent_diffusion", "after": "diffusion", "conditions": [condition]},
    }
    stages = {"text": stage("text", 16), "diffusion": stage("diffusion", 16), "up": stage("up", side)}
    return build({"data": {"kind": "scenes"}, "models": models, "stages": stages}, Run, "run.yaml")


def test_sizes_of_a_chain_are_compared_before_it_is_trained() -> None:
    assert run().stages["up"]
    with pytest.raises(UserError, match=r"stages.up.resolution: up is told 24 px \(small:2 of 48\), but diffusion, .* draws 16"):
        run(48)
    with pytest.raises(UserError, match=r"stages.up.resolution: up is told 8 px \(small:4 of 32\)"):
        run(32, {**SMALL, "view": "small:4"})
    with pytest.raises(UserError, match=r"stages.up.resolution: got 33; up is told small:2, which needs a multiple of 2"):
        run(33)
    with pytest.raises(UserError, match=r"models.up: view 'small:0': a whole number from 2 to 64"):
        run(32, {**SMALL, "view": "small:0"})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"drop": 1}, "small:2 by port concat: drop 1 never tells it"),
        ({"port": {"kind": "concat", "drawn_noise": 0.2}}, r"drawn_noise is above noise \(0\)"),
        ({"port": {"kind": "concat", "noise": 0.1, "drawn_noise": 0.2}}, r"drawn_noise is above noise \(0.1\)"),
        ({"port": "gated"}, "view small:2 is of form map; port gated takes boxes"),
        ({"port": "vector"}, "view small:2 is of form map; port vector takes embedding"),
    ],
)
def test_conditions_that_cannot_be_told_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"models.up.conditions: {'.*' if 'view' not in said else ''}{said}"):
        run(32, {**SMALL, **changed})
