"""Stable Diffusion XL as a whole: single files both ways, export, what is trained of it, and what is refused. diffusers is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import NEGATIVE, PROMPTS, SIDE, xl_folder
from safetensors.torch import save_file

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.formats.embedding_files import read_embedding, write_embedding
from ldm.formats.lora_files import read
from ldm.formats.model_folder import open_model
from ldm.formats.part import load_part, read_safetensors
from ldm.models.lora import LearnedEmbedding

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
DRAWN: dict[str, Any] = {"settings": Wanted(steps=3, guidance=3.0), "size": (SIDE, SIDE)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return xl_folder(tmp_path_factory.mktemp("xl"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def export(model: Path, to: str, out: Path) -> Path:
    assert main(["export", str(model), "--to", to, "--out", str(out)]) == 0
    return out


def theirs(pipeline: Any) -> torch.Tensor:
    """What a pipeline makes of fixed noise."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipeline.set_progress_bar_config(disable=True)
    words = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "latents": noise, "output_type": "latent"}
    return pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, **words).images


def equal(one: Path, other: Path) -> None:
    for part in PARTS:
        a, b = (load_part(root / part)[1] for root in (one, other))
        a, b = ({n.removeprefix("text_model."): v for n, v in state.items()} for state in (a, b))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), part


def test_a_single_file_is_the_folder_that_it_was_made_of(folder: Path, tmp_path: Path) -> None:
    file = export(folder, "single-file", tmp_path / "xl.safetensors")
    names = set(read_safetensors(file))
    assert "conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight" in names
    assert "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight" in names
    assert {"conditioner.embedders.1.model.text_projection", "model.diffusion_model.label_emb.0.0.weight"} <= names
    equal(open_model(str(file)).folder, folder)
    own = load(folder).sample(PROMPTS, negative=NEGATIVE, **DRAWN)
    assert torch.equal(load(file).sample(PROMPTS, negative=NEGATIVE, **DRAWN), own)

    pipeline = diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    whole = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    assert torch.allclose(theirs(pipeline), theirs(whole), atol=1e-5)

    # Without what ldm says of itself, shapes tell the networks.
    bare = tmp_path / "bare.safetensors"
    save_file(read_safetensors(file), bare)
    file.with_name("xl.tokenizer").rename(tmp_path / "bare.tokenizer")
    equal(open_model(str(bare)).folder, folder)


def test_an_exported_folder_opens_in_diffusers(folder: Path, tmp_path: Path) -> None:
    out = export(folder, "diffusers", tmp_path / "out")
    equal(out, folder)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline" and index["force_zeros_for_empty_prompt"] is True
    made, whole = (diffusers.DiffusionPipeline.from_pretrained(root, local_files_only=True) for root in (out, folder))
    assert isinstance(made, diffusers.StableDiffusionXLPipeline) and made.tokenizer_2.pad_token == whole.tokenizer_2.pad_token == "!"
    assert torch.equal(theirs(made), theirs(whole))


def test_a_refiner_and_half_a_model_are_refused_in_a_line(folder: Path, tmp_path: Path) -> None:
    refiner = tmp_path / "refiner"
    refiner.mkdir()
    said = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True, "text_encoder": [None, None]}
    (refiner / "model_index.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="refiner of Stable Diffusion XL"):
        open_model(refiner)
    file = tmp_path / "refiner.safetensors"
    save_file({"conditioner.embedders.0.model.ln_final.weight": torch.zeros(8), "a": torch.zeros(1), "b": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="refiner of Stable Diffusion XL"):
        open_model(file)
    half = tmp_path / "half"
    half.mkdir()
    for part in folder.iterdir():
        if part.name != "tokenizer_2":
            (half / part.name).symlink_to(part)
    with pytest.raises(UserError, match="tokenizer_2 missing"):
        open_model(half)


def test_what_only_xl_is_told_is_refused_elsewhere_and_checked(folder: Path) -> None:
    family = load(folder)
    assert family.settings(Wanted(crop="8,0")).sizes(16, 32) == (16, 32, 0, 8, 16, 32)
    for wanted in (Wanted(crop="8x0"), Wanted(original_size="8"), Wanted(target_size="0x8")):
        with pytest.raises(UserError, match=r"got '8x0'|got '8'|got '0x8'"):
            family.settings(wanted)


def test_weights_and_long_prompts_reach_both_encoders(folder: Path) -> None:
    from ldm.text.prompt_syntax import read
    from ldm.text.weighted import encode

    text = load(folder).text
    plain, stronger = (encode(text, read(words).at(0, 1), 1) for words in ("a red ring", "a (red:1.5) ring"))
    changed = (plain.tokens != stronger.tokens).any(1)[0]  # (D,)
    assert changed[:64].any() and changed[64:].any() and torch.equal(plain.pooled, stronger.pooled)  # type: ignore[arg-type]
    long = encode(text, read("a small red circle " * 8).at(0, 1), 2)
    assert long.tokens.shape == (1, 2 * text.max_tokens, 192)


def test_a_word_of_two_encoders_is_drawn_with_as_in_diffusers(folder: Path, tmp_path: Path) -> None:
    """In the states; the pooled state is that of the end token here, whatever the largest id is."""
    rows = [torch.randn(2, 64), torch.randn(2, 128)]
    files = write_embedding(tmp_path, "<thing>", rows, {})
    family, made = load(folder), diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    family.adapt([], [read_embedding(files[1])])
    for number, part in enumerate(("", "_2")):
        state = read_safetensors(files[0])["clip_l" if number == 0 else "clip_g"]
        encoder, tokenizer = getattr(made, f"text_encoder{part}"), getattr(made, f"tokenizer{part}")
        made.load_textual_inversion(state, token="<thing>", text_encoder=encoder, tokenizer=tokenizer)
    with torch.no_grad():
        tokens, _, pooled, _ = made.encode_prompt("a <thing>", device="cpu", do_classifier_free_guidance=False)
    text = family.text.encode(["a <thing>"])
    torch.testing.assert_close(text.tokens, tokens)
    torch.testing.assert_close(text.pooled, pooled)
    single = LearnedEmbedding("<other>", torch.zeros(1, 64))
    with pytest.raises(UserError, match="made for a model with one text encoder; this one has two"):
        family.adapt([], [single])


WORDS = [
    "data={kind: scenes, tier: one, images: 4, val: 2, captions: 1}",
    "models.diffusion.network.preset=null",
    *(f"stages.{name}.resolution={SIDE}" for name in ("latents", "lora")),
    *(f"stages.lora.{word}" for word in ("images=4", "batch=2", "precision=fp32", "optim.lr=0.05")),
    "models.diffusion.adapt.rank=2",
    "models.diffusion.adapt.text_rank=2",
]


@pytest.mark.slow
def test_adapters_of_all_three_networks_are_read_by_diffusers_and_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(__file__).parents[2] / "configs" / "finetune-sdxl-lora.yaml"
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), f"init={folder}", "name=xl", *WORDS]) == 0
    run = tmp_path / "runs" / "xl"
    merged, plain = load(run), load(folder)
    states = merged.text.encode(PROMPTS)
    moved = (states.tokens - plain.text.encode(PROMPTS).tokens).abs().amax((0, 1))
    assert moved[:64].max() > 1e-4 and moved[64:].max() > 1e-4
    for name in ("kohya.safetensors", "pytorch_lora_weights.safetensors"):
        base = load(folder)
        base.adapt([(read(run / "lora" / name), 1.0)], [])
        assert all(torch.equal(a, b) for a, b in zip(merged.denoiser.parameters(), base.denoiser.parameters(), strict=True))
        assert torch.equal(base.text.encode(PROMPTS).tokens, states.tokens)
    keys = read_safetensors(run / "lora" / "kohya.safetensors")
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q.alpha" in keys
    assert "lora_te2_text_model_encoder_layers_1_self_attn_q_proj.alpha" in keys
    assert "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.alpha" not in keys  # behind the states that are read

    whole = diffusers.DiffusionPipeline.from_pretrained(run / "model", local_files_only=True)
    for file in ("kohya.safetensors", "pytorch_lora_weights.safetensors"):
        made = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
        made.load_lora_weights(run / "lora", weight_name=file)
        torch.testing.assert_close(theirs(made), theirs(whole), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_all_weights_of_the_unet_and_a_word_are_trained(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = Path(__file__).parents[2] / "configs"
    monkeypatch.chdir(tmp_path)
    tune = [word.replace("stages.lora.", "stages.tune.") for word in WORDS if "adapt" not in word]
    assert main(["train", str(configs / "finetune-sdxl-full.yaml"), f"init={folder}", "name=full", *tune]) == 0
    equal_text = [(load_part(root / part)[1]) for root in (folder, tmp_path / "runs" / "full" / "model") for part in PARTS[2:]]
    assert all(torch.equal(equal_text[0][n], v) for n, v in equal_text[0].items()) and len(equal_text) == 4
    assert not torch.equal(load(tmp_path / "runs" / "full").denoiser.conv_in.weight, load(folder).denoiser.conv_in.weight)  # type: ignore[union-attr]
    word = [*(word for word in WORDS if "adapt" not in word), "models.diffusion.adapt={kind: textual_inversion, token: <thing>, init: red}"]
    assert main(["train", str(configs / "finetune-sdxl-lora.yaml"), f"init={folder}", "name=word", *word]) == 0
    run = tmp_path / "runs" / "word"
    taught, base = load(run), load(folder)
    base.adapt([], [read_embedding(run / "embedding")])
    one, other = (family.text.encode(["a <thing>"]) for family in (taught, base))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)  # type: ignore[arg-type]
