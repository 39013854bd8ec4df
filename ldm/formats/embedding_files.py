"""Textual inversion embeddings in files: diffusers', A1111's web UI's (also .pt, .bin), of one or two text encoders; read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.formats.atomic import sha256, write_tensors
from ldm.formats.weights_file import read_weights
from ldm.models.lora import LearnedEmbedding

DIFFUSERS = "learned_embeds.safetensors"
FOLDERS = (DIFFUSERS, f"embedding/{DIFFUSERS}", "learned_embeds.bin")  # what a folder may have
A1111 = "emb_params"  # the only key of a file for A1111's web UI, which takes the word from the file's name
UNNAMED = (A1111, "string_to_param", "string_to_param.*", "clip_l", "clip_g")  # keys that do not tell the word
LONGEST, MOST_VECTORS = 200, 1000  # characters of a word; embeddings of one


def read_embedding(path: Path) -> LearnedEmbedding:
    """The word in a file, or in a folder with one of the usual name.

    Raises:
        UserError: if there is none.
    """
    path = at_home(path)
    file = next((path / name for name in FOLDERS if (path / name).is_file()), path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; give an embedding's file (.safetensors, .pt, .bin), or a folder with {DIFFUSERS}")
    state, texts = read_weights(file)
    token = texts.get("token", file.stem) if set(state) <= set(UNNAMED) else next(iter(state))
    return embedding_of(token, state, str(path), sha256(file))


def embedding_of(token: str, state: Mapping[str, Tensor], where: str, content: str) -> LearnedEmbedding:
    """The embedding in tensors by key: one, or `clip_l` and `clip_g` of two text encoders.

    Args:
        content: hash of the file.

    Raises:
        UserError: if they are no embedding.
    """
    if set(state) != {"clip_l", "clip_g"} and len(state) != 1:
        raise UserError(f"{where}: {len(state)} tensors; an embedding's file has one, named by its word or {A1111}, or clip_l and clip_g")
    if "clip_g" in state and len(state) == 1:
        raise UserError(f"{where}: has clip_g, of the second text encoder, but not clip_l of the first; give the whole file")
    if not token.strip() or not token.isprintable() or len(token) > LONGEST:
        raise UserError(f"{where}: its word is {token[:40]!r}; one of at most {LONGEST} printable characters is needed")
    second = _rows(state["clip_g"], token, where) if "clip_g" in state else None
    rows = _rows(state["clip_l"] if second is not None else next(iter(state.values())), token, where)
    if second is not None and len(second) != len(rows):
        raise UserError(f"{where}: clip_l has {len(rows)} vectors and clip_g {len(second)}; the file is damaged")
    return LearnedEmbedding(token, rows, where, content, second)


def _rows(found: Tensor, token: str, where: str) -> Tensor:
    """The vectors (V,D) in float32.

    Raises:
        UserError: if they are none.
    """
    rows = found[None] if found.ndim == 1 else found
    if rows.ndim != 2 or not rows.is_floating_point() or not rows.numel() or len(rows) > MOST_VECTORS:
        raise UserError(f"{where}: {token[:40]} of shape {list(found.shape)} is no table of embeddings; another kind of file?")
    rows = rows.to(torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise UserError(f"{where}: {token[:40]} has values that are no finite numbers; another kind of file?")
    return rows


def write_embedding(folder: Path, token: str, rows: Sequence[Tensor], metadata: Mapping[str, str]) -> list[Path]:
    """Write a word as diffusers' learned_embeds.safetensors and as WORD.safetensors for A1111's web UI; returns both files.

    Args:
        rows: (V,D), or one for each of two text encoders, which both files then have as `clip_l` and `clip_g`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    other = folder / f"{re.sub(r'[^A-Za-z0-9_-]', '', token) or 'word'}.safetensors"
    texts = {**metadata, "format": "pt", "token": token}
    for file, key in ((folder / DIFFUSERS, token), (other, A1111)):
        names = (key,) if len(rows) == 1 else ("clip_l", "clip_g")
        write_tensors(file, {name: own.contiguous() for name, own in zip(names, rows, strict=True)}, texts)
    return [folder / DIFFUSERS, other]
