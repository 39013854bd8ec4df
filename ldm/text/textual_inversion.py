"""Textual inversion (Gal 2022, arXiv 2208.01618): learned embeddings in memory, and in diffusers' and A1111's files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.formats.atomic import sha256, write_tensors
from ldm.formats.part import read_safetensors
from ldm.formats.tensor_file import read_texts
from ldm.text.encoder import TextEncoder

DIFFUSERS = "learned_embeds.safetensors"
A1111 = "emb_params"  # the only key of a file for A1111's web UI, which takes the word from the file's name


@dataclass(frozen=True)
class LearnedEmbedding:
    """Textual inversion embedding: a placeholder token and its vectors."""

    token: str
    rows: Tensor  # (V,D)
    name: str = "embedding"  # for messages
    hash: str = ""  # SHA-256 of the file


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


def _table(encoder: TextEncoder) -> Tensor:
    found: Any = encoder.model.get_input_embeddings()
    if encoder.model.config.model_type == "t5" or not isinstance(found, nn.Embedding):
        raise UserError("new words need a CLIP text encoder; this model has another kind")
    return found.weight.detach()


def read_embedding(path: Path) -> LearnedEmbedding:
    """The word in a file, or in a folder with one of the usual name.

    Raises:
        UserError: if there is none.
    """
    path = path.expanduser()
    file = next((p for p in (path / DIFFUSERS, path / "embedding" / DIFFUSERS) if p.is_file()), path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; give an embedding's .safetensors file, or a folder with {DIFFUSERS}")
    if file.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors is read; other files may hold programs")
    state = read_safetensors(file)
    if len(state) != 1:
        raise UserError(f"{path}: {len(state)} tensors; an embedding's file has one, named by its word or {A1111}")
    [(token, rows)] = state.items()
    token = read_texts(file).get("token", file.stem) if token == A1111 else token
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.is_floating_point() or not bool(torch.isfinite(rows).all()):
        raise UserError(f"{path}: {token} is no table of embeddings; another kind of file?")
    return LearnedEmbedding(token, rows.float(), str(path), sha256(file))


def write_embedding(folder: Path, token: str, rows: Tensor, metadata: Mapping[str, str]) -> list[Path]:
    """Write a word as diffusers' learned_embeds.safetensors and as WORD.safetensors for A1111's web UI; returns both files."""
    folder.mkdir(parents=True, exist_ok=True)
    other = folder / f"{re.sub(r'[^A-Za-z0-9_-]', '', token) or 'word'}.safetensors"
    texts = {**metadata, "format": "pt", "token": token}
    write_tensors(folder / DIFFUSERS, {token: rows.contiguous()}, texts)
    write_tensors(other, {A1111: rows.contiguous()}, texts)
    return [folder / DIFFUSERS, other]
