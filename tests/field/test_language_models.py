"""Gemma and Qwen as text encoders: transformers' own states, read with the padding hidden, written, read again and trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import STORY, UNET, autoencoder_product, diffusion_product

from ldm.config.errors import UserError
from ldm.diffusion.process import Process
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.families.pretrained import PretrainedText
from ldm.formats.assembly import assemble
from ldm.formats.tokenizer_files import load_tokenizer
from ldm.text.encoder import TextEncoder
from ldm.text.pretrained import load_pretrained

PROMPTS = ["a red circle", "", "two blue squares, and Ünïcode"]
TINY = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
SLIDES = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("GemmaForCausalLM", TINY),
    "gemma2": ("Gemma2ForCausalLM", {**TINY, **SLIDES, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**TINY, **SLIDES, "query_pre_attn_scalar": 8}),
    "qwen2": ("Qwen2ForCausalLM", {name: value for name, value in TINY.items() if name != "head_dim"}),
    "qwen3": ("Qwen3Model", TINY),
}


def save_words(folder: Path, kind: str) -> Any:
    """A small tokenizer of the kind: byte pairs of bytes (Qwen), or letters with bytes for the rest (Gemma)."""
    from tokenizers import pre_tokenizers
    from transformers import GemmaTokenizer, Qwen2Tokenizer

    if kind.startswith("qwen"):
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [*letters, "re", "red", "<|endoftext|>"]
        made: Any = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[("r", "e"), ("re", "d")])
    else:
        words = [
            "<pad>",
            "<eos>",
            "<bos>",
            "<unk>",
            "<mask>",
            *(f"<0x{i:02X}>" for i in range(256)),
            "▁",
            *"abcdefghijklmnopqrstuvwxyz,",
            "re",
        ]
        made = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[("r", "e")], add_bos_token=True)
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module", params=KINDS)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    import transformers

    kind, (name, values) = request.param, KINDS[request.param]
    folder = tmp_path_factory.mktemp("peer")
    torch.manual_seed(0)
    network = getattr(transformers, name)
    model = network(network.config_class(**values, pad_token_id=0)).eval()
    model.save_pretrained(folder)
    return getattr(model, "model", model), save_words(folder, kind), folder


@torch.no_grad()
def test_states_are_those_of_transformers(peer: tuple[Any, Any, Path], tmp_path: Path) -> None:
    model, words, folder = peer
    ours = load_pretrained(str(folder), max_tokens=24)
    ids = words(PROMPTS, padding="max_length", max_length=24, truncation=True, padding_side="right", return_tensors="pt")
    found, mask = ours.tokens(PROMPTS)
    assert torch.equal(found, ids.input_ids) and torch.equal(mask, ids.attention_mask.bool())
    text = ours.encode(PROMPTS)
    expected = model(ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state
    assert text.pooled is None and ours.width == 32
    torch.testing.assert_close(text.tokens[mask], expected[mask], atol=2e-5, rtol=0)
    alone = model(ids.input_ids[:1, : int(mask[0].sum())]).last_hidden_state  # words do not see the padding
    torch.testing.assert_close(text.tokens[:1, : alone.shape[1]], alone, atol=2e-5, rtol=0)
    rows = ours.encode_words([tuple(ours.words("a red circle"))])
    torch.testing.assert_close(rows.tokens[0], text.tokens[0], atol=2e-5, rtol=0)
    ours.save(tmp_path)
    again = TextEncoder.load(tmp_path)
    assert torch.equal(again.encode(PROMPTS).tokens, text.tokens) and again.max_tokens == 24
    with pytest.raises(UserError, match="skip_last=0"):
        load_pretrained(str(folder), skip_last=1)


@pytest.mark.slow
def test_a_model_on_it_is_written_and_draws(peer: tuple[Any, Any, Path], tmp_path: Path) -> None:
    import transformers

    _, _, folder = peer
    text = PretrainedText(path=str(folder), max_tokens=16)
    assert text.text_shape(print).width == 32
    text.adopt(text.find(str(folder), print), tmp_path / "text")
    autoencoder = autoencoder_product(tmp_path / "autoencoder")
    diffusion = diffusion_product(tmp_path / "diffusion", tmp_path / "text", autoencoder, Process(), UNET)
    assemble(tmp_path / "text", autoencoder, diffusion, tmp_path / "model", STORY)
    assert load(tmp_path / "model").sample(["a red ring"], [0], Wanted(steps=2)).shape == (1, 32, 32, 3)
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["_class_name"] == "DiffusionPipeline"
    getattr(transformers, index["text_encoder"][1]).from_pretrained(tmp_path / "model" / "text_encoder")
    theirs = getattr(transformers, index["tokenizer"][1]).from_pretrained(tmp_path / "model" / "tokenizer")
    ours = load_tokenizer(tmp_path / "model" / "tokenizer")
    assert ours(PROMPTS).input_ids == theirs(PROMPTS).input_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", "x"),
        ("vocab_size", None),
        ("num_key_value_heads", 3),
        ("layer_types", ["full_attention"]),
        ("hidden_act", "evil"),
        ("rope_parameters", {"rope_theta": float("inf")}),
        ("rms_norm_eps", 0),
    ],
)
def test_a_field_out_of_range_is_named(tmp_path: Path, field: str, value: Any) -> None:
    values = {"architectures": ["Qwen2ForCausalLM"], **KINDS["qwen2"][1], field: value}
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    save_words(tmp_path, "qwen2")
    with pytest.raises(UserError, match=rf"config\.json: .*{field}") as caught:
        load_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)
