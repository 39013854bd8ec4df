"""Captions of several chunks are read in training as prompts are when drawing, and those that are cut are counted."""

from __future__ import annotations

import torch

from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.lengths import cut_captions, spread
from ldm.text.prompt_syntax import Piece
from ldm.text.weighted import encode, encode_captions

LONG = "a red circle above a blue square " * 8


def small() -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([LONG], 600, 20)
    return TextEncoder(small_clip_text(SmallText(width=16, max_tokens=20, heads=2), tokenizer).eval(), tokenizer)


def test_training_reads_what_drawing_reads():
    encoder = small()
    captions = [LONG, "a red circle", "", "(brackets:1.5) are words here"]
    found, drawn = encode_captions(encoder, captions, 3), encode(encoder, [[Piece(text)] for text in captions], 3)
    assert found.tokens.shape == (4, 60, 16) and found.mask.shape == (4, 60)
    assert torch.equal(found.tokens, drawn.tokens) and torch.equal(found.mask, drawn.mask)
    assert torch.equal(encode_captions(encoder, captions[1:2], 1).tokens, encoder.encode(captions[1:2]).tokens)
    learned = encode_captions(encoder, captions, 3, learn=True)
    assert torch.allclose(learned.tokens, found.tokens, atol=1e-5)
    alone = encode_captions(encoder, [LONG], 3)
    assert torch.equal(alone.tokens[0], found.tokens[0])  # whatever its neighbours


def test_captions_that_are_cut_are_counted_and_short_ones_cost_nothing():
    encoder = small()
    words = len(encoder.words(LONG))
    cut = cut_captions([LONG, "a red circle", "é" * 9], lambda: encoder.tokenizer, encoder.room)
    assert cut is not None and (cut.count, cut.of, cut.room) == (1, 3, 18) and cut.longest == words
    said = "1 of 3 captions is longer than the 18 tokens that the text encoder reads, and what is beyond them is cut"
    assert str(cut).startswith(f"{said} (the longest has {words}")
    assert cut_captions(["short"] * 5, lambda: 1 / 0, 18) is None
    assert list(spread(10, 4)) == [0, 3, 6, 9] and len(spread(10**6)) <= 5000 and list(spread(0)) == []
