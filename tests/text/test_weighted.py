"""Weighted and long prompts: what is plain stays as it was to the bit, weights act on their own words alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.prompt_syntax import Piece, read
from ldm.text.weighted import chunks_of, encode

WORDS = "a red cube on the left of a blue ball in the rain"


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    tokenizer = train_tokenizer([WORDS] * 20, 600, 16)
    torch.manual_seed(0)
    model = small_clip_text(SmallText(width=32, layers=2, heads=2, max_tokens=16), tokenizer)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer)


def states(encoder: TextEncoder, text: str, chunks: int = 1) -> Tensor:
    (part,) = read(text).at(0, 1)
    return encode(encoder, [part], chunks).tokens[0]


def test_plain_words_are_encoded_as_ever(encoder: TextEncoder) -> None:
    for text in ("", "a red cube", "A  red\ncube!", "naïve ☂"):
        plain = encoder.encode([text])
        found = encode(encoder, [(Piece(text),)])
        assert torch.equal(found.tokens, plain.tokens) and torch.equal(found.mask, plain.mask)
        assert torch.equal(found.pooled, plain.pooled)  # type: ignore[arg-type]


def test_a_weight_changes_its_own_tokens_in_proportion(encoder: TextEncoder) -> None:
    plain, empty = states(encoder, "a red cube"), states(encoder, "")
    place = 1 + len(encoder.words("a"))
    count = len(encoder.words("red"))
    own = slice(place, place + count)
    for weight in (0.0, 0.5, 2.0):
        found = states(encoder, f"a (red:{weight}) cube")
        assert torch.allclose(found[own], empty[own] + weight * (plain[own] - empty[own]))
        rest = torch.ones(len(found), dtype=torch.bool)
        rest[own] = False
        assert torch.equal(found[rest], plain[rest])
    assert torch.equal(states(encoder, "a (red:1.0) cube"), plain)


def test_long_prompts_go_on_in_further_chunks(encoder: TextEncoder) -> None:
    long = " ".join([WORDS] * 3)
    chunks = chunks_of(encoder, [Piece(long)])
    assert [n for chunk in chunks for n in chunk.ids] == encoder.words(long)
    assert all(len(chunk.ids) == encoder.room for chunk in chunks[:-1]) and len(chunks) > 1
    found = encode(encoder, [(Piece(long),)], len(chunks))
    assert found.tokens.shape == (1, 16 * len(chunks), 32) and found.mask.shape == (1, 16 * len(chunks))
    assert torch.equal(found.tokens[0, :16], encoder.encode([long]).tokens[0])
    # A shorter prompt beside it ends with empty prompts, and is the same alone.
    both = encode(encoder, [(Piece(long),), (Piece("a red cube"),)], len(chunks))
    assert torch.equal(both.tokens[1, 16:32], encoder.encode([""]).tokens[0])
    assert torch.equal(both.tokens[0], found.tokens[0])


def test_break_fills_the_chunk(encoder: TextEncoder) -> None:
    (part,) = read("a red cube BREAK a ball").at(0, 1)
    first, second = chunks_of(encoder, part)
    assert list(first.ids) == encoder.words("a red cube") and list(second.ids) == encoder.words("a ball")
    found = encode(encoder, [part], 2).tokens[0]
    assert torch.equal(found[:16], encoder.encode(["a red cube"]).tokens[0])
    assert torch.equal(found[16:], encoder.encode(["a ball"]).tokens[0])
