"""Tokenizers in transformers' layout, read as data: vocabularies, merges and special tokens, each checked and bounded.

What splits and normalises text is the tokenizer class' own. A file's own normalisers, patterns and post-processors are not run: chains
of them can grow a text without bound.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError, first_line
from ldm.config.files import read_bounded
from ldm.formats.integrity import check
from ldm.formats.part import AGAIN, read_json, write_whole

VOCABULARY, MERGES, FAST, PIECES, SETTINGS = "vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json"
WORDS = 2**20  # of a vocabulary, at most
HOLES = 1024  # numbers up to the largest that may have no word
LETTERS = 1024  # of a word, at most
ADDED = 2**16  # tokens that are found before all others, at most
LENGTHS = {"BPE": 77, "Unigram": 512}  # tokens of a prompt, where the files do not say
LONGEST = 2**15
NAMED = ("unk_token", "bos_token", "eos_token", "pad_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerData:
    """What the files of a tokenizer say."""

    words: dict[str, int]  # of byte pairs; of pieces their places
    merges: list[tuple[str, str]] = field(default_factory=list)  # in the order of their rank
    scores: list[tuple[str, float]] = field(default_factory=list)  # of a Unigram's pieces
    charsmap: bytes = b""  # sentencepiece's table of characters, compiled
    added: dict[int, dict[str, Any]] = field(default_factory=dict)  # words found before all others: content and flags
    named: dict[str, str] = field(default_factory=dict)  # unk_token, bos_token, eos_token, pad_token
    length: int = 0  # tokens of a prompt; 0: not said
    kind: str = ""  # the class that tokenizer_config.json names
    ends: dict[str, bool] = field(default_factory=dict)  # add_bos_token, add_eos_token, where they are said


def load_tokenizer(part: Path) -> Any:
    """The tokenizer in a folder: CLIP's, Qwen's or Gemma's byte pairs, or T5's pieces.

    Raises:
        UserError: naming what is missing, damaged or out of range.
    """
    if not part.is_dir():
        raise UserError(f"{part}: no such folder; {AGAIN}")
    fast, pairs = (part / FAST).is_file(), (part / VOCABULARY).is_file() and (part / MERGES).is_file()
    if not (fast or pairs or (part / PIECES).is_file()):
        raise UserError(f"{part}: no {FAST} here, nor {VOCABULARY} with {MERGES}; {AGAIN}")
    try:
        with quiet():
            made = _made(part, fast, pairs)
        check(part)
        return made
    except UserError:
        raise
    except Exception as error:  # of transformers, tokenizers and the file system
        raise UserError(f"{part}: cannot be loaded ({first_line(error)}); {AGAIN}") from None


def _made(part: Path, fast: bool, pairs: bool) -> Any:
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer
    from transformers import T5TokenizerFast as T5Tokenizer  # type: ignore[attr-defined]

    made: Any
    if fast:
        data = _from_fast(part / FAST, _settings(part))
    elif pairs:
        said = _settings(part)
        data = TokenizerData(_numbered(part / VOCABULARY, read_json(part / VOCABULARY)), _pairs(part / MERGES), **said)
    else:
        return _from_pieces(part / PIECES, _settings(part))
    added = {number: AddedToken(**token) for number, token in sorted(data.added.items())}
    kind = "Unigram" if data.scores else "BPE"
    words: dict[str, Any] = {**data.named, "added_tokens_decoder": added, "model_max_length": data.length or LENGTHS[kind]}
    if kind == "Unigram":
        words.pop("bos_token", None)  # T5 has none
        made = T5Tokenizer(vocab=data.scores, _spm_precompiled_charsmap=data.charsmap or None, **words)
    else:
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {  # by a word in the name of the class
            "Gemma": (GemmaTokenizer, {"padding_side": "right", "add_bos_token": True, **data.ends}),
            "Qwen2": (Qwen2Tokenizer, {"padding_side": "right"}),
            "": (CLIPTokenizer, {}),
        }
        made_by, own = next(found for word, found in kinds.items() if word in data.kind)
        made = made_by(vocab=data.words, merges=data.merges, **words, **own)
    for number, token in data.added.items():
        if made.convert_tokens_to_ids(token["content"]) != number:
            raise UserError(f"{part}: added_tokens: {ascii(token['content'])[:100]} cannot have the number {number}; {AGAIN}")
    if made.pad_token_id is None or made.eos_token_id is None:
        raise UserError(f"{part}: has no token for padding, or none for the end; {AGAIN}")
    return made


def _settings(part: Path) -> dict[str, Any]:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say: `named`, `added` and `length`."""
    file = part / SETTINGS
    values = read_json(file) if file.exists() else {}
    names = part / "special_tokens_map.json"
    named: dict[str, str] = {}
    for source in (names, file):
        said = values if source == file else read_json(source) if source.exists() else {}
        for name in NAMED:
            token = said.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None:
                named[name] = _word(source, name, token)
    length = values.get("model_max_length")
    length = length if isinstance(length, int | float) and not isinstance(length, bool) else 0
    if length >= 2**40:  # transformers' number for what has no bound
        length = 0
    if length and not (length == int(length) and 2 < length <= LONGEST):
        raise UserError(f"{file}: model_max_length is {length}; a whole number from 3 to {LONGEST} is needed")
    found = values.get("added_tokens_decoder") or {}
    listed = (
        [{**token, "id": _number(number)} for number, token in found.items() if isinstance(token, dict)] if isinstance(found, dict) else []
    )
    more = part / "added_tokens.json"
    if more.exists():
        listed += [{"id": number, "content": word} for word, number in read_json(more).items()]
    ends = {name: values[name] for name in ("add_bos_token", "add_eos_token") if isinstance(values.get(name), bool)}
    said = {"kind": str(values.get("tokenizer_class"))[:80], "ends": ends}
    return {"named": named, "added": _added(file, listed), "length": int(length), **said}


def _number(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else text


def _added(file: Path, listed: Any) -> dict[int, dict[str, Any]]:
    if not isinstance(listed, list) or len(listed) > ADDED:
        raise UserError(f"{file}: added_tokens: a list of at most {ADDED} tokens is needed; {AGAIN}")
    found = {}
    for token in listed:
        number = token.get("id") if isinstance(token, dict) else None
        if type(number) is not int or not 0 <= number < WORDS:
            raise UserError(f"{file}: added_tokens: the number of a token is {ascii(number)[:40]}; a whole number below {WORDS} is needed")
        flags = {name: token[name] for name in FLAGS if isinstance(token.get(name), bool)}
        found[number] = {"content": _word(file, "added_tokens", token.get("content")), **flags}
    return found


def _word(file: Path, name: str, word: Any) -> str:
    """A token's text.

    Raises:
        UserError: if it is no text of a length that a token has.
    """
    if not isinstance(word, str) or not 0 < len(word) <= LETTERS or word != word.encode("utf-8", "replace").decode("utf-8"):
        raise UserError(f"{file}: {name}: {ascii(word)[:60]} is no token; a text of 1 to {LETTERS} characters is needed; {AGAIN}")
    return word


def _numbered(file: Path, words: Any, added: Iterable[int] = ()) -> dict[str, int]:
    """A vocabulary of words and their numbers, none twice and hardly any left out."""
    if not isinstance(words, dict) or not 0 < len(words) <= WORDS:
        raise UserError(f"{file}: a vocabulary of 1 to {WORDS} words and their numbers is needed; {AGAIN}")
    numbers = set(added)
    for word, number in words.items():
        if type(number) is not int or not 0 <= number < WORDS:
            raise UserError(f"{file}: the number of {ascii(word)[:60]} is {ascii(number)[:40]}; a whole number below {WORDS} is needed")
        if len(word) > LETTERS:
            raise UserError(f"{file}: {ascii(word)[:60]}... is no token; a text of at most {LETTERS} characters is needed; {AGAIN}")
    if len(set(words.values())) != len(words):
        raise UserError(f"{file}: two words have the same number; {AGAIN}")
    numbers |= set(words.values())
    if max(numbers) >= len(numbers) + HOLES:
        raise UserError(f"{file}: {len(numbers)} words have numbers up to {max(numbers)}; they should follow one another; {AGAIN}")
    return words


def _pairs(file: Path) -> list[tuple[str, str]]:
    lines = read_bounded(file, 2**26).decode("utf-8").split("\n")
    return _merges(file, [line for line in lines if line.strip() and not line.startswith("#version")])


def _merges(file: Path, merges: Any) -> list[tuple[str, str]]:
    found = []
    for merge in merges if isinstance(merges, list) and len(merges) <= WORDS else [None]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(word, str) and 0 < len(word) <= LETTERS for word in pair):
            raise UserError(f"{file}: merges: {ascii(merge)[:60]} is no pair of tokens; {AGAIN}")
        found.append((pair[0], pair[1]))
    return found


def _from_fast(file: Path, said: dict[str, Any]) -> TokenizerData:
    """What a tokenizer.json says."""
    values = read_json(file)
    model = values.get("model")
    kind = model.get("type", "BPE" if "merges" in model else None) if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind not in LENGTHS:
        raise UserError(f"{file}: cannot be loaded (model.type is {ascii(kind)[:40]}; known are {', '.join(LENGTHS)}); {AGAIN}")
    said = {**said, "added": said["added"] | _added(file, values.get("added_tokens") or [])}
    if kind == "BPE":
        return TokenizerData(_numbered(file, model.get("vocab"), said["added"]), _merges(file, model.get("merges")), **said)
    pieces = model.get("vocab")
    if not isinstance(pieces, list) or not all(isinstance(p, list) and len(p) == 2 and isinstance(p[1], int | float) for p in pieces):
        raise UserError(f"{file}: model.vocab: pairs of a piece and its score are needed; {AGAIN}")
    scores = [(_word(file, "model.vocab", word), float(score)) for word, score in pieces]
    words = {word: number for number, (word, _) in enumerate(scores)}
    return TokenizerData(_numbered(file, words, said["added"]), scores=scores, charsmap=_charsmap(file, values.get("normalizer")), **said)


def _charsmap(file: Path, normalizer: Any) -> bytes:
    """sentencepiece's table of characters, which only T5 has; no character in it becomes a long text."""
    steps = normalizer.get("normalizers") if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence" else [normalizer]
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and step.get("type") == "Precompiled":
            found = base64.b64decode(str(step.get("precompiled_charsmap")), validate=True)
            size = int.from_bytes(found[:4], "little")
            if not 4 <= 4 + size <= len(found) or max(map(len, found[4 + size :].split(b"\0"))) > LETTERS:
                raise UserError(f"{file}: normalizer: its table of characters is damaged; {AGAIN}")
            return found
    return b""


def _from_pieces(file: Path, said: Mapping[str, Any]) -> Any:
    """T5's tokenizer from sentencepiece's own file alone: its neighbours are not shown to transformers."""
    from transformers import T5TokenizerFast as T5Tokenizer  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PIECES).write_bytes(read_bounded(file, 2**24))
        made = T5Tokenizer.from_pretrained(folder, local_files_only=True)
    _numbered(file, made.get_vocab())
    made.model_max_length = said["length"] or LENGTHS["Unigram"]
    return made


def save_tokenizer(tokenizer: Any, part: Path) -> None:
    """Write a tokenizer as transformers reads it; byte pairs also as vocab.json and merges.txt, which older programs want."""
    tokenizer.save_pretrained(part)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if bpe["type"] != "BPE":
        return
    write_whole(part / VOCABULARY, json.dumps(bpe["vocab"], ensure_ascii=False).encode())
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"])]
    write_whole(part / MERGES, ("\n".join(lines) + "\n").encode())


class quiet:
    """Within it transformers shows no progress bars and no advice."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *problem: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.level)
        logging.enable_progress_bar()
