"""The plan against what runs leave on disk and against the published recipes; its words, its refusals, its JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import load
from ldm.data.cache import DATA, CacheOptions, write_cache
from ldm.data.dataset import asked, offered
from ldm.data.scenes.source import ScenesSource
from ldm.data.views import kept_bytes
from ldm.families.latent_diffusion.alignment import projection
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.families.pretrained import PretrainedAutoencoder, PretrainedText
from ldm.formats.part import load_part
from ldm.models.unet import UNetConfig
from ldm.runs.estimate import estimate
from ldm.runs.plan import duration, expected, make, operations, size_of, times
from ldm.runs.run import Encode, Run, place
from ldm.training import optim
from ldm.training.ema import Ema
from ldm.training.settings import Train

ROOT = Path(__file__).parents[2]
QUICK = ROOT / "configs" / "quickstart.yaml"
SMALL = ["data.images=64", "data.val=4"]


def quickstart(*words: str) -> Run:
    return place(load(QUICK, [*SMALL, *words], Run), QUICK)[0]


def stages(run: Run, out: Path, **more: Any) -> dict[str, Any]:
    return {stage.name: stage for stage in make(run, out, **more).stages}


@pytest.mark.slow
def test_steps_images_and_samples_are_those_of_the_stages(tmp_path: Path) -> None:
    run = quickstart()
    found = make(run, tmp_path, processes=2, tflops=1)
    assert found.processes == 2 and found.training_images == 64 and found.validation_images == 4
    for stage in found.stages:
        said = run.stages[stage.name]
        if isinstance(said, Train):
            assert (stage.images, stage.steps, stage.batch, stage.samples) == (said.images, said.steps, said.batch, 64)
            assert stage.micro_batch * stage.passes * 2 == said.batch
            assert stage.seconds == pytest.approx(stage.flops * said.images / 2e12)
    assert found.seconds == pytest.approx(sum(stage.seconds for stage in found.stages))


def test_checkpoints_are_as_large_as_said() -> None:
    for word in ("adamw", "muon"):
        run = quickstart(f"stages.diffusion-low.optim.kind={word}")
        stage = run.stages["diffusion-low"]
        assert isinstance(stage, Train)
        parts = estimate(run)
        model = parts.models["diffusion"]
        assert isinstance(model, LatentDiffusion)
        denoiser = model.fitted({role: parts.models[name] for role, name in model.inputs().items()}, print)[0].build()
        tower = parts.models["text"].image_tower(32, print)
        network = torch.nn.ModuleList([denoiser, projection(denoiser.config.aligned_width, tower.width)])  # the quickstart's is aligned
        player = optim.ParameterGroup("model", list(network.parameters()))
        optimizers = optim.build(stage.optim, [player])
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        tensors = [*network.state_dict().values(), *optim.state_tensors(optimizers).values(), *Ema(player.parameters, 0.9).state().values()]
        real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert parts.training(stage).checkpoint_bytes == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("flip", [False, True])
def test_a_latent_cache_is_as_large_as_said(tmp_path: Path, flip: bool) -> None:
    run = quickstart()
    data = ScenesSource(tier="one", images=64, val=4).build("train")
    data.mirrors = True  # type: ignore[misc]
    parts = estimate(run)

    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = torch.zeros(len(image), parts.models["autoencoder"].latent_network(print).latent_width, 4, 4)
        return latent, latent

    write_cache(tmp_path / "cache", data, encode, CacheOptions(autoencoder="x", resolution=32, flip=flip))
    real = sum(file.stat().st_size for file in (tmp_path / "cache").rglob(DATA))
    _, each = parts.encoding(Encode(resolution=32), 2 if flip else 1)
    assert 64 * each == pytest.approx(real, rel=0.05)


def test_a_cache_with_views_is_as_large_as_said(tmp_path: Path) -> None:
    views, side = ("embedding", "labels", "small:4", "boxes"), 32
    data = asked(ScenesSource(tier="one", images=64, val=4).build("train"), views)

    def encode(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(image), 1, 1, 1), torch.zeros(len(image), 1, 1, 1)

    write_cache(tmp_path / "cache", data, encode, CacheOptions(autoencoder="x", resolution=side, views=views))
    real = sum(file.stat().st_size for file in (tmp_path / "cache").rglob(DATA))
    said = sum(kept_bytes(kind, side) for kind in offered(data, views).values())
    assert said == 3 * side**2 + 2 * side**2 + 3 * 8**2 and 64 * said == pytest.approx(real, rel=0.05)
    run = quickstart()
    found = {stage.name: stage.cache_bytes / max(stage.images, 1) for stage in make(run, tmp_path / "run").stages}
    assert run.views_kept("latents-high") == ("embedding",)
    assert 3 * 64**2 < found["latents-high"] < 1.3 * 3 * 64**2 and 3 * 32**2 < found["latents-low"] < 1.3 * 3 * 32**2


def test_memory_is_shared_out_by_what_it_is_for() -> None:
    run = quickstart()
    stage = run.stages["diffusion-low"]
    assert isinstance(stage, Train)
    needs = estimate(run).training(replace(stage, precision="fp32", optim=optim.AdamW()))
    memory = needs.memory(8)
    weights = 4 * needs.learned
    assert memory["weights"] == memory["gradients"] == memory["EMA"] == weights and memory["optimiser"] == 2 * weights
    assert "cast weights" not in memory and memory["activations"] == 8 * needs.footprint.cost.activations
    assert memory["frozen parts"] == 4 * sum(needs.footprint.frozen.values())
    half = estimate(run).training(replace(stage, ema=0.0)).memory(8)
    assert "EMA" not in half and half["cast weights"] == weights // 2 and half["activations"] == memory["activations"] // 2


def test_further_resolutions_share_the_time_and_the_largest_fills_the_memory() -> None:
    run = quickstart()
    both = run.stages["autoencoder"]  # 64 px and 32 px in turn
    assert isinstance(both, Train)
    parts = estimate(run)
    low, high = (parts.training(replace(both, resolution=side, also=())) for side in (32, 64))
    mixed = parts.training(both)
    assert mixed.flops == pytest.approx((low.flops + high.flops) / 2, rel=1e-6)
    assert mixed.memory(8) == high.memory(8)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stages.text.batch: 128 cannot be shared by 3 processes"):
        make(quickstart(), tmp_path, processes=3)


def test_a_filter_counts_its_samples_and_refuses_before_any_work(tmp_path: Path) -> None:
    web = quickstart("data.web=true", "data.images=400", "stages.latents-low.filter.min_aesthetic=5", "stages.text.filter.min_side=64")
    found = stages(web, tmp_path)
    assert 100 < found["latents-low"].samples == found["latents-low"].images < 400 and found["text"].samples < 400
    with pytest.raises(UserError, match=r"stages.latents-low.filter.min_aesthetic: this data"):
        make(quickstart("stages.latents-low.filter.min_aesthetic=5"), tmp_path)


def test_filters_and_caption_dropout_stand_where_they_act() -> None:
    with pytest.raises(UserError, match=r"stages.diffusion-low.filter: .*write stages.latents-low.filter instead"):
        quickstart("stages.diffusion-low.filter.min_side=64")
    with pytest.raises(UserError, match=r"stages.text.caption_dropout: a model of kind clip drops no captions; leave it out"):
        quickstart("stages.text.caption_dropout=0.1")


# What others have trained


def begun(**parts: Any) -> Run:
    stage = Train(model="diffusion", images=8, resolution=64)
    given = {"text": PretrainedText(path="x"), "autoencoder": PretrainedAutoencoder(path="x"), "diffusion": LatentDiffusion()}
    return Run(data=ScenesSource(), stages={"train": stage}, models=given | parts)


def test_a_base_model_is_counted_from_its_folder(tmp_path: Path) -> None:
    from pipelines import pipeline_folder

    folder = pipeline_folder(tmp_path)
    run = Run(
        data=ScenesSource(),
        init=str(folder),
        models={"diffusion": LatentDiffusion()},
        stages={"train": Train(model="diffusion", images=8, resolution=64)},
    )
    found = estimate(run)
    wanted = {}
    for part in ("text_encoder", "vae", "unet"):
        _, state = load_part(folder / part)
        wanted[part] = sum(value.numel() for value in state.values())
    parts = {"text": "text_encoder", "autoencoder": "vae", "diffusion": "unet"}
    assert {parts[name]: count for name, count in found.parameters.items()} == wanted and not found.notes


def test_pretrained_parts_are_counted_from_their_folders(tmp_path: Path) -> None:
    from finished_model import KL, TEXT, VQ, autoencoder_product, text_product

    from ldm.text.encoder import TextEncoder

    text = text_product(tmp_path / "text")
    for folder in (text, text / "text_encoder"):  # a model's folder, and the part alone
        notes: list[str] = []
        shape = PretrainedText(path=str(folder), max_tokens=8).text_shape(notes.append)
        assert shape.parameters == sum(p.numel() for p in TextEncoder.load(text).model.parameters())
        assert (shape.width, shape.tokens, notes) == (TEXT.width, 8, [])
    for kind, made in (("kl", KL), ("vq", VQ)):
        folder = autoencoder_product(tmp_path / kind, kind)  # type: ignore[arg-type]
        found = PretrainedAutoencoder(path=str(folder)).latent_network((notes := []).append)
        assert (found, notes) == (made, [])


@pytest.mark.parametrize(("width", "parameters", "name"), [(768, 123_060_480, "CLIP ViT-L/14"), (1024, 340_387_840, "OpenCLIP")])
def test_pretrained_parts_that_are_not_here_are_counted_as_published_and_it_says_so(width: int, parameters: int, name: str) -> None:
    diffusion = LatentDiffusion(network=UNetConfig(context_width=width))
    asked = begun(text=PretrainedText(path="some/where"), autoencoder=PretrainedAutoencoder(path="else/where"), diffusion=diffusion)
    found = estimate(asked)
    assert found.parameters["text"] == parameters
    said = "; ".join(found.notes)
    assert name in said and "some/where" in said and "else/where" in said and "kl-f8" in said


# The verb


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", *words, "--plan"]) == 0
    return capsys.readouterr().out


def test_words_choose_processes_and_speed_and_the_assumption_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = [str(QUICK), f"out={tmp_path}", *SMALL]
    said = plan(capsys, *base, "--processes", "4", "--tflops=2.5")
    assert "at 4 processes of 2.5 TFLOP/s (as told)" in said and "batch 128: 32 on each process" in said
    assert "run   text" in said and "not done yet" in said and not list(tmp_path.iterdir())
    assert "assumed for" in plan(capsys, *base)
    values = json.loads(plan(capsys, *base, "--json", "--tflops", "2.5"))
    assert values["tflops"] == 2.5 and values["parameters"]["diffusion"] == 8_538_248
    assert [stage["name"] for stage in values["stages"]][:2] == ["text", "autoencoder"]


@pytest.mark.parametrize(
    "words", [["--processes"], ["--processes", "0"], ["--processes=1.5"], ["--tflops", "x"], ["--tflops=inf"], ["--tflops", "-1"]]
)
def test_numbers_that_are_none_are_told(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["train", str(QUICK), "--plan", *words]) == 2
    assert f"{words[0].partition('=')[0]}: got" in capsys.readouterr().err
    assert main(["train", str(QUICK), "--tflops", "3"]) == 2
    assert "--tflops: only together with --plan" in capsys.readouterr().err


def test_data_that_is_not_there_is_planned_without(capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(
        capsys,
        str(ROOT / "configs/autoencoder-kl-f8.yaml"),
        "data.path=nowhere",
        "models.autoencoder.perceptual.weights=x",
        "--processes",
        "8",
    )
    assert "note: planned without the data, so without its counts (data.path: nowhere is not a folder" in said
    assert "autoencoder 83,653,863" in said and "7,897,696 images at 256 px, 246,803 updates" in said and "4 on each process" in said


def test_amounts_read_well() -> None:
    assert [times(passes) for passes in (0.5, 3.125, 217.4, 13333.3)] == ["0.5", "3.12", "217", "13,333"]
    assert [size_of(n) for n in (0, 1023, 2**20, 3.5 * 2**30, 2**41)] == ["0 B", "1023 B", "1 MiB", "3.5 GiB", "2.0 TiB"]
    assert [duration(n) for n in (3, 150, 7200, 86400 * 30)] == ["3.0 s", "2.5 min", "2.0 hours", "30.0 days"]
    assert [operations(n) for n in (5e2, 2.5e8, 8.033e11, 2.4068e12, 4e13)] == [
        "500 FLOP",
        "250 MFLOP",
        "803.3 GFLOP",
        "2,407 GFLOP",
        "40.0 TFLOP",
    ]


def test_what_the_bar_expects_is_what_the_plan_says_and_leaves_no_trace(tmp_path: Path) -> None:
    run = quickstart()
    before = torch.get_rng_state()
    found = expected(run, 4, "NVIDIA H200")
    assert torch.equal(torch.get_rng_state(), before)
    planned = stages(run, tmp_path)
    assert list(found) == [name for name, stage in planned.items() if stage.kind in ("train", "encode")]
    for name, stage in found.items():
        assert stage.flops == planned[name].flops > 0
        assert stage.peak == (4 * 989e12 if planned[name].kind == "train" else 0)  # the quickstart trains in bfloat16
