"""Pretrained text encoders against the libraries that they come from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finished_model import t5_folder
from safetensors.torch import save_file
from torch import nn

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.formats import open_clip as open_clip_files
from ldm.formats.part import read_json, read_safetensors
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.pretrained import load_pretrained

PROMPTS = ["a photo of a cat", "Two blue rings, 12 of them!", ""]
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="module")
def small() -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, 560, 20)
    model = small_clip_text(SmallText(width=16, layers=3, heads=2, max_tokens=20), tokenizer)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer)


def open_clip_folder(folder: Path, custom: bool) -> nn.Module:
    """A random OpenCLIP, written as its folders on the hub are; with its towers apart where `custom`."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    torch.manual_seed(0)
    kind = CustomTextCLIP if custom else CLIP
    values: Any = {**CONFIG, "vision_cfg": CLIPVisionCfg(**CONFIG["vision_cfg"]), "text_cfg": CLIPTextCfg(**CONFIG["text_cfg"])}  # type: ignore[arg-type]
    model = kind(**values).eval()
    for parameter in model.parameters():  # fresh norms and biases would hide a wrong name
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG}))
    return model


def open_clip_states(model: nn.Module, custom: bool, ids: torch.Tensor, layers: int) -> torch.Tensor:
    """The states after `layers` layers and the last norm, by OpenCLIP's own modules."""
    tower: Any = model.text if custom else model
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.transformer.resblocks[:layers]:
        x = block(x, attn_mask=tower.attn_mask)
    return tower.ln_final(x)


@pytest.mark.parametrize("custom", [False, True])
@torch.no_grad()
def test_open_clip_gives_its_own_states(tmp_path: Path, custom: bool) -> None:
    theirs = open_clip_folder(tmp_path / "model", custom)
    for skip in (0, 1):
        ours = load_pretrained(str(tmp_path / "model"), skip_last=skip)
        text = ours.encode(PROMPTS)
        assert text.tokens.shape == (3, 20, 16)
        expected = open_clip_states(theirs, custom, ours.tokens(PROMPTS)[0], 3 - skip)
        torch.testing.assert_close(text.tokens, expected, atol=2e-6, rtol=0)
    whole = load_pretrained(str(tmp_path / "model"))
    projection = theirs.text.text_projection if custom else theirs.text_projection
    padded = whole.tokens(PROMPTS)[0].where(whole.tokens(PROMPTS)[1], 0)  # as OpenCLIP pads
    torch.testing.assert_close(whole.encode(PROMPTS).pooled @ projection, theirs.encode_text(padded), atol=1e-5, rtol=0)


def test_open_clips_words_have_its_numbers(tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    open_clip_folder(tmp_path / "model", False)
    ids, mask = load_pretrained(str(tmp_path / "model")).tokens(PROMPTS)
    assert torch.equal(ids.where(mask, 0), SimpleTokenizer()(PROMPTS, context_length=20))


def test_open_clip_as_a_stable_diffusions_text_encoder(tmp_path: Path) -> None:
    open_clip_folder(tmp_path / "model", False)
    ours = load_pretrained(str(tmp_path / "model"), skip_last=1)
    ours.save(tmp_path / "saved")
    again = load_pretrained(str(tmp_path / "saved"))
    assert torch.equal(again.encode(PROMPTS).tokens, ours.encode(PROMPTS).tokens)


def test_fewer_tokens_are_the_first_of_more(small: TextEncoder, tmp_path: Path) -> None:
    small.save(tmp_path)
    short = load_pretrained(str(tmp_path), max_tokens=6)
    assert short.max_tokens == short.tokenizer.model_max_length == 6
    torch.testing.assert_close(short.encode(["a cat"]).tokens, small.encode(["a cat"]).tokens[:, :6], atol=1e-6, rtol=0)
    assert load_pretrained(str(tmp_path), max_tokens=500).max_tokens == 20
    short.save(tmp_path / "again")
    assert TextEncoder.load(tmp_path / "again").max_tokens == 6


def test_a_whole_clip_of_transformers(small: TextEncoder, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    vision = CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, intermediate_size=16)
    clip = CLIPModel(CLIPConfig(text_config=small.model.config.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()
    clip.save_pretrained(tmp_path)
    small.tokenizer.save_pretrained(tmp_path)
    ours = load_pretrained(str(tmp_path))
    expected = clip.text_model(ours.tokens(PROMPTS)[0]).last_hidden_state
    torch.testing.assert_close(ours.encode(PROMPTS).tokens, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_t5_gives_its_own_states(tmp_path: Path) -> None:
    theirs = t5_folder(tmp_path / "t5", PROMPTS)
    ours = load_pretrained(str(tmp_path / "t5"), max_tokens=16)
    ids, mask = ours.tokens(PROMPTS)
    assert ids.shape == (3, 16) and (ids[:, 0] != 0).all() and ours.width == 16
    assert all(int(ids[i][mask[i]][-1]) == 1 for i in range(3))  # its end token
    text = ours.encode(PROMPTS)
    assert text.pooled is None
    torch.testing.assert_close(text.tokens, theirs.encoder(ids, attention_mask=mask).last_hidden_state, atol=1e-5, rtol=0)
    # Words do not see the padding.
    alone = theirs.encoder(ids[:1, : int(mask[0].sum())]).last_hidden_state
    torch.testing.assert_close(text.tokens[:1, : alone.shape[1]], alone, atol=1e-5, rtol=0)
    ours.save(tmp_path / "saved")
    again = TextEncoder.load(tmp_path / "saved")
    assert again.max_tokens == 16 and torch.equal(again.encode(PROMPTS).tokens, text.tokens)
    with pytest.raises(UserError, match="skip_last=0"):
        load_pretrained(str(tmp_path / "t5"), skip_last=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_cfg": {**CONFIG["text_cfg"], "hf_model_name": "bert"}}, "text_cfg.hf_model_name is not supported"),  # type: ignore[dict-item]
        ({"text_cfg": {**CONFIG["text_cfg"], "no_causal_mask": True}}, "text_cfg.no_causal_mask is not supported"),  # type: ignore[dict-item]
        ({"text_cfg": {**CONFIG["text_cfg"], "layers": 4}}, "text_cfg says layers 4"),  # type: ignore[dict-item]
        ({"text_cfg": None}, "no model_cfg with a text_cfg"),
    ],
)
def test_what_open_clip_has_beyond_clip_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    open_clip_folder(tmp_path / "model", False)
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**CONFIG, **change}}))
    with pytest.raises(UserError, match=words):
        load_pretrained(str(tmp_path / "model"))


@pytest.mark.slow
def test_an_open_clip_by_its_architecture_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.families.pretrained import PretrainedText

    def known_are(configs: dict[str, Any]) -> None:
        for name, config in configs.items():
            (tmp_path / "open_clip" / "model_configs").mkdir(parents=True, exist_ok=True)
            (tmp_path / "open_clip" / "model_configs" / f"{name}.json").write_text(json.dumps(config))

    monkeypatch.setattr(open_clip_files, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    open_clip_folder(tmp_path / "model", False)
    expected = load_pretrained(str(tmp_path / "model")).encode(PROMPTS).tokens
    known_are({"ViT-tiny": CONFIG})
    plain, pickled = tmp_path / "weights.safetensors", tmp_path / "weights.bin"
    (tmp_path / "model" / "open_clip_model.safetensors").rename(plain)
    torch.save({"state_dict": {f"module.{name}": value for name, value in read_safetensors(plain).items()}}, pickled)
    for file in (plain, pickled):
        text = PretrainedText(path=str(file), architecture="ViT-tiny")
        found = text.find(str(file), print)
        text.adopt(found, tmp_path / "adopted")
        assert torch.equal(TextEncoder.load(tmp_path / "adopted").encode(PROMPTS).tokens, expected)
        assert text.text_shape(print).width == expected.shape[2] and text.find(str(file), print) == found
    # Fewer layers would load, and draw with half a text encoder.
    others = {"ViT-tiny": CONFIG, "ViT-short": {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "layers": 1}}}
    known_are(others)
    with pytest.raises(UserError, match=r"has layers \d+ \(ViT-short: 1\); one of ViT-tiny has this size"):
        PretrainedText(path=str(plain), architecture="ViT-short").find(str(plain), print)
    with pytest.raises(UserError, match=r"an OpenCLIP .*, no whole model; .* architecture="):
        PretrainedText(path=str(plain)).find(str(plain), print)
    with pytest.raises(UserError, match="no such file; beside architecture"):
        PretrainedText(path="x", architecture="ViT-tiny").find("x", print)


def test_a_wrong_architecture_is_refused_with_the_configuration(tmp_path: Path) -> None:
    """A plan took any name, and said so after 70 s."""
    from ldm.families.pretrained import PretrainedText

    for wrong, right in (("ViT-H/14", "ViT-H-14"), ("vit-b-32", "ViT-B-32")):
        with pytest.raises(UserError, match=rf"text: architecture: '{wrong}' is none of OpenCLIP's; did you mean {right} or "):
            build({"path": "x.bin", "architecture": wrong}, PretrainedText, "text")
    shape = PretrainedText(path=str(tmp_path / "absent.bin"), architecture="ViT-H-14").text_shape(pytest.fail)
    assert (shape.width, shape.layers, shape.inner, shape.vocabulary) == (1024, 24, 4096, 49408)


@pytest.mark.slow
def test_architectures_are_those_that_open_clip_lists() -> None:
    import open_clip

    known = open_clip_files.architectures()
    assert known.keys() == set(open_clip.list_models())
    assert all(read_json(file) == open_clip.get_model_config(name) for name, file in known.items())


@pytest.mark.parametrize("field", ["layers", "context_length"])
def test_an_open_clip_of_other_size_than_its_configuration_is_named(tmp_path: Path, field: str) -> None:
    open_clip_folder(tmp_path / "model", False)
    file = tmp_path / "model" / "open_clip_config.json"
    said = json.loads(file.read_text())
    said["model_cfg"]["text_cfg"][field] -= 1
    file.write_text(json.dumps(said))
    with pytest.raises(UserError, match=f"text_cfg says {field} "):
        load_pretrained(str(tmp_path / "model"))


@pytest.mark.parametrize(("field", "value"), [("width", "x"), ("layers", 10**9), ("heads", 0), ("mlp_ratio", []), ("vocab_size", -1)])
def test_an_open_clip_configuration_out_of_range_is_named(tmp_path: Path, field: str, value: Any) -> None:
    open_clip_folder(tmp_path / "model", False)
    text: dict[str, Any] = {**CONFIG["text_cfg"], field: value}  # type: ignore[dict-item]
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**CONFIG, "text_cfg": text}}))
    with pytest.raises(UserError, match=rf"open_clip_config\.json: {field} is"):
        load_pretrained(str(tmp_path / "model"))


def test_more_layers_cannot_be_left_out_than_there_are(small: TextEncoder, tmp_path: Path) -> None:
    small.save(tmp_path)
    with pytest.raises(UserError, match="skip_last: got 3, but this text encoder has only 3"):
        load_pretrained(str(tmp_path), skip_last=3)


def test_a_name_on_the_hub_fetches_what_is_there(small: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch
    import shutil

    import huggingface_hub

    def hub(source: Path) -> Any:
        def answer(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool) -> str:
            for file in (p for p in source.rglob("*") if p.is_file()):
                relative = file.relative_to(source)
                if any(fnmatch.fnmatch(relative.as_posix(), pattern) for pattern in allow_patterns):
                    (tmp_path / "local" / relative).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, tmp_path / "local" / relative)
            return str(tmp_path / "local")

        return answer

    flat = tmp_path / "flat"
    small.save(flat)
    (flat / "unet").mkdir()
    (flat / "unet" / "model.safetensors").write_bytes(b"large")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub(flat))
    assert torch.equal(load_pretrained("owner/diffusion").encode(PROMPTS).tokens, small.encode(PROMPTS).tokens)
    assert not (tmp_path / "local" / "unet" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "local")
    theirs = open_clip_folder(tmp_path / "open", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub(tmp_path / "open"))
    ours = load_pretrained("owner/clip")
    expected = open_clip_states(theirs, False, ours.tokens(PROMPTS)[0], 3)
    torch.testing.assert_close(ours.encode(PROMPTS).tokens, expected.detach(), atol=2e-6, rtol=0)
