"""Textual inversion (Gal 2022, arXiv 2208.01618): learned embeddings in a text encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.models.lora import LearnedEmbedding
from ldm.models.text_tower import CLIPS, OLD_EOS, towers
from ldm.text.encoder import TextEncoder


class PartlyTrainedEmbedding(nn.Module):
    """Token embedding (N,D) of which the last rows alone are trainable: columns of `rows` (V,D') from `start` on."""

    def __init__(self, table: Tensor, rows: nn.Parameter, start: int = 0) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.rows, self.columns = rows, slice(start, start + table.shape[1])

    def whole(self) -> Tensor:
        """The table with what the last rows have learned."""
        table: Tensor = self.table  # type: ignore[assignment]
        return torch.cat([table[: len(table) - len(self.rows)], self.rows.detach()[:, self.columns].to(table)])

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings (B,L,D) of ids (B,L)."""
        table: Tensor = self.table  # type: ignore[assignment]
        own = ids - (len(table) - len(self.rows))
        learned = nn.functional.embedding(own.clamp(min=0), self.rows[:, self.columns])
        return torch.where((own >= 0)[..., None], learned, nn.functional.embedding(ids, table))


def names(token: str, vectors: int) -> list[str]:
    """The tokens that a word of several embeddings has in a tokenizer, as diffusers names them: <a> <a>_1 <a>_2."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def first_embeddings(encoder: TextEncoder, text: str, vectors: int) -> Tensor:
    """Initial embeddings of a placeholder token, (V,D), of two text encoders side by side: those of a text's pieces in their order, each
    given an equal share.

    One vector is their mean; as many as there are pieces are the pieces; more repeat them, fewer are means of neighbours.

    Raises:
        UserError: if the encoder has no table of them that can grow.
    """
    ids = torch.tensor(encoder.words(text))
    pieces = torch.cat([table[ids] for table in _tables(encoder)], dim=1)
    edges = [i * len(pieces) / vectors for i in range(vectors + 1)]
    return torch.stack([pieces[int(a) : max(int(a) + 1, math.ceil(b))].mean(0) for a, b in zip(edges, edges[1:], strict=False)])


def add_word(encoder: TextEncoder, token: str, rows: Tensor) -> list[Tensor]:
    """Teach an encoder a word of V embeddings `rows` (V,D); returns its table, of which they are the last rows, or both tables of a pair.

    Raises:
        UserError: if it knows the word already, or its states have another width.
    """
    from tokenizers import AddedToken

    tables, tokenizer = _tables(encoder), encoder.tokenizer
    widths, known = [table.shape[1] for table in tables], len(tables[0])
    if rows.shape[1] != sum(widths):
        raise UserError(f"{token}: its embedding is {rows.shape[1]} wide, the model's are {sum(widths)}; it was made for another model")
    wanted = names(token, len(rows))
    if there := [name for name in wanted if name in tokenizer.get_vocab()]:
        raise UserError(f"{there[0]}: the model knows this word already; choose another token")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in wanted])
    if tokenizer.convert_tokens_to_ids(wanted) != list(range(known, known + len(rows))) or {len(table) for table in tables} != {known}:
        raise UserError(f"{token}: the model's tokenizer and its table of {known} embeddings do not fit together; use a whole model")
    grown = [torch.cat([table, part.to(table)]) for table, part in zip(tables, rows.split(widths, dim=1), strict=True)]
    for tower, table in zip(towers(encoder.model), grown, strict=True):
        tower.set_input_embeddings(nn.Embedding.from_pretrained(table, freeze=True))
        tower.config.vocab_size = len(table)
        if tower.config.eos_token_id == OLD_EOS:  # the end is found by the largest id, which it no longer has
            tower.config.eos_token_id = tokenizer.eos_token_id
    encoder.learned_words()
    return grown


def teach(encoder: TextEncoder, word: LearnedEmbedding) -> None:
    """Teach an encoder a word from a file. One that its vocabulary has as a piece of words means the new one where it stands alone.

    Raises:
        UserError: if it was taught the word already, or the word is for another kind of model.
    """
    pair = len(towers(encoder.model)) == 2
    if pair != (word.second is not None):
        other, own = ("one text encoder", "two") if pair else ("two text encoders (SDXL)", "one")
        raise UserError(f"{word.name}: {word.token} was made for a model with {other}; this one has {own}")
    rows = word.rows if word.second is None else torch.cat([word.rows, word.second], dim=1)
    vocabulary, token = encoder.tokenizer.get_vocab(), word.token
    if token in encoder.aliases or token in encoder.tokenizer.get_added_vocab():
        raise UserError(f"{token}: the model knows this word already; choose another token")
    if token in vocabulary or f"{token}</w>" in vocabulary:
        own = f"<{token}>"
        while own in vocabulary:
            own = f"<{own}>"
        add_word(encoder, own, rows)
        encoder.aliases[token] = own
    else:
        add_word(encoder, token, rows)


def _tables(encoder: TextEncoder) -> list[Tensor]:
    """The table of an encoder's embeddings, or both of a pair."""
    found: list[Any] = [tower.get_input_embeddings() for tower in towers(encoder.model)]
    if encoder.model.config.model_type not in CLIPS or not all(isinstance(table, nn.Embedding) for table in found):
        raise UserError("new words need a CLIP text encoder; this model has another kind")
    return [table.weight.detach() for table in found]
