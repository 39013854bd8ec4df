"""Prompts of weighted pieces and of any length become Text: chunk after chunk of the text encoder's own length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.diffusion.batch import Text
from ldm.text.encoder import TextEncoder
from ldm.text.prompt_syntax import Piece


@dataclass(frozen=True)
class Chunk:
    """The words of one call of the encoder: token ids without the special ones, and each one's weight."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def chunks_of(encoder: TextEncoder, pieces: Sequence[Piece]) -> list[Chunk]:
    """The pieces cut into chunks that the encoder can read; at least one."""
    room = encoder.room
    found: list[list[tuple[int, float]]] = [[]]
    for piece in pieces:
        if piece.breaks and found[-1]:
            found.append([])
        for number in encoder.words(piece.text):
            if len(found[-1]) == room:
                found.append([])
            found[-1].append((number, piece.weight))
    return [Chunk(tuple(n for n, _ in chunk), tuple(w for _, w in chunk)) for chunk in found]


@torch.no_grad()
def encode(encoder: TextEncoder, prompts: Sequence[Sequence[Piece]], chunks: int = 1, clip_skip: int = 1) -> Text:
    """Frozen states of prompts, each `chunks` calls of the encoder long; what is shorter ends with empty prompts.

    A token of weight w gets the state of the empty prompt at its place plus w times what it differs from that: 1 changes
    nothing, 0 takes it away. (Multiplying states and restoring their mean, as Stable Diffusion web UI does, depends on a mean
    that is nearly 0.) The pooled state is the first chunk's, without weights.

    Returns:
        tokens (B, chunks L, D), mask (B, chunks L), pooled (B,P) or None. What a prompt gives depends on itself and `chunks`.
    """
    rows: list[Chunk] = []
    for pieces in prompts:
        found = chunks_of(encoder, pieces)[:chunks]
        rows += found + [Chunk((), ())] * (chunks - len(found))
    text = encoder.encode_words([row.ids for row in rows], clip_skip)
    states = text.tokens
    if any(weight != 1 for row in rows for weight in row.weights):
        empty = encoder.encode([""], clip_skip).tokens  # (1,L,D)
        weight = torch.stack([_weights(row, encoder, states.shape[1]) for row in rows]).to(states)  # (B chunks,L)
        # Only where it differs from 1, so that no other token's bits change.
        states = torch.where((weight == 1)[..., None], states, empty + weight[..., None] * (states - empty))
    return _joined(replace(text, tokens=states), chunks)


def encode_captions(encoder: TextEncoder, captions: Sequence[str], chunks: int, learn: bool = False) -> Text:
    """States of captions as they stand, without any prompt syntax, each `chunks` calls of the encoder long, as `encode` gives them.

    Args:
        learn: with gradients.
    """
    rows: list[tuple[int, ...]] = []
    for caption in captions:
        ids = encoder.words(caption)[: chunks * encoder.room]
        rows += [tuple(ids[at * encoder.room : (at + 1) * encoder.room]) for at in range(chunks)]
    return _joined((encoder.learn_words if learn else encoder.encode_words)(rows), chunks)


def _joined(text: Text, chunks: int) -> Text:
    """The states of `chunks` calls in turn as those of one prompt; the pooled state is the first call's."""
    tokens, mask = (value.unflatten(0, (-1, chunks)).flatten(1, 2) for value in (text.tokens, text.mask))
    return Text(tokens=tokens, mask=mask, pooled=None if text.pooled is None else text.pooled[::chunks])


def _weights(row: Chunk, encoder: TextEncoder, length: int) -> Tensor:
    found = torch.ones(length)
    start = encoder.words_start
    found[start : start + len(row.weights)] = torch.tensor(row.weights)
    return found
