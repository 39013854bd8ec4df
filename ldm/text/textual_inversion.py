"""Textual inversion (Gal 2022, arXiv 2208.01618): learned embeddings in a text encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.models.lora import LearnedEmbedding
from ldm.text.encoder import TextEncoder


class PartlyTrainedEmbedding(nn.Module):
    """Token embedding of which the last rows alone are trainable."""

    def __init__(self, table: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings (B,L,D) of ids (B,L)."""
        table: Tensor = self.table  # type: ignore[assignment]
        own = ids - (len(table) - len(self.rows))
        learned = nn.functional.embedding(own.clamp(min=0), self.rows)
        return torch.where((own >= 0)[..., None], learned, nn.functional.embedding(ids, table))


def names(token: str, vectors: int) -> list[str]:
    """The tokens that a word of several embeddings has in a tokenizer, as diffusers names them: <a> <a>_1 <a>_2."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def first_embeddings(encoder: TextEncoder, text: str, vectors: int) -> Tensor:
    """Initial embeddings of a placeholder token, (V,D): those of a text's pieces in their order, each given an equal share.

    One vector is their mean; as many as there are pieces are the pieces; more repeat them, fewer are means of neighbours.

    Raises:
        UserError: if the encoder has no table of them that can grow.
    """
    pieces = _table(encoder)[torch.tensor(encoder.words(text))]
    edges = [i * len(pieces) / vectors for i in range(vectors + 1)]
    return torch.stack([pieces[int(a) : max(int(a) + 1, math.ceil(b))].mean(0) for a, b in zip(edges, edges[1:], strict=False)])


def add_word(encoder: TextEncoder, token: str, rows: Tensor) -> Tensor:
    """Teach an encoder a word of V embeddings `rows` (V,D); returns its table, of which they are the last rows.

    Raises:
        UserError: if it knows the word already, or its states have another width.
    """
    from tokenizers import AddedToken

    table, tokenizer = _table(encoder), encoder.tokenizer
    if rows.shape[1] != table.shape[1]:
        raise UserError(f"{token}: its embedding is {rows.shape[1]} wide, the model's are {table.shape[1]}; it was made for another model")
    wanted = names(token, len(rows))
    if known := [name for name in wanted if name in tokenizer.get_vocab()]:
        raise UserError(f"{known[0]}: the model knows this word already; choose another token")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in wanted])
    if tokenizer.convert_tokens_to_ids(wanted) != list(range(len(table), len(table) + len(rows))):
        raise UserError(f"{token}: the model's tokenizer and its table of {len(table)} embeddings do not fit together; use a whole model")
    grown = torch.cat([table, rows.to(table)])
    encoder.model.set_input_embeddings(nn.Embedding.from_pretrained(grown, freeze=True))
    encoder.model.config.vocab_size = len(grown)
    encoder.learned_words()
    return grown


def teach(encoder: TextEncoder, word: LearnedEmbedding) -> None:
    """Teach an encoder a word from a file. One that its vocabulary has as a piece of words means the new one where it stands alone.

    Raises:
        UserError: if it was taught the word already, or the word is for another kind of model.
    """
    if word.second is not None:
        raise UserError(f"{word.name}: {word.token} was made for a model with two text encoders (SDXL); this one has one")
    vocabulary, token = encoder.tokenizer.get_vocab(), word.token
    if token in encoder.aliases or token in encoder.tokenizer.get_added_vocab():
        raise UserError(f"{token}: the model knows this word already; choose another token")
    if token in vocabulary or f"{token}</w>" in vocabulary:
        own = f"<{token}>"
        while own in vocabulary:
            own = f"<{own}>"
        add_word(encoder, own, word.rows)
        encoder.aliases[token] = own
    else:
        add_word(encoder, token, word.rows)


def _table(encoder: TextEncoder) -> Tensor:
    found: Any = encoder.model.get_input_embeddings()
    if encoder.model.config.model_type == "t5" or not isinstance(found, nn.Embedding):
        raise UserError("new words need a CLIP text encoder; this model has another kind")
    return found.weight.detach()
