"""Users' case: DoRA, LoHa and LoKr are trained by peft and resume exactly, and a LoRA's file is continued as the same LoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from finished_model import Pictures
from pipelines import pipeline_folder
from safetensors.torch import load_file, save_file

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import build, plain
from ldm.diffusion.rng import Rng
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.family import LatentDiffusion, load
from ldm.families.latent_diffusion.fine_tuning import LoraFamily, LowRank
from ldm.families.pretrained import PretrainedText
from ldm.formats.lora_files import read, write
from ldm.formats.part import load_part
from ldm.models.lora import Merged, adapted_count, inject, injected, targeted
from ldm.models.unet import UNetConfig
from ldm.text.wordless import SHAPE as WORDLESS

TARGETS = ("to_q", "to_out.0", "conv1")
METHODS = ("lora", "dora", "loha", "lokr")
TRAINED = [method if method in ("dora", "lokr") else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("base"))


def made(base: Path, adapt: LowRank) -> LoraFamily:
    torch.manual_seed(0)
    products = {"text": Product(base, "t"), "autoencoder": Product(base, "a")}
    context = Context(data=Pictures(), val=Pictures(), resolution=32, seed=0, total_images=8, products=products, init=Product(base, "base"))
    family = LatentDiffusion(adapt=adapt).continued(base).build(context)
    assert isinstance(family, LoraFamily)
    for module in family.frozen():
        module.eval()
    return family


def learn(family: LoraFamily, steps: range, state: Any = None) -> Any:
    """Some steps; returns the optimiser's state."""
    optimizer = torch.optim.AdamW(family.averaged(), 1e-2)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        batch = Pictures().load([0, 1], [2 * step, 2 * step + 1], 32, 0, False)
        terms, _ = family(batch, Rng(0, batch.position))
        optimizer.zero_grad()
        terms["denoising"].backward()
        optimizer.step()
    return optimizer.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_each_method_learns_resumes_exactly_and_its_files_are_its_product(base: Path, tmp_path: Path, method: Any) -> None:
    adapt = LowRank(method=method, rank=2, alpha=3, targets=TARGETS, text_rank=1)
    whole, cut, rest = (made(base, adapt) for _ in range(3))
    begin = {name: value.clone() for name, value in whole.state_dict().items()}
    learn(whole, range(3))
    optimizer = learn(cut, range(2))
    rest.load_state_dict(cut.state_dict())
    learn(rest, range(2, 3), optimizer)
    assert begin.keys() == rest.state_dict().keys()
    assert all(torch.equal(value, rest.state_dict()[name]) for name, value in whole.state_dict().items())
    assert all(not torch.equal(value, begin[name]) for name, value in whole.state_dict().items())
    whole.save(tmp_path)
    _, unet = load_part(tmp_path / "unet")
    for file in (tmp_path / "lora" / "kohya.safetensors", tmp_path / "lora" / "unet", tmp_path / "lora" / "text_encoder"):
        plain_model = load(base)
        own = Merged(plain_model.networks, [(read(file), 1.0)])
        if file.name != "text_encoder":
            found = plain_model.denoiser.state_dict()
            assert all(torch.allclose(value, found[name], atol=0 if method != "lokr" else 1e-7) for name, value in unet.items())
        own.undo()
    for name, layer in whole.inner.denoiser.named_modules():  # as peft merges it
        if name.endswith(TARGETS) and hasattr(layer, "merge"):
            layer.merge()
            torch.testing.assert_close(layer.get_base_layer().weight, unet[f"{name}.weight"], atol=1e-6, rtol=1e-5)
    theirs = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert theirs.is_file() == (method in ("lora", "dora"))
    if theirs.is_file():
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
        pipeline.load_lora_weights(theirs)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        for name, value in pipeline.unet.state_dict().items():
            torch.testing.assert_close(unet[name.replace(".base_layer", "")], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_counted_as_they_are_injected(method: Any) -> None:
    network = UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=2, norm_groups=8, context_width=32)
    with torch.device("meta"):
        counted = adapted_count(network.build(), 3, TARGETS, method)
    assert counted == sum(p.numel() for p in inject(network.build(), 3, 3.0, TARGETS, method))


def in_style(base: Path, folder: Path, style: str, method: Any = "lora") -> tuple[Path, LoraFamily]:
    """A LoRA that learned, of U-Net and text encoder, as a file of a style."""
    family = made(base, LowRank(method=method, rank=2, alpha=3, targets=TARGETS, text_rank=1 if style != "peft" else 0))
    learn(family, range(2))
    [file] = write(family.lora(), folder, style)  # type: ignore[arg-type]
    return file, family


def told(lora: Any) -> dict[str, Any]:
    """Rank, alpha and shape of each layer's adapter."""
    return {f"{part}.{name}": (p.rank, p.alpha, p.down.shape) for part, pairs in lora.pairs.items() for name, p in pairs.items()}


STYLES = [("kohya", "lora"), ("diffusers", "lora"), ("peft", "dora")]
STYLES += [pytest.param(*style, marks=pytest.mark.slow) for style in (("peft", "lora"), ("kohya", "dora"))]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize(("style", "method"), STYLES)
def test_a_file_is_continued_as_the_same_lora(base: Path, tmp_path: Path, style: str, method: Any) -> None:
    file, before = in_style(base, tmp_path, style, method)
    if style == "kohya":  # another rank and alpha of one layer
        state = load_file(file)
        name = next(name for name in state if name.endswith("attn1_to_q.lora_down.weight")).removesuffix(".lora_down.weight")
        side = len(state[f"{name}.lora_up.weight"])
        state[f"{name}.lora_down.weight"], state[f"{name}.lora_up.weight"] = torch.randn(3, side), torch.randn(side, 3)
        state[f"{name}.alpha"] = torch.tensor(5.0)
        save_file(state, file)
    adapt = LowRank(init=str(file))
    adapt.check()
    family = made(base, adapt)
    assert adapt.text_learns == (style != "peft") == bool(len(family.text))
    assert sum(adapt.count(family.inner.denoiser, None).values()) == sum(p.numel() for p in family.averaged())  # type: ignore[arg-type]
    own, theirs = load(base), load(base)
    own.adapt([(family.lora(), 1.0)], [])
    theirs.adapt([(read(file), 1.0)], [])
    for part, network in own.networks.items():
        right = theirs.networks[part].state_dict()
        assert all(torch.allclose(value, right[name], atol=1e-6) for name, value in network.state_dict().items())
    assert style != "peft" or all(torch.equal(a, b) for a, b in zip(family.averaged(), before.averaged(), strict=True))
    begin, fresh = [p.detach().clone() for p in family.averaged()], told(family.lora())
    assert style != "kohya" or {rank for rank, _, _ in fresh.values()} == {1, 2, 3}
    learn(family, range(2))
    family.save(tmp_path / "product")
    again = made(base, LowRank(init=str(tmp_path / "product" / "lora" / "kohya.safetensors")))
    assert told(again.lora()) == fresh
    assert all(torch.equal(a, b) for a, b in zip(again.averaged(), family.averaged(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(begin, family.averaged(), strict=True))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank": 4}, "rank: got 4, .* has 2"),
    ({"alpha": 2.0}, "alpha: got 2"),
    ({"method": "dora"}, "method: got dora"),
    ({"targets": ("to_k",)}, "targets"),
    ({"text_rank": 2}, "text_rank: got 2, .* has 1"),
]


@pytest.mark.slow
def test_what_is_continued_is_told_before_any_work(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's own config.yaml states rank 8 and alpha 8 where nobody asked for them, and a file of another rank is not refused for it."""
    file, _ = in_style(base, tmp_path, "kohya", "lora")
    stage = {"kind": "train", "model": "diffusion", "images": 8, "resolution": 32, "batch": 2, "samples": 0}
    diffusion = {"kind": "latent_diffusion", "adapt": {"kind": "lora", "init": str(file)}}
    run = {"data": {"kind": "scenes", "val": 4}, "init": str(base), "models": {"diffusion": diffusion}, "stages": {"tune": stage}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    code, said = main(["train", str(tmp_path / "run.yaml"), f"out={tmp_path / 'run'}", "--plan"]), capsys.readouterr()
    assert code == 0, said.err
    wanted = rf"models\.diffusion\.adapt\.init: goes on with {file}: \d+ layers of unet by LoRA of rank 2, alpha 3; "
    assert re.search(wanted + r"\d+ layers of text_encoder by LoRA of rank 1, alpha 1.5, as the file has them", said.out), said.out
    assert not LowRank().remarks()


def test_what_cannot_be_continued_is_refused(base: Path, tmp_path: Path) -> None:
    file, _ = in_style(base, tmp_path, "kohya")
    for said, words in REFUSED:
        with pytest.raises(UserError, match=words):
            LowRank(init=str(file), **said).check()
    LowRank(init=str(file), rank=2, alpha=3, targets=TARGETS, text_rank=1).check()
    with pytest.raises(UserError, match="factor: got 4, which only LoKr has"):
        LowRank(factor=4).check()
    with pytest.raises(UserError, match=r"^init: .*no such file"):
        LowRank(init=str(tmp_path / "absent.safetensors")).check()
    other = {name.replace("conv1", "conv9"): value for name, value in load_file(file).items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"of its .* layers (is|are) not in this model"):
        made(base, LowRank(init=str(tmp_path / "other.safetensors")))
    head = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{head}.diff": torch.zeros(16, 16)}, tmp_path / "diff.safetensors")
    with pytest.raises(UserError, match="only LoRA or DoRA is continued"):
        made(base, LowRank(init=str(tmp_path / "diff.safetensors")))


def test_a_run_is_told_apart_by_the_file_and_not_by_newer_fields(base: Path, tmp_path: Path) -> None:
    usual = LatentDiffusion(adapt=LowRank()).identity()["adapt"]
    assert not {"method", "factor", "init"} & usual.keys() and usual["rank"] == 8
    file, _ = in_style(base, tmp_path, "kohya")
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(file.read_bytes())
    one, other = (LatentDiffusion(adapt=LowRank(init=str(path))).identity()["adapt"] for path in (file, moved))
    assert one == other != usual
    assert build(plain(LowRank(method="lokr", factor=4)), LowRank, "x") == LowRank(method="lokr", factor=4)


@pytest.mark.parametrize(("method", "name"), [("loha", "LoHa"), ("lokr", "LoKr")])
def test_other_kinds_are_not_continued_and_that_is_known_before_any_work(method: Any, name: str, base: Path, tmp_path: Path) -> None:
    """The message said that a LoHa is of another kind than LoHa."""
    file, _ = in_style(base, tmp_path, "kohya", method)
    with pytest.raises(UserError, match=rf"init: .*kohya\.safetensors holds {name}; only LoRA and DoRA are continued: merge it"):
        LowRank(init=str(file), method=method).check()


def small() -> Any:
    network = UNetConfig(channels=(32, 64), attention=(False, True), layers=1, heads=2, norm_groups=8, context_width=32)
    with torch.device("meta"):
        return network.build()


def test_a_rank_larger_than_a_layer_is_told_once() -> None:
    targets = ("to_k", "to_out.0")
    sides = [min(layer.weight.shape) for layer in targeted(small(), targets).values()]
    over, smaller = sum(side < 40 for side in sides), {side for side in sides if side < 40}
    [line] = LowRank(rank=40, targets=targets).oversized(small(), WORDLESS)
    assert f"rank: rank 40 is larger than the smaller side ({min(smaller)}) of {over} of {len(sides)} layers," in line and len(smaller) == 1
    [line] = LowRank(rank=100, targets=targets, method="dora").oversized(small(), WORDLESS)
    assert f"smaller side ({min(sides)} to {max(sides)}) of {len(sides)} of {len(sides)} layers, which can use no more" in line
    assert not list(LowRank(rank=32, targets=targets).oversized(small(), WORDLESS))


def test_a_rank_of_lokr_that_makes_factors_whole_is_told(base: Path) -> None:
    network = small()
    inject(network, 4, 4.0, ("to_k", "to_out.0"), "lokr")
    pairs: list[Any] = list(injected(network).values())
    whole = sum(len(pair.second) == 1 for pair in pairs)
    [line] = LowRank(rank=4, targets=("to_k", "to_out.0"), method="lokr").oversized(small(), WORDLESS)
    assert f"rank 4 is so large that {whole} of {len(pairs)} layers learn the second factor whole" in line
    assert not list(LowRank(rank=1, targets=("to_k", "to_out.0"), method="lokr").oversized(small(), WORDLESS))


def test_a_rank_of_the_text_encoder_and_of_a_file_larger_than_a_layer_is_told(base: Path, tmp_path: Path) -> None:
    config = LatentDiffusion(adapt=LowRank(rank=1, text_rank=500)).continued(base)
    [line] = config.oversized({"text": PretrainedText(path=str(base))})
    assert line.startswith("adapt.text_rank: rank 500 is larger than the smaller side")
    head, rank, width = "lora_unet_mid_block_attentions_0_proj_in", 500, 16
    file = tmp_path / "x.safetensors"
    save_file({f"{head}.lora_down.weight": torch.ones(rank, width), f"{head}.lora_up.weight": torch.ones(width, rank)}, file)
    [line] = LowRank(init=str(file)).oversized(small(), WORDLESS)
    assert line.startswith("init: rank 500 is larger than the smaller side (16) of 1 of 1 layer,")
