"""Drawing by OpenVINO: torch's numbers to rounding, from a cache of graphs; and what it cannot do, each in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import CAPTIONS, SIDE, finished_model

import ldm
from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Text
from ldm.families.draws import PLAIN, Running, Wanted
from ldm.families.latent_diffusion.on_openvino import OnOpenVINO
from ldm.families.latent_diffusion.runtime import ready
from ldm.formats import openvino_graph
from ldm.models.denoiser import Denoiser, DenoiserConfig
from ldm.models.dit import DiTConfig
from ldm.models.mmdit import MMDiTConfig
from ldm.models.unet import UNetConfig
from ldm.sampling.recipe import Recipe, read_recipe

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
RUNNING = Running(backend="openvino")
UNET = UNetConfig(channels=(16, 32), layers=1, attention=(False, True), heads=2, norm_groups=8, context_width=12)
NETWORKS: dict[str, DenoiserConfig] = {
    "unet": UNET,
    "unet of sizes, padding hidden": replace(UNET, size_channels=8, mask_padding=True),
    "unet without text": replace(UNET, context_width=0, heads=(2, 4)),
    "dit": DiTConfig(heads=3, head_width=8, layers=1, context_width=12, sample_size=8, size_conditions=True),
    "mmdit": MMDiTConfig(heads=2, head_width=8, layers=3, context_width=12, pooled_channels=20, in_channels=4, out_channels=4, largest=6),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_model(tmp_path_factory.mktemp("openvino"))


def filled_in(config: DenoiserConfig) -> Denoiser:
    """A network none of whose weights is zero."""
    torch.manual_seed(0)
    network = config.build().eval().requires_grad_(False)
    for weight in network.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return network


def told(config: DenoiserConfig, batch: int = 3) -> Cond:
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[:, 5:] = False
    text = Text(tokens=torch.randn(batch, 7, config.context_width or 1), mask=mask, pooled=torch.randn(batch, config.pooled_width))
    return Cond(text=text, size=torch.tensor([[64.0, 48, 0, 0, 64, 48]]).expand(batch, 6))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "dit" else [pytest.mark.slow]) for name in NETWORKS])
def test_every_network_answers_as_torch_does_to_1e_5(name: str) -> None:
    network = filled_in(NETWORKS[name])
    cond, x, t = told(network.config), torch.randn(3, 4, 8, 12), torch.tensor([3.0, 500.0, 900.0])
    right = network(x, t, cond)
    assert apart(OnOpenVINO(network)(x, t, cond), right) < 1e-5


@pytest.mark.slow
def test_a_graph_is_kept_and_another_one_made_of_other_weights_and_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    network, made = filled_in(NETWORKS["dit"]), []
    convert = openvino_graph._converted
    monkeypatch.setattr(openvino_graph, "_converted", lambda *args: made.append(1) or convert(*args))
    cond, x, t = told(network.config), torch.randn(3, 4, 8, 8), torch.tensor([500.0] * 3)
    first = OnOpenVINO(network)
    right = first(x, t, cond)
    assert torch.equal(first(x, t, cond), right) and torch.equal(OnOpenVINO(network)(x, t, cond), right) and len(made) == 1
    first(torch.randn(3, 4, 8, 4), t, cond)
    assert len(made) == 2
    with torch.no_grad():
        network.get_parameter("proj_out.bias").add_(1)
    assert apart(OnOpenVINO(network)(x, t, cond), right + 1) < 1e-5 and len(made) == 3
    assert len(list((tmp_path / "openvino").iterdir())) == 3
    for file in (tmp_path / "openvino").glob("*/graph.bin"):
        file.write_bytes(file.read_bytes()[:-1])  # damaged: made again
    OnOpenVINO(network)(x, t, cond)
    assert len(made) == 4


def test_a_wrong_graph_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    network, other = filled_in(NETWORKS["dit"]), filled_in(NETWORKS["dit"])
    torch.nn.init.normal_(other.get_parameter("proj_out.weight"))
    convert = openvino_graph._converted
    monkeypatch.setattr(openvino_graph, "_converted", lambda ov, call, inputs: convert(ov, type(call)(other, call.cond), inputs))
    with pytest.raises(UserError, match=r"backend: openvino's answer lies .* from torch's; torch draws it: ldm sample --backend torch"):
        OnOpenVINO(network)(torch.randn(3, 4, 8, 8), torch.tensor([500.0] * 3), told(network.config))
    assert not list((tmp_path / "openvino").iterdir())


def test_only_what_a_process_that_is_gone_left_unfinished_is_removed(tmp_path: Path) -> None:
    gone, mine, other = "a" * 40 + ".4194305", f"{'b' * 40}.{os.getpid()}", "c" * 40
    for name in (gone, f".{gone}.partial", mine, f".{mine}.partial", other, "notes.7"):
        (tmp_path / name).mkdir()
    openvino_graph._clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {mine, f".{mine}.partial", other, "notes.7"}


def test_a_cache_that_cannot_be_written_is_noted_and_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file"))
    network, x, t = filled_in(NETWORKS["dit"]), torch.randn(3, 4, 8, 8), torch.tensor([500.0] * 3)
    cond = told(network.config)
    assert apart(OnOpenVINO(network)(x, t, cond), network(x, t, cond)) < 1e-5
    assert capsys.readouterr().err.startswith("note: LDM_CACHE: the converted network is not kept, and converted again next time")


def test_what_does_not_convert_is_refused_in_one_line() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Cond, memory: Any = None, step: Any = None) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    network: Any = filled_in(UNET)
    network.forward = Odd().forward
    with pytest.raises(UserError, match=r"backend: openvino does not convert this network .*; torch draws it: ldm sample --backend torch"):
        OnOpenVINO(network)(torch.randn(3, 4, 8, 8), torch.tensor([500.0] * 3), told(UNET))


@pytest.mark.slow
def test_pictures_are_those_of_torch_whatever_their_neighbours(model: Path) -> None:
    plain, graph = ldm.load(model), ldm.load(model, running=RUNNING)
    prompts, seeds, wanted = CAPTIONS[:3], [1, 2, 3], Wanted(steps=3, guidance=4.0)
    right = plain.sample(prompts, seeds, wanted).int()
    made = graph.sample(prompts, seeds, wanted)
    assert (made.int() - right).abs().max() <= 1
    assert torch.equal(graph.sample(prompts[2:], seeds[2:], wanted), made[2:])


@pytest.mark.slow
def test_the_command_records_the_backend_and_a_recipe_replays_it(model: Path, tmp_path: Path, capsys: Any) -> None:
    base = ["sample", CAPTIONS[0], "--model", str(model), "--steps", "2", "--out"]
    assert main([*base, str(tmp_path / "a"), "--backend", "openvino"]) == 0
    first = tmp_path / "a" / "00000_seed0.png"
    recipe = read_recipe(first)
    assert isinstance(recipe, Recipe) and recipe.backend == "openvino"
    again = ["sample", "--from", str(first), "--model", str(model), "--out"]
    assert main([*again, str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "00000_seed0.png").read_bytes() == first.read_bytes()
    assert main([*again, str(tmp_path / "c"), "--backend", "torch"]) == 0
    other = read_recipe(tmp_path / "c" / "00000_seed0.png")
    assert isinstance(other, Recipe) and other.backend == ""
    assert main(["grid", "--from", str(first), "--model", str(model), "--x", "seed=0,1", "--out", str(tmp_path / "grid.png")]) == 0
    assert getattr(read_recipe(tmp_path / "grid.png"), "backend", "") == "openvino"
    capsys.readouterr()
    assert main([*base, str(tmp_path / "d"), "--backend", "openvino", "--source", "a blue ring"]) == 2
    assert "source: takes the attention of another prompt, which is inside openvino's graph" in capsys.readouterr().err


@pytest.mark.slow
def test_merged_adapters_are_converted_with_the_network(model: Path) -> None:
    from ldm.families.latent_diffusion import family as loading
    from ldm.models.layer_adapters import Pair
    from ldm.models.lora import Lora

    torch.manual_seed(0)
    lora = Lora({"unet": {"mid_block.resnets.0.conv1": Pair(torch.randn(2, 32, 3, 3), torch.randn(32, 2, 1, 1), 2.0)}})
    found = []
    for running in (PLAIN, RUNNING):
        family = loading.load(model)
        family.adapt([(lora, 1.0)], [])
        family.ready(model, running, "fp32")
        found.append(family.sample(CAPTIONS[:1], [0], Wanted(steps=2)).int())
    assert (found[0] - found[1]).abs().max() <= 1


@pytest.mark.parametrize(
    "running, said",
    [
        ({"backend": "tensorrt"}, "backend: got 'tensorrt'; choose one of torch, openvino"),
        ({"attention": "plain"}, "attention: is torch's, not openvino's; leave it out, or draw by ldm sample --backend torch"),
        ({"compiled": True}, "compile: is torch's"),
        ({"low_memory": True}, "low_memory: is torch's"),
    ],
)
def test_what_belongs_to_torch_is_refused(model: Path, running: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ldm.load(model, running=replace(RUNNING, **running))


def test_other_devices_precisions_and_machines_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = ldm.load(model)
    with pytest.raises(UserError, match="backend: openvino computes on CPUs, and the model lies on meta; give --device cpu"):
        ready(family.to("meta"), model, RUNNING, "fp32")  # type: ignore[attr-defined]
    for half in ("bf16", "fp16"):
        with pytest.raises(UserError, match=rf"precision: got {half}; in half precision openvino rounds .*; give --precision fp32"):
            ldm.load(model, running=RUNNING).sample(CAPTIONS[:1], [0], Wanted(precision=half))
    monkeypatch.setattr(openvino_graph, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="backend: openvino is not installed here; pip install"):
        ldm.load(model, running=RUNNING)


def test_families_without_such_a_network_refuse_it(tmp_path: Path) -> None:
    from ldm.families.draws import Draws

    class Direct(Draws):
        kind = "direct"

        @property
        def defaults(self) -> dict[str, Any]:
            return {"size": (SIDE, SIDE), "chunk": 1}

        def draw(self, call: Any) -> torch.Tensor:
            raise AssertionError

    with pytest.raises(UserError, match="backend: got openvino: this model of kind direct is computed by torch alone"):
        Direct().ready(tmp_path, RUNNING, "fp32")


def test_nobody_is_told_that_it_is_used(tmp_path: Path) -> None:
    code = "import sys; from ldm.formats.openvino_graph import load_openvino as load; load(); print(sys.modules['openvino_telemetry'])"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "None" and not list(tmp_path.iterdir())
