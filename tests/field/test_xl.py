"""Stable Diffusion XL as a whole: single files both ways, export, what is trained of it, and what is refused. diffusers is the oracle."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from faults import child
from PIL import Image
from pipelines import NEGATIVE, PROMPTS, SIDE, xl_folder
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.cached import CachedLatents
from ldm.demo.catalogue import Catalogue, Opened
from ldm.demo.orders import blank, order_of_form, read_form
from ldm.demo.studio import Studio
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.formats.embedding_files import read_embedding, write_embedding
from ldm.formats.lora_files import read
from ldm.formats.model_folder import open_model
from ldm.formats.part import load_part, read_safetensors
from ldm.formats.text_folder import load_pair
from ldm.models.lora import LearnedEmbedding
from ldm.training.ema import Ema

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


@pytest.mark.slow
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
    (half / "text_encoder_2").unlink()
    with pytest.raises(UserError, match="text_encoder_2, tokenizer_2 missing"):  # as model_index.json names them
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


def test_clip_skip_counts_from_the_last_layer_as_web_uis_do(folder: Path, tmp_path: Path) -> None:
    """The last layer but one is read anyway, so 2 is no change, and is told; transformers' states are the oracle."""
    shape = {"vocab_size": 50, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 7, "eos_token_id": 49}
    theirs = []
    for name, kind, width in (("text_encoder", CLIPTextModel, 32), ("text_encoder_2", CLIPTextModelWithProjection, 64)):
        made = kind(CLIPTextConfig(**shape, hidden_size=width, intermediate_size=width, projection_dim=width, bos_token_id=48)).eval()
        made.save_pretrained(tmp_path / name)
        theirs.append(made)
    pair, ids = load_pair(tmp_path, 0), torch.randint(3, 48, (2, 7)).index_fill(1, torch.tensor([5]), 49)
    with torch.no_grad():
        states = [made(ids, output_hidden_states=True).hidden_states for made in theirs]
        for skip in (1, 2, 3, 4):
            wanted = torch.cat([each[-max(skip, 2)] for each in states], dim=2)
            torch.testing.assert_close(pair(ids, torch.ones_like(ids).bool(), skip).last_hidden_state, wanted)
    notes: list[str] = []
    own, two = (load(folder).sample(["a"], settings=Wanted(steps=1, clip_skip=n), size=(16, 16), note=notes.append) for n in (None, 2))
    assert torch.equal(own, two) and len(notes) == 1 and "clip_skip: 2 is what this model's text encoders are read at anyway" in notes[0]
    with pytest.raises(UserError, match="clip_skip: got 3, but this model's text encoder has 2 layers"):
        load(folder).settings(Wanted(clip_skip=3))


def test_the_autoencoder_stays_in_float32_under_fp16_alone(folder: Path) -> None:
    """As in diffusers' pipelines, where its config.json says `force_upcast`."""
    codec = load(folder).codec
    x0, image = torch.randn(1, 4, 8, 8), torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    whole = codec.decode(x0), codec.moments(image)[0]
    for kind in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", kind):
            found = codec.decode(x0), codec.moments(image)[0]
        assert all(torch.equal(one, other) for one, other in zip(found, whole, strict=True)) == (kind == torch.float16)


WORDS = [
    "data={kind: scenes, tier: one, images: 4, val: 2, captions: 1}",
    "models.diffusion.network.preset=null",
    *(f"stages.{name}.resolution={SIDE}" for name in ("latents", "lora")),
    *(f"stages.lora.{word}" for word in ("images=4", "batch=2", "precision=fp32", "optim.lr=0.05", "save_every_images=2", "ema=0.5")),
    "models.diffusion.adapt.rank=2",
    "models.diffusion.adapt.text_rank=2",
]


def _killed_at_the_last_step(words: list[str], state: Path) -> None:
    """Train, and die in the second update, once the first one's checkpoint is there."""
    update, count = Ema.update, itertools.count(1)

    def dying(ema: Ema) -> None:
        if next(count) == 2:
            while not state.is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        update(ema)

    Ema.update = dying  # type: ignore[method-assign]
    main(words)


@pytest.mark.slow
def test_adapters_of_all_three_networks_are_read_by_diffusers_and_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Path(__file__).parents[2] / "configs" / "finetune-sdxl-lora.yaml"
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(config), f"init={folder}", "name=xl", *WORDS]) == 0
    run = tmp_path / "runs" / "xl"
    again, state = ["train", str(config), f"init={folder}", "name=killed", *WORDS], "stages/lora/state/images-000000000002"
    assert not child(lambda: _killed_at_the_last_step(again, tmp_path / "runs" / "killed" / state)) and main(again) == 0
    ends = [{file.relative_to(end): file.read_bytes() for file in end.rglob("*.safetensors")} for end in (run, run.with_name("killed"))]
    assert ends[0] == ends[1] and len(ends[0]) > 10
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
    run = tmp_path / "runs" / "full"
    assert not torch.equal(load(run).denoiser.conv_in.weight, load(folder).denoiser.conv_in.weight)  # type: ignore[union-attr]
    for out in (export(run, "single-file", tmp_path / "full.safetensors"), export(run, "diffusers", tmp_path / "full")):
        equal(open_model(str(out)).folder, run / "model")
    word = [*(word for word in WORDS if "adapt" not in word), "models.diffusion.adapt={kind: textual_inversion, token: <thing>, init: red}"]
    assert main(["train", str(configs / "finetune-sdxl-lora.yaml"), f"init={folder}", "name=word", *word]) == 0
    run = tmp_path / "runs" / "word"
    taught, base = load(run), load(folder)
    base.adapt([], [read_embedding(run / "embedding")])
    one, other = (family.text.encode(["a <thing>"]) for family in (taught, base))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, 9])
def test_painting_is_learned_from_any_base(tmp_path: Path, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = xl_folder(tmp_path / "base", channels)
    monkeypatch.chdir(tmp_path)
    kept = [word for word in WORDS if not any(name in word for name in ("latents", "adapt", "preset"))]
    words = [*(word.replace("stages.lora.", "stages.paint.") for word in kept), "stages.paint.samples=0"]
    config = Path(__file__).parents[2] / "configs" / "finetune-inpaint.yaml"
    assert main(["train", str(config), f"init={base}", "name=paint", *words]) == 0
    made = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "runs" / "paint" / "model", local_files_only=True)
    assert isinstance(made, diffusers.StableDiffusionXLInpaintPipeline) and made.unet.config.in_channels == 9


def test_a_base_for_painting_is_refused_where_it_does_not_learn_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = xl_folder(tmp_path / "base", 9), tmp_path / "out"
    config = Path(__file__).parents[2] / "configs" / "finetune-sdxl-lora.yaml"
    assert main(["train", str(config), f"init={base}", f"out={out}", *WORDS]) == 2
    assert "inpaint={}" in capsys.readouterr().err and not list(out.glob("stages/*/model"))


@pytest.mark.slow
def test_every_verb_takes_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(folder), "--steps", "1"]
    assert main(["evaluate", str(folder), "--n", "2", "--images", "4", "--steps", "1", "--json", "found.json"]) == 0
    assert json.loads(Path("found.json").read_text())
    assert main(["grid", "a red circle", *model, "--x", "guidance=1,3", "--out", "grid.png"]) == 0
    assert main(["animate", "a red circle", "--to", "a blue ring", *model, "--frames", "2", "--out", "film.gif"]) == 0

    Path("pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (48 + 8 * number, 40), (90, 10, 10 * number)).save(f"pictures/{number}.png")
        Path(f"pictures/{number}.txt").write_text(PROMPTS[number])
    assert main(["data", "encode", "pictures", "--model", str(folder), "--resolution", str(SIDE), "--out", "latents", "--text"]) == 0
    cache = CachedLatents(Path("latents"))
    kept, text = cache.load([0], [0], SIDE, 0, False), load(folder).text
    told = text.encode(list(kept.caption))
    assert kept.text is not None and kept.text.pooled is not None and told.pooled is not None
    torch.testing.assert_close(kept.text.tokens, told.tokens, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(kept.text.pooled, told.pooled, atol=2e-3, rtol=2e-3)
    assert kept.size[0, [0, 4, 5]].tolist() == [40, SIDE, SIDE] and kept.size[0, 1] in (48, 56)
    cache.require_text(text.encode)
    with pytest.raises(UserError, match="another text encoder's"):
        cache.require_text(lambda captions: replace(text.encode(captions), pooled=-told.pooled))  # type: ignore[operator]

    family = load(folder)
    form = read_form({"prompt": "a red circle", "steps": 1, "pictures": 1}, 64, blank(family))
    with Studio(family) as studio:
        catalogue = Catalogue(("xl", str(folder)), lambda outfit: Opened(family, {}), runs=None)
        job = studio.submit("one", order_of_form(catalogue, form, 64))
        assert studio.wait(job, 60) and job.state == "done", job.error
    assert job.pictures[0].shape == (SIDE, SIDE, 3)
