"""Adapters and new words: they alone learn, files and merged weights say the same, and a stopped stage ends with the same bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from pipelines import pipeline_folder
from safetensors.torch import load_file
from torch import Tensor

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.diffusion.rng import Rng
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.family import LatentDiffusion, load
from ldm.families.latent_diffusion.fine_tuning import AdaptedFamily, InvertedFamily, LoraFamily, LowRank, TextualInversion
from ldm.families.latent_diffusion.personalisation import Adapt
from ldm.formats.embedding_files import DIFFUSERS, read_embedding
from ldm.formats.lora_files import read
from ldm.formats.part import load_part
from ldm.formats.tensor_file import read_texts
from ldm.models.lora import Lora, Merged, own_state
from ldm.runs.estimate import estimate
from ldm.runs.run import Run
from ldm.text.encoder import TextEncoder
from ldm.text.textual_inversion import add_word, first_embeddings, names

BOTH = LowRank(rank=3, alpha=6, text_rank=2, targets=("to_q", "to_k", "to_v", "to_out.0", "conv1"))
WORD = TextualInversion(token="<thing>", init="a red square", vectors=2)
SCENES = {"kind": "scenes", "images": 32, "val": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion written by diffusers; read only."""
    return pipeline_folder(tmp_path_factory.mktemp("base"))


def made(base: Path, adapt: Any) -> Any:
    from finished_model import Pictures

    torch.manual_seed(0)
    products = {"text": Product(base, "t"), "autoencoder": Product(base, "a")}
    context = Context(data=Pictures(), val=Pictures(), resolution=32, seed=0, total_images=8, products=products, init=Product(base, "base"))
    family = LatentDiffusion(adapt=adapt).continued(base).build(context)
    assert isinstance(family, AdaptedFamily)
    for module in family.frozen():
        module.eval()
    return family


def learn(family: AdaptedFamily, steps: int = 2) -> list[Tensor]:
    """A few steps; returns what the parameters were before."""
    from finished_model import Pictures

    before = [p.detach().clone() for p in family.averaged()]
    optimizer = torch.optim.AdamW(family.averaged(), 1e-2)
    for step in range(steps):
        batch = Pictures().load([0, 1], [2 * step, 2 * step + 1], 32, 0, False)
        terms, _ = family(batch, Rng(0, batch.position))
        optimizer.zero_grad()
        terms["denoising"].backward()
        optimizer.step()
    return before


def test_only_adapters_learn(base: Path) -> None:
    family: LoraFamily = made(base, BOTH)
    plain = load(base)
    frozen = {id(p) for module in family.frozen() for p in module.parameters() if not p.requires_grad}
    learned = family.averaged()
    assert [p.name for p in family.parameter_groups()] == ["model", "text"] and len(family.text) == 2 * 4 * 2
    assert len(family.state_dict()) == len(learned) and not frozen & {id(p) for p in learned}
    before = learn(family)
    assert all(not torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    for name, value in plain.denoiser.state_dict().items():
        layer, _, end = name.rpartition(".")
        own = family.inner.denoiser.state_dict()
        assert torch.equal(value, own.get(name, own.get(f"{layer}.base_layer.{end}")))  # type: ignore[arg-type]


def test_the_product_of_lora_is_the_base_with_its_file_merged(base: Path, tmp_path: Path) -> None:
    family: LoraFamily = made(base, BOTH)
    learn(family)
    family.save(tmp_path)
    kohya, theirs = tmp_path / "lora" / "kohya.safetensors", tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    said = read_texts(kohya)
    assert said["ss_sd_model_hash"] == said["ldm_base_hash"] == "base" and said["ss_network_module"] == "networks.lora"
    plain = load(base)
    networks: Any = {"unet": plain.denoiser, "text_encoder": plain.text.model}
    merged = Merged(networks, [(read(kohya), 1.0)])
    _, unet = load_part(tmp_path / "unet")
    assert all(torch.equal(value, plain.denoiser.state_dict()[name]) for name, value in unet.items())
    text = TextEncoder.load(tmp_path)
    assert torch.equal(text.encode(["a red square"]).tokens, plain.text.encode(["a red square"]).tokens)
    merged.undo()
    assert not torch.equal(text.encode(["blue"]).tokens, load(base).text.encode(["blue"]).tokens)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(theirs)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for name, value in pipeline.unet.state_dict().items():
        torch.testing.assert_close(unet[name.replace(".base_layer", "")], value, atol=1e-6, rtol=1e-5)
    assert {file.name for file in (tmp_path / "lora").rglob("*.safetensors")} == {
        "kohya.safetensors",
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
    }
    assert isinstance(read(tmp_path / "lora" / "unet"), Lora)


@pytest.mark.parametrize("adapt", [BOTH, WORD], ids=["lora", "word"])
def test_frozen_weights_in_a_half_type_leave_the_product_as_it_is(base: Path, tmp_path: Path, adapt: Any) -> None:
    """To the bit; what it is made of is read again from the base's files, which must be those that training began with."""
    from finished_model import Pictures

    files = []
    for half in (False, True):
        family, folder = made(base, adapt), tmp_path / str(half)
        if half:
            family.compute_in(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            learn(family)
        family.save(folder)
        files.append({file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.safetensors")})
    assert files[0] == files[1] and family.inner.denoiser.conv_in.weight.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert family.eval().preview(Pictures().load([0], [0], 32, 0, False), 0).shape == (1, 3, 32, 32)
    other = load(base).denoiser
    other.conv_in.weight.data[0] += 1  # type: ignore[union-attr, operator]
    family.inner.anew = lambda: other
    with pytest.raises(UserError, match=r"conv_in\.weight of the base model has changed since the training began"):
        family.save(tmp_path / "changed")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_quantized_base_is_whole_in_the_product(base: Path, tmp_path: Path, bits: Any, kind: torch.dtype) -> None:
    from finished_model import Pictures

    family: LoraFamily = made(base, replace(BOTH, base_precision=bits))
    family.compute_in(kind)
    assert any(hasattr(layer, "codes") for layer in family.inner.denoiser.modules())
    with torch.autocast("cpu", torch.bfloat16, enabled=kind != torch.float32):
        learn(family)
        with torch.no_grad():
            assert family.eval().preview(Pictures().load([0], [0], 32, 0, False), 0).shape == (1, 3, 32, 32)
    family.save(tmp_path)
    plain = load(base)
    networks: Any = {"unet": plain.denoiser, "text_encoder": plain.text.model}
    Merged(networks, [(read(tmp_path / "lora" / "kohya.safetensors"), 1.0)])
    _, unet = load_part(tmp_path / "unet")
    assert all(torch.equal(value, unet[name]) for name, value in plain.denoiser.state_dict().items())
    other = load(base).denoiser
    name = "mid_block.resnets.0.conv2"
    layer: Any = other.get_submodule(name)
    layer.weight.data[0] *= 2
    family.inner.anew = lambda: other
    with pytest.raises(UserError, match=rf"{name}\.weight of the base model has changed since the training began"):
        family.save(tmp_path / "changed")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_quantized_base_is_planned_as_it_lies(base: Path, bits: str, precision: str) -> None:
    """Within the scales of int8, which are not counted."""
    planned, held = [], []
    for told in ({}, {"base_precision": bits}):
        run = build(run_of(base, {"kind": "lora", "rank": 2} | told, precision=precision), Run, "run")
        stage: Any = run.stages["tune"]
        planned.append(estimate(run).training(stage).memory(1)["frozen parts"])
        family = made(base, LowRank(rank=2, **told))
        family.compute_in(torch.bfloat16 if precision == "bf16" else torch.float32)
        held.append(sum(t.nbytes for t in own_state(family.inner.denoiser).values()))
    assert planned[1] < planned[0] and planned[0] - planned[1] == pytest.approx(held[0] - held[1], rel=0.02)


def test_dora_reads_its_base_so_it_is_not_quantized() -> None:
    with pytest.raises(UserError, match="base_precision: got nf4, but DoRA reads the base's weights"):
        LowRank(method="dora", base_precision="nf4").check()
    assert "base_precision" not in LowRank().identity() and LowRank(base_precision="int8").identity()["base_precision"] == "int8"


def test_only_a_word_learns_and_means_the_same_everywhere(base: Path, tmp_path: Path) -> None:
    family: InvertedFamily = made(base, WORD)
    [before] = learn(family)
    assert len(family.state_dict()) == 1 and family.rows.shape[0] == 2 and not torch.equal(before, family.rows)
    family.save(tmp_path)
    plain, grown = load(base).text, TextEncoder.load(tmp_path)
    assert torch.equal(plain.encode(["a red square"]).tokens, grown.encode(["a red square"]).tokens)
    found = read_embedding(tmp_path / "embedding")
    assert found.token == "<thing>" and torch.equal(found.rows, family.rows)
    assert read_embedding(tmp_path / "embedding" / "thing.safetensors").token == "<thing>"
    add_word(plain, found.token, found.rows)
    prompt = "a <thing> left of a <thing>"
    assert torch.equal(plain.encode([prompt]).tokens, grown.encode([prompt]).tokens)
    assert torch.equal(grown.encode([prompt]).tokens, family.inner.text.learn([prompt]).tokens)
    assert grown.words("<thing>") == grown.tokenizer.convert_tokens_to_ids(names("<thing>", 2))
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_textual_inversion(tmp_path / "embedding", weight_name=DIFFUSERS)
    theirs = pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
    torch.testing.assert_close(theirs, plain.encode([prompt]).tokens, atol=1e-5, rtol=1e-5)


def test_a_word_begins_as_the_pieces_of_its_text(base: Path) -> None:
    text = load(base).text
    pieces = text.model.get_input_embeddings().weight[torch.tensor(text.words("a red square"))]
    torch.testing.assert_close(first_embeddings(text, "a red square", 1), pieces.mean(0, keepdim=True))
    assert torch.equal(first_embeddings(text, "a red square", len(pieces)), pieces)
    assert torch.equal(first_embeddings(text, "a red square", 2 * len(pieces)), pieces.repeat_interleave(2, 0))
    some = first_embeddings(text, "a red square", 2)
    torch.testing.assert_close(some[0], pieces[: -(-len(pieces) // 2)].mean(0))


def test_captions_have_the_word(base: Path) -> None:
    family: InvertedFamily = made(base, WORD)
    found = family.captions(["red", "my <thing>"] * 20, Rng(0, list(range(40))))
    assert set(found[1::2]) == {"my <thing>"} and set(found[::2]) == {text.replace("{}", "<thing>") for text in WORD.templates}
    assert found[:4] == family.captions(["red", "my <thing>"] * 2, Rng(0, list(range(4))))


@pytest.mark.parametrize(
    ("adapt", "words"),
    [
        (LowRank(targets=("to_z",)), "to_z"),
        (LowRank(text_rank=1, text_targets=("nothing",)), "nothing"),
        (TextualInversion(token="red</w>", init="red"), "knows this word"),
    ],
)
def test_what_does_not_suit_the_base_is_refused(base: Path, adapt: Adapt, words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(base, adapt)


@pytest.mark.parametrize("values", [{"token": "a b"}, {"token": "(x)"}, {"init": " "}, {"templates": ("none",)}])
def test_words_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        TextualInversion(**{"token": "<thing>", "init": "ball", **values})


def run_of(base: Path, adapt: dict[str, Any], **more: Any) -> dict[str, Any]:
    stage = {
        "kind": "train",
        "model": "diffusion",
        "images": 32,
        "resolution": 32,
        "batch": 8,
        "samples": 1,
        "ema": 0.9,
        "latents": "cache",
        "optim": {"kind": "adamw", "lr": 1e-2},
        "save_every_images": 8,
    } | more
    stages = {"cache": {"kind": "encode", "resolution": 32}, "tune": stage, "export": {"kind": "export"}}
    diffusion = {"kind": "latent_diffusion", "adapt": adapt, "defaults": {"steps": 2}}
    return {"data": SCENES, "init": str(base), "models": {"diffusion": diffusion}, "stages": stages}


def go(folder: Path, run: dict[str, Any], *words: str) -> int:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(run, sort_keys=False))
    return main(["train", str(file), *words])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapt", "kept"),
    [
        ({"kind": "lora", "rank": 2, "text_rank": 2}, "lora/kohya.safetensors"),
        ({"kind": "lora", "rank": 2, "base_precision": "nf4"}, "lora/kohya.safetensors"),
        ({"kind": "textual_inversion", "token": "<thing>", "init": "square"}, "embedding/learned_embeds.safetensors"),
    ],
    ids=["lora", "lora-nf4", "word"],
)
def test_stopped_and_continued_is_the_same_to_the_bit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapt: dict[str, Any], kept: str
) -> None:
    from ldm.training import loop

    run = run_of(base, adapt)
    assert go(tmp_path, run, f"out={tmp_path / 'whole'}") == 0
    report = loop.Trainer._report

    def dies(self: Any, *rest: Any) -> None:
        report(self, *rest)
        if self.step == 3:
            raise UserError("lost power")

    with monkeypatch.context() as patched:
        patched.setattr(loop.Trainer, "_report", dies)
        assert go(tmp_path, run, f"out={tmp_path / 'cut'}", "stages.tune.log_every_steps=1") == 2
    state = next((tmp_path / "cut" / "stages" / "tune" / "state").iterdir())
    stored = {name: value for file in state.glob("model*.safetensors") for name, value in load_file(file).items()}
    size = sum(value.numel() for value in stored.values())
    assert 0 < size < 20_000, "checkpoints hold what learns alone"
    assert go(tmp_path, run, f"out={tmp_path / 'cut'}") == 0
    for name in ("whole", "cut"):
        assert (tmp_path / name / kept).is_file()
    manifests = [json.loads((tmp_path / name / "stages" / "tune" / "model" / "manifest.json").read_text()) for name in ("whole", "cut")]
    assert manifests[0] == manifests[1]
    assert load(tmp_path / "cut").sample(["a red square"], settings=Wanted(steps=2)).shape == (1, 32, 32, 3)


def test_adapting_needs_one_base_and_one_stage(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(base, {"kind": "lora"})
    run["stages"]["again"] = dict(run["stages"]["tune"])
    assert go(tmp_path, run, f"out={tmp_path / 'out'}", "--plan") == 2
    assert "give that one more images" in capsys.readouterr().err
    run = run_of(base, {"kind": "lora"})
    del run["init"]
    run["models"] |= {
        "text": {"kind": "pretrained_text", "path": str(base)},
        "autoencoder": {"kind": "pretrained_autoencoder", "path": str(base)},
    }
    assert go(tmp_path, run, f"out={tmp_path / 'out'}", "--plan") == 2
    assert "models.diffusion.adapt: there is no model to adapt" in capsys.readouterr().err
