"""What fine-tuning needs by the plan, compared with the networks themselves, and the presets that promise a memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.config.schema import build, load
from ldm.models.lora import adapted_count, inject
from ldm.models.unet import UNet, UNetConfig
from ldm.runs.estimate import Needs, estimate
from ldm.runs.run import Run
from ldm.training.settings import Train


def test_adapters_are_counted_as_they_are_injected() -> None:
    made = UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=2, norm_groups=8, context_width=32)
    targets = (*UNet.lora_targets, "conv1")
    assert adapted_count(made.build(), 3, targets) == sum(p.numel() for p in inject(made.build(), 3, 3.0, targets))


def frozen(needs: Needs) -> int:
    return sum(needs.footprint.frozen.values())


def run_of(adapt: dict[str, object] | None) -> Run:
    stage = {"kind": "train", "model": "diffusion", "images": 8, "resolution": 64, "batch": 2, "samples": 0}
    diffusion: dict[str, object] = {"kind": "latent_diffusion"} | ({"adapt": adapt} if adapt else {})
    return build(
        {"data": {"kind": "scenes"}, "init": "owner/name", "models": {"diffusion": diffusion}, "stages": {"tune": stage}}, Run, "run"
    )


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


PRESETS = sorted((Path(__file__).parents[2] / "configs" / "presets").glob("*gb.yaml"))


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_presets_keep_their_promise(file: Path) -> None:
    """A tenth of the memory is left for what the estimate does not count."""
    run = load(file, [], Run)
    stage = run.stages["lora"]
    assert isinstance(stage, Train)
    needs = estimate(run).training(stage)
    assert needs.parameters["unet"] == 859_520_964
    assert sum(needs.memory(stage.micro_batch).values()) < 0.9 * int(file.stem.split("-")[-1].removesuffix("gb")) * 1e9


def test_stable_diffusion_xl_is_counted_whole_where_its_files_are_not_here() -> None:
    run = load(PRESETS[0].parents[1] / "finetune-sdxl-lora.yaml", ["models.diffusion.adapt.text_rank=8"], Run)
    stage = run.stages["lora"]
    assert isinstance(stage, Train)
    needs = estimate(run).training(stage)
    assert needs.parameters["unet"] == 2_567_463_684
    assert needs.parameters["text encoder"] == 123_060_480 + 694_659_840  # CLIP ViT-L/14's and OpenCLIP ViT-bigG/14's, which is projected
    assert needs.footprint.learned["text adapters"] == 8 * 2 * 4 * (11 * 768 + 32 * 1280)  # the first one's last layer is not read


def test_there_are_presets() -> None:
    assert {file.stem for file in PRESETS} == {"lora-6gb", "lora-8gb", "lora-12gb"}
