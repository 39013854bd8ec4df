"""Prompts become Text: a small CLIP text tower learned in the run, or a pretrained CLIP; always frozen when it is used."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.batch import Text
from ldm.config import Positive, config
from ldm.errors import UserError
from ldm.folder import read_config

BYTES = 512  # single bytes, within a word and at its end: the symbols that every vocabulary starts from
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
ROWS = 8  # captions per call of the encoder, padded: floating-point results depend on the shape, so it is fixed
MEMORY_BYTES = 2**28  # of encoded captions that are remembered


@config
class SmallText:
    """The size of a text tower that is trained in the run."""

    width: Positive = 128  # of the states that the UNet attends to
    layers: Positive = 2  # transformer blocks
    heads: Positive = 4  # attention heads; a divisor of width
    max_tokens: Positive = 77  # longer captions are cut

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"heads {self.heads} does not divide width {self.width}")


def train_tokenizer(captions: Iterable[str], vocabulary: int, max_tokens: int) -> Any:
    """A CLIPTokenizer whose byte-pair merges are learned from captions (Sennrich 2016, arXiv 1508.07909).

    Any text can be written in it, since all bytes are in the vocabulary. The special tokens come last, so that no id is
    0, 1 or 2: transformers pools at the wrong place where the end token's id is 2.

    Raises:
        UserError: if the vocabulary has no room for the bytes and the two special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    least = BYTES + len(SPECIAL)
    if vocabulary < least:
        raise UserError(f"vocabulary: got {vocabulary}; at least {least} are needed, since all bytes must fit")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    like = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = like.normalizer, like.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL), initial_alphabet=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][: vocabulary - least]
    words = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in learned), *SPECIAL]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=max_tokens)


def small_clip_text(config: SmallText, tokenizer: Any) -> Any:
    """A fresh transformers CLIPTextModel for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=config.width, intermediate_size=4 * config.width,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=config.max_tokens,
            projection_dim=config.width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


class TextEncoder:
    """A CLIP text model with its tokenizer.

    `encode` gives the states of all tokens after the last layer norm, padding included, as Stable Diffusion 1.x and 2.x
    use them; `Text.mask` tells padding from words. Captions are remembered, so those that come again cost nothing.

    Args:
        model: a transformers CLIPTextModel.
        tokenizer: its CLIPTokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._memory: OrderedDict[str, tuple[Tensor, Tensor, Tensor]] = OrderedDict()

    @property
    def width(self) -> int:
        """Channels of a token's state."""
        return int(self.model.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """Tokens of every encoded prompt, start, end and padding included."""
        return int(self.model.config.max_position_embeddings)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B,L) and which of them are no padding (B,L)."""
        found = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return found["input_ids"], found["attention_mask"].bool()

    def overlong(self, prompts: Iterable[str]) -> dict[str, int]:
        """Prompts that will be cut, with their number of tokens."""
        counts = {prompt: len(self.tokenizer(prompt, truncation=False, verbose=False)["input_ids"]) for prompt in set(prompts)}
        return {prompt: count for prompt, count in counts.items() if count > self.max_tokens}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        """Frozen states of prompts on the model's device; each depends on its own prompt alone."""
        device = self.model.device
        missing = [p for p in dict.fromkeys(prompts) if p not in self._memory]
        if self._memory and next(iter(self._memory.values()))[0].device != device:
            self._memory.clear()
            missing = list(dict.fromkeys(prompts))
        fresh: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for start in range(0, len(missing), ROWS):
            part = missing[start : start + ROWS]
            ids, mask = self.tokens(part + [part[-1]] * (ROWS - len(part)))
            # The states must be the same in training under autocast and in sampling without it.
            with torch.autocast(device.type, enabled=False):
                out = self.model(ids.to(device))
            rows = zip(part, out.last_hidden_state, mask.to(device), out.pooler_output, strict=False)
            fresh |= {prompt: (states, m, pooled) for prompt, states, m, pooled in rows}
        found = [self._memory[p] if p in self._memory else fresh[p] for p in prompts]
        self._remember(fresh)
        states, masks, pooled = (torch.stack(column) for column in zip(*found, strict=True))
        return Text(tokens=states, mask=masks, pooled=pooled)

    def _remember(self, fresh: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
        for prompt, row in fresh.items():
            self._memory[prompt] = tuple(value.clone() for value in row)  # type: ignore[assignment]
        each = 4 * self.max_tokens * self.width
        while len(self._memory) * each > MEMORY_BYTES:
            self._memory.popitem(last=False)

    def forward_train(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """The state at each caption's end token (B,D), with gradient."""
        ids, _ = self.tokens(captions)
        return self.model(ids.to(device)).pooler_output

    def save(self, folder: Path) -> None:
        """text_encoder/ and tokenizer/ below `folder`, as transformers reads them; also vocab.json and merges.txt."""
        target = folder / "tokenizer"
        with quiet():
            self.model.save_pretrained(folder / "text_encoder")
            self.tokenizer.save_pretrained(target)
        bpe = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"]
        (target / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"])]
        (target / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> TextEncoder:
        """The encoder in text_encoder/ and tokenizer/ below `folder`.

        Raises:
            UserError: naming what is missing, damaged or no CLIP text model.
        """
        from transformers import CLIPTextModel, CLIPTokenizer

        part = folder / "text_encoder"
        kinds = read_config(part).get("architectures") or ["CLIPTextModel"]
        if kinds[0] not in ("CLIPTextModel", "CLIPModel"):
            raise UserError(f"{part}: a CLIPTextModel was expected, but its config.json says {kinds[0]}")
        if not (folder / "tokenizer").is_dir():
            raise UserError(f"{folder / 'tokenizer'}: no such folder; copy the whole model folder again")
        with quiet():
            try:
                model, loading = CLIPTextModel.from_pretrained(part, output_loading_info=True, local_files_only=True)
            except Exception as error:  # transformers, safetensors and the file system each have their own
                raise UserError(f"{part}: cannot be loaded ({_first_line(error)}); copy it again") from None
            try:
                tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
            except Exception as error:
                raise UserError(f"{folder / 'tokenizer'}: cannot be loaded ({_first_line(error)}); copy it again") from None
        if lost := [name for name in loading["missing_keys"] if "position_ids" not in name]:
            raise UserError(f"{part}: weights missing: {', '.join(sorted(lost)[:3])}; copy it again")
        return TextEncoder(model.float().eval().requires_grad_(False), tokenizer)


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
