"""Families through torch's compiler: the same losses, weights and pictures, in whole graphs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finished_model import token_model
from safetensors.torch import load_file
from systems import run_of

import ldm
from ldm.__main__ import main
from ldm.families.draws import Running
from ldm.models import inference
from ldm.training import loop

GAME = {"weight": 0.5, "start": 0, "discriminator": {"channels": 8, "layers": 1, "norm_groups": 4}}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that were taken of networks, and run as they are: each network must be one."""
    found: list[Any] = []
    own = torch.nn.Module.compile

    def backend(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: own(self, backend=backend, fullgraph=True, **options))
    monkeypatch.setattr(loop, "check_compiler", lambda device: None)
    return found


def trained(made: dict[str, Any], folder: Path, compiled: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Each stage's last loss, and the last one's weights."""
    own = copy.deepcopy(made)
    for each in own["stages"].values():
        if each["kind"] == "train":
            each |= {"compile": compiled, "ema": 0.0, "log_every_steps": 100}
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**own, "out": str(folder), "workers": 0}, sort_keys=False))
    assert main(["train", str(file)]) == 0
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    files = sorted((folder / "stages/last/model").rglob("*.safetensors"))
    weights = {f"{each.parent.name}/{name}": value for each in files for name, value in load_file(each).items()}
    return {line["stage"]: line["loss"] for line in lines if "step" in line and "loss" in line}, weights


@pytest.mark.parametrize("system", ["masked", "words", "prior", "gan", "cvae"])
def test_a_compiled_system_learns_the_same(system: str, tmp_path: Path, graphs: list[Any]) -> None:
    made = run_of(system, tmp_path)
    if system == "masked":
        made["models"]["autoencoder"]["adversarial"] = GAME
    losses, weights = trained(made, tmp_path / "plain", False)
    assert not graphs
    found, others = trained(made, tmp_path / "compiled", True)
    assert graphs and found == pytest.approx(losses, rel=1e-3)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


def test_compiled_codes_are_drawn_the_same(tmp_path: Path, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "check_compiler", lambda device: None)
    folder = token_model(tmp_path)
    plain, compiled = (ldm.load(folder, running=Running(compiled=on)).sample(["a red ring", "b"], [1, 2]) for on in (False, True))
    assert graphs and torch.equal(plain, compiled)
