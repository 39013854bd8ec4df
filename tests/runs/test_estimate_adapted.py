"""What fine-tuning needs by the plan, compared with the networks themselves, and the presets that promise a memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from ldm.config.schema import build, load
from ldm.diffusion.batch import Cond, Text
from ldm.families.latent_diffusion.fine_tuning import LowRank, read_layers
from ldm.models import cost
from ldm.models.cost import TextShape
from ldm.models.lora import Method, adapted_count, halvable, inject
from ldm.models.text_tower import TowerPair, towers
from ldm.models.unet import UNet, UNetConfig
from ldm.runs.estimate import Needs, estimate
from ldm.runs.run import Run
from ldm.training.settings import Train

SMALL = UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=2, norm_groups=8, context_width=32)


def test_adapters_are_counted_as_they_are_injected() -> None:
    targets = (*UNet.lora_targets, "conv1")
    assert adapted_count(SMALL.build(), 3, targets) == sum(p.numel() for p in inject(SMALL.build(), 3, 3.0, targets))


def frozen(needs: Needs) -> int:
    return sum(needs.footprint.frozen.values())


def run_of(adapt: dict[str, object] | None, checkpointing: bool = False) -> Run:
    stage = {"kind": "train", "model": "diffusion", "images": 8, "resolution": 64, "batch": 2, "samples": 0}
    diffusion: dict[str, object] = {"kind": "latent_diffusion", "network": {"checkpointing": checkpointing}}
    diffusion |= {"adapt": adapt} if adapt else {}
    return build(
        {"data": {"kind": "scenes"}, "init": "owner/name", "models": {"diffusion": diffusion}, "stages": {"tune": stage}}, Run, "run"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapt", [{"kind": "lora", "rank": 4}, {"kind": "lora", "text_rank": 2}, {"kind": "textual_inversion", "token": "<it>", "init": "it"}]
)
def test_little_learns_and_the_rest_is_held_once(adapt: dict[str, object]) -> None:
    with torch.device("meta"):
        needs = {}
        for name, chosen in (("all", None), ("adapted", adapt)):
            run = run_of(chosen)
            stage = run.stages["tune"]
            assert isinstance(stage, Train)
            needs[name] = estimate(run).training(stage)
    assert needs["adapted"].learned < needs["all"].learned / 20
    assert frozen(needs["adapted"]) == frozen(needs["all"]) + needs["all"].learned
    if adapt == {"kind": "lora", "rank": 4}:  # else the text encoder's backward pass is there, too
        assert needs["adapted"].footprint.cost.backward == needs["all"].footprint.cost.backward // 2
    assert sum(needs["adapted"].memory(2).values()) < sum(needs["all"].memory(2).values())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_copies_of_frozen_weights_are_counted(checkpointing: bool) -> None:
    """What autocast makes of weights that do not learn is kept by the graph, but of recomputed blocks one at a time."""
    made = replace(SMALL, checkpointing=checkpointing).build()
    made.requires_grad_(False)
    inject(made, 2, 2.0, UNet.lora_targets)
    halves = [p.bfloat16() for p in made.parameters() if not p.requires_grad and p.ndim > 1]
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        shapes = (tensor, tensor.T) if tensor.ndim == 2 else (tensor,)
        if any(one.shape == own.shape and torch.equal(one, own) for one in shapes for own in halves):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cond = Cond(text=Text(tokens=torch.randn(1, 5, 32), mask=torch.ones(1, 5, dtype=torch.bool)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        made(torch.randn(1, 4, 8, 8), torch.zeros(1), cond)
    held, whole = sum(tensor.numel() for tensor in kept.values()), cost.count(SMALL.build())
    assert held < 0.2 * whole if checkpointing else 0.7 * whole < held <= whole
    run = run_of({"kind": "lora", "method": "dora"}, checkpointing)
    stage = run.stages["tune"]
    assert isinstance(stage, Train)
    needs = estimate(run).training(replace(stage, precision="bf16"))
    assert needs.memory(1)["cast weights"] == 2 * (needs.learned + needs.footprint.passed)
    assert needs.memory(1)["frozen parts"] == 4 * frozen(needs) and not needs.footprint.halved  # DoRA reads its layers' weights
    whole = needs.parameters["unet"]
    assert 0 < needs.footprint.passed < 0.2 * whole if checkpointing else needs.footprint.passed == whole


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "dora"])
def test_frozen_weights_in_a_half_type_change_no_bit(method: Method) -> None:
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        made = SMALL.build()
        learned = inject(made, 2, 2.0, (*UNet.lora_targets, "conv1"), method)
        with torch.no_grad():
            for p in learned:
                p.add_(0.1 * torch.randn_like(p))
        before = sum(p.numel() * p.element_size() for p in made.parameters())
        for layer in halvable(made) if half else ():
            layer.bfloat16()
        freed = before - sum(p.numel() * p.element_size() for p in made.parameters())
        cond = Cond(text=Text(tokens=torch.randn(1, 5, 32), mask=torch.ones(1, 5, dtype=torch.bool)))
        with torch.autocast("cpu", torch.bfloat16):
            made(torch.randn(1, 4, 16, 16), torch.zeros(1), cond).float().square().mean().backward()
        found.append([p.grad for p in learned])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))  # type: ignore[arg-type]
    assert freed == 0 if method == "dora" else freed > 0.7 * before / 2


def test_text_adapters_of_any_kind_are_counted_as_they_are_injected() -> None:
    shape = TextShape("one", 32, 3, 7, 50, 7, 48, second=TextShape("other", 64, 2, 7, 50, 7, 96, projected=40))
    for method in get_args(Method):
        config = LowRank(method=method, rank=2, alpha=2.0, text_rank=2, text_targets=("q_proj", "fc1"))
        model = shape.built()
        assert isinstance(model, TowerPair) and cost.count(model) == shape.parameters and shape.pooled == 40
        injected = [inject(tower, 2, 2.0, read_layers(model, tower, config.text_targets), method) for tower in towers(model)]
        assert config.count(SMALL.build(), shape)["text adapters"] == sum(p.numel() for part in injected for p in part), method


PRESETS = sorted((Path(__file__).parents[2] / "configs" / "presets").glob("*gb.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_presets_keep_their_promise(file: Path) -> None:
    """A tenth of the memory is left for what the estimate does not count."""
    run = load(file, [], Run)
    (stage,) = (stage for stage in run.stages.values() if isinstance(stage, Train))
    needs = estimate(run).training(stage)
    assert needs.parameters["unet"] == (2_567_463_684 if file.stem.startswith("sdxl") else 859_520_964)
    assert sum(needs.memory(stage.micro_batch).values()) < 0.9 * int(file.stem.split("-")[-1].removesuffix("gb")) * 1e9


@pytest.mark.slow
def test_stable_diffusion_xl_is_counted_whole_where_its_files_are_not_here() -> None:
    run = load(PRESETS[0].parents[1] / "finetune-sdxl-lora.yaml", ["models.diffusion.adapt.text_rank=8"], Run)
    stage = run.stages["lora"]
    assert isinstance(stage, Train)
    needs = estimate(run).training(stage)
    assert needs.parameters["unet"] == 2_567_463_684
    assert needs.parameters["text encoder"] == 123_060_480 + 694_659_840  # CLIP ViT-L/14's and OpenCLIP ViT-bigG/14's, which is projected
    assert needs.footprint.learned["text adapters"] == 8 * 2 * 4 * (11 * 768 + 32 * 1280)  # the first one's last layer is not read


def test_there_are_presets() -> None:
    assert {file.stem for file in PRESETS} == {"lora-6gb", "lora-8gb", "lora-12gb", "full-6gb", "full-10gb", "sdxl-lora-10gb"}
