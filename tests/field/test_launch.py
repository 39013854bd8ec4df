"""What a launch cannot train is said before any work, at a start and by --plan under the same launcher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.distributed.launcher import Launched, about, launched
from ldm.families.clip import Clip
from ldm.families.family import Family
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily
from ldm.families.latent_diffusion.fine_tuning import AdaptedFamily
from ldm.runs import execution
from ldm.runs.launch_checks import shares
from ldm.runs.run import Run
from ldm.training.loop import Trainer
from ldm.training.settings import Train

SMALL = ["data.images=16", "data.val=4"]
TWO = Launched(by="test", world=2, sharded=True)


def run(**fields: Any) -> Run:
    stage = {"kind": "train", "model": "diffusion", "images": 8, "batch": 8, "micro_batch": 4, "resolution": 32}
    models = {
        "text": {"kind": "clip"},
        "autoencoder": {"kind": "kl"},
        "diffusion": {"kind": "latent_diffusion", "text": "text", "autoencoder": "autoencoder"},
    }
    stages = {name: {**stage, "model": name} for name in ("text", "autoencoder")} | {"diffusion": stage | fields}
    return build({"data": {"kind": "scenes"}, "models": models, "stages": stages}, Run, "test")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"precision": "fp16"}, r"stages\.diffusion\.precision: fp16 .*use bf16 or fp32"),
        ({"optim": {"kind": "muon"}}, r"stages\.diffusion\.optim\.kind: muon orthogonalises whole matrices; use adamw"),
        ({"exact": True}, r"stages\.diffusion\.exact: true .*set exact=false"),
        ({"compile": True}, r"stages\.diffusion\.compile: true .*set compile=false"),
    ],
)
def test_what_sharded_weights_refuse_is_known_before_the_first_stage(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as told:
        shares(run(**fields), TWO)
    assert len(str(told.value).splitlines()) == 1 and "FSDP2" in str(told.value)
    processes: Any = SimpleNamespace(launch=TWO, world=2, main=True, device=torch.device("cpu"))
    with pytest.raises(UserError, match=said):
        execution._carry_out(run(**fields), tmp_path / "r", processes, "", "test")
    assert not (tmp_path / "r").exists()
    # One process, or no wish for it: all of them are trained.
    assert shares(run(**fields), Launched(by="test", sharded=True))["diffusion"].passes == 2
    assert shares(run(**fields), replace(TWO, sharded=False))


def test_all_of_them_are_told_at_once_and_stages_held_whole_are_not_among_them() -> None:
    wrong = run(precision="fp16", optim={"kind": "muon"})
    others = {name: replace(wrong.stages[name], precision="fp16", batch=9, micro_batch=0) for name in ("text", "autoencoder")}
    with pytest.raises(UserError) as told:
        shares(replace(wrong, stages=wrong.stages | others), TWO)
    lines = str(told.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "stages.text.batch",
        "stages.autoencoder.batch",
        "stages.diffusion.precision",
        "stages.diffusion.optim.kind",
    ]


def test_a_trainer_alone_refuses_the_same() -> None:
    stage = build({"model": "diffusion", "images": 8, "batch": 8, "resolution": 32, "precision": "fp16"}, Train, "test")
    two: Any = SimpleNamespace(launch=TWO, world=2, device=torch.device("cpu"))
    rest: Any = {"data": None, "folder": Path("s"), "key": "", "workers": 0, "processes": two, "log": None}
    with pytest.raises(UserError, match=r"FSDP2.*fp16"):
        Trainer(stage, SimpleNamespace(shardable=True), SimpleNamespace(seed=0), **rest)  # type: ignore[arg-type]


def test_configurations_know_what_their_families_can() -> None:
    """What is said before a family is built is what the family says itself."""
    adapted = build({"kind": "latent_diffusion", "text": "t", "autoencoder": "a", "adapt": {"kind": "lora"}}, LatentDiffusion, "test")
    assert LatentDiffusion(text="t", autoencoder="a").shards() is LatentDiffusionFamily.shardable is True
    assert adapted.shards() is AdaptedFamily.shardable is False
    assert Clip().shards() is Family.shardable is False


def test_a_plan_under_the_same_launcher_says_so_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    command = ["train", "configs/quickstart.yaml", "--plan", *SMALL]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "stages.diffusion-low.optim.kind: muon" in said and "stages.diffusion-high.optim.kind: muon" in said
    assert "stages.autoencoder" not in said  # it is held whole, and muon trains it
    assert main([*command, *(f"stages.diffusion-{one}.optim.kind=adamw" for one in ("low", "high"))]) == 0
    assert "note: FSDP2: text, autoencoder: every process holds these weights whole (DDP)" in capsys.readouterr().out
    assert main([*command, "--processes", "1"]) == 0
    assert "note: the launcher asks for FSDP2, but a single process" in capsys.readouterr().out


def test_what_a_launcher_asks_for_and_will_not_have_is_told() -> None:
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "false"}
    found = launched(asked, parent=[])
    work = shares(run(), found)
    said = list(about(found, "cpu", work, "file"))
    assert "sharded" not in said[0]
    assert any("single process has nobody to share weights with" in line for line in said)
    assert any("fsdp_offload_params true" in line and "activation" not in line for line in said)
    assert "weights and optimiser sharded (FSDP2)" in next(iter(about(replace(found, world=2), "cpu", work, "file")))


def test_a_missing_compiler_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    alone: Any = SimpleNamespace(launch=Launched(by="test"), world=1, main=True, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"stages\.diffusion\.compile: no C\+\+ compiler here"):
        execution._carry_out(run(compile=True), tmp_path / "r", alone, "", "test")
    assert not (tmp_path / "r").exists()
