"""Tokenizers are read as data: what strangers' files say is bounded, and what honest ones say comes out as in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config.errors import UserError
from ldm.formats.open_clip import open_clip_tokenizer
from ldm.formats.tokenizer_files import load_tokenizer, save_tokenizer
from ldm.text.encoder import TextEncoder, train_tokenizer
from ldm.text.textual_inversion import add_word
from tests.ends_soon import ends_soon

TEXTS = ["", "a red circle!", "Ünïcode — 漢字 <|endoftext|> it's 12345", "<cat> and <cat>_1 ! two  blanks", "x" * 300]


def pairs(folder: Path) -> Path:
    save_tokenizer(train_tokenizer(TEXTS * 3, 560, 16), folder)
    return folder


def pieces(folder: Path) -> Path:
    """T5's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return folder


def same(folder: Path, kind: str) -> None:
    import transformers

    theirs = getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    ours = load_tokenizer(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    for how in ({}, {"padding": "max_length", "max_length": 12, "truncation": True}):
        assert ours(TEXTS, **how).input_ids == theirs(TEXTS, **how).input_ids
    names = ("pad_token", "eos_token", "unk_token", "bos_token")
    assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]


@pytest.mark.slow
def test_byte_pairs_are_those_of_transformers(tmp_path: Path) -> None:
    same(pairs(tmp_path / "run"), "CLIPTokenizer")
    for ends in (True, False):  # Stable Diffusion 1 pads with the end token, 2 with `!`
        save_tokenizer(open_clip_tokenizer(ends), tmp_path / f"published-{ends}")
        same(tmp_path / f"published-{ends}", "CLIPTokenizer")
    old = tmp_path / "published-True"  # as in the published folders: no tokenizer.json
    (old / "tokenizer.json").unlink()
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": {"content": "<|startoftext|>", **flags}, "eos_token": {"content": "<|endoftext|>", **flags}}
    (old / "special_tokens_map.json").write_text(json.dumps(names))
    (old / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, "add_prefix_space": False}))
    same(old, "CLIPTokenizer")
    assert load_tokenizer(old).model_max_length == 77


def test_pieces_are_those_of_transformers(tmp_path: Path) -> None:
    same(pieces(tmp_path), "T5TokenizerFast")


def test_learned_words_come_back(kl_model: Path, tmp_path: Path) -> None:
    encoder = TextEncoder.load(kl_model)
    add_word(encoder, "<cat>", torch.zeros(3, encoder.width))
    encoder.save(tmp_path)
    again = TextEncoder.load(tmp_path)
    assert torch.equal(again.tokens(TEXTS)[0], encoder.tokens(TEXTS)[0])
    same(tmp_path / "tokenizer", "CLIPTokenizer")


def test_ten_thousand_added_words_cost_no_time(tmp_path: Path, kl_model: Path) -> None:
    tokenizer = load_tokenizer(kl_model / "tokenizer")
    tokenizer.add_tokens([f"<w>_{i}" for i in range(10_000)] + ["<w>"])
    model = TextEncoder.load(kl_model).model
    with ends_soon():
        encoder = TextEncoder(model, tokenizer)
    assert len(encoder._spellings["<w>"].split()) == 10_001


FAST = "tokenizer.json"
HUGE = 10**18


def fast(**change: Any) -> dict[str, Any]:
    return {FAST: change}


def model(**change: Any) -> dict[str, Any]:
    return fast(model=change)


def token(**change: Any) -> dict[str, Any]:
    return fast(added_tokens=[{"id": 560, "content": "red", "single_word": False, "special": False, **change}])


WORDS = {f"w{i}": i for i in range(600)}
DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "an added token far away": (token(id=4_000_000_000), "added_tokens"),
    "an added token behind a hole": (token(id=900), "added_tokens"),
    "an added token below nothing": (token(id=-1), "added_tokens"),
    "an added token that is no text": (token(content=["red"]), "added_tokens"),
    "an added token without letters": (token(content=""), "added_tokens"),
    "an added token of half a character": (token(content="\ud800"), "added_tokens"),
    "an added token of a book": (token(content="a" * 100_000), "added_tokens"),
    "many added tokens": (fast(added_tokens=[{"id": i, "content": f"t{i}"} for i in range(70_000)]), "added_tokens"),
    "added tokens that are no list": (fast(added_tokens={"a": 1}), "added_tokens"),
    "another model": (model(type="WordPiece", unk_token="x", max_input_chars_per_word=HUGE, vocab={"x": 0}), "cannot be loaded"),
    "no model": (fast(model=[]), "cannot be loaded"),
    "a vocabulary of holes": (model(type="BPE", vocab={**WORDS, "far": 900_000}, merges=[]), "follow one another"),
    "a number of 10 digits": (model(type="BPE", vocab={**WORDS, "far": 4_000_000_000}, merges=[]), "whole number below"),
    "a truth as number": (model(type="BPE", vocab={**WORDS, "w0": True}, merges=[]), "whole number below"),
    "one number twice": (model(type="BPE", vocab={**WORDS, "w0": 1}, merges=[]), "same number"),
    "a word of a book": (model(type="BPE", vocab={**WORDS, "a" * 100_000: 600}, merges=[]), "characters"),
    "no merges": (model(type="BPE", vocab=WORDS), "merges"),
    "merges of three": (model(type="BPE", vocab=WORDS, merges=["a b c"]), "merges"),
    "merges of nothing": (model(type="BPE", vocab=WORDS, merges=[["", ""]]), "merges"),
    "merges of strangers": (model(type="BPE", vocab=WORDS, merges=["y z"]), "cannot be loaded"),
    "no vocabulary": (model(type="BPE", vocab={}, merges=[]), "vocabulary"),
    "pieces without scores": (model(type="Unigram", vocab=["a"]), "model.vocab"),
    "pieces twice": (model(type="Unigram", vocab=[["a", 0.0], ["a", 0.0]]), "cannot be loaded|follow"),
    "a long text": ({"tokenizer_config.json": {"model_max_length": 10**9}}, "model_max_length"),
    "no text": ({"tokenizer_config.json": {"model_max_length": 0.5}}, "model_max_length"),
    "padding of a list": ({"tokenizer_config.json": {"pad_token": [1]}}, "pad_token"),
    "an end without letters": ({"special_tokens_map.json": {"eos_token": {"content": ""}}, "tokenizer_config.json": {}}, "eos_token"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_makes_no_sense_is_one_line(kl_model: Path, tmp_path: Path, what: str) -> None:
    changes, words = DAMAGE[what]
    folder = tmp_path / "model"
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(kl_model / part, folder / part)
    for name, change in changes.items():
        file = folder / "tokenizer" / name
        known = json.loads(file.read_text()) if file.exists() and change else {}
        file.write_text(json.dumps({**known, **change}))
    with ends_soon(), pytest.raises(UserError, match=words) as caught:
        TextEncoder.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    str(caught.value).encode()


def test_a_files_own_chains_are_not_run(kl_model: Path, tmp_path: Path) -> None:
    """Forty steps, each of which doubles the text; patterns that backtrack without end; padding to a billion."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(kl_model / "tokenizer", folder)
    values = json.loads((folder / FAST).read_text())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    values["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}
    values["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a|a)*b"}, "behavior": "Isolated", "invert": False}
    values["padding"] = {"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_to_multiple_of": 10**9, "pad_id": 0, "pad_type_id": 0}
    (folder / FAST).write_text(json.dumps(values))
    ours, theirs = load_tokenizer(folder), load_tokenizer(kl_model / "tokenizer")
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids


@pytest.mark.slow
def test_a_tokenizer_larger_than_its_text_encoder_is_refused(kl_model: Path, tmp_path: Path) -> None:
    shutil.copytree(kl_model / "text_encoder", tmp_path / "text_encoder")
    save_tokenizer(open_clip_tokenizer(), tmp_path / "tokenizer")
    with pytest.raises(UserError, match="up to number 49407, but its text encoder knows 542 words"):
        TextEncoder.load(tmp_path)
