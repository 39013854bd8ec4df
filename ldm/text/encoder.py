"""Text encoder: prompts to Text by a frozen CLIP or T5, trained in the run or pretrained; tokenizer training."""

from __future__ import annotations

import copy
import difflib
import json
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Positive, config
from ldm.diffusion.batch import Text, sent
from ldm.formats.atomic import write_json
from ldm.formats.model_folder import INDEX
from ldm.formats.part import read_json, save_part
from ldm.formats.text_folder import SPECIAL, load_pair, load_text_model, text_parts
from ldm.formats.tokenizer_files import load_tokenizer, save_tokenizer
from ldm.models.lora import Part
from ldm.models.text_tower import CLIPS, TowerPair, towers
from ldm.text.prompt_syntax import LEARNED

BYTES = 512  # single bytes, within a word and at its end: the symbols that every vocabulary starts from
ROWS = 8  # captions per call of the encoder, padded: floating-point results depend on the shape, so it is fixed
MEMORY_BYTES = 2**28  # of encoded captions that are remembered
SELDOM = 16  # where of so many captions fewer than one came again until the memory was full, others are not remembered
NOTATION = re.compile(r"\b(?:AND|BREAK)\b")  # what in a prompt is no word
END = "</w>"  # of a token that ends a word
OWN = 8192  # tokens: a vocabulary that was made of a run's own captions has fewer
MOST = 16  # times as much as the encoder reads at once is looked at
ZEROS = "force_zeros_for_empty_prompt"  # how the model_index.json of a pair says what no prompt is, as diffusers names it
K = TypeVar("K", bound=Hashable)


@config
class SmallText:
    """Size of the CLIP text tower that is trained in the run."""

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
    ends = [f"{symbol}</w>" for symbol in symbols]
    # Of pairs that are equally frequent the trainer takes the one with the lower numbers, and it would number what ends a word as it
    # comes across them in a hash table, otherwise in each process: named beforehand, they have numbers.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL), initial_alphabet=symbols, special_tokens=ends, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    learned = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][: vocabulary - least]
    words = [*symbols, *ends, *("".join(pair) for pair in learned), *SPECIAL]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=max_tokens)  # type: ignore[arg-type]


def small_clip_text(config: SmallText, tokenizer: Any) -> Any:
    """A fresh transformers CLIPTextModel for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_tokens,
            projection_dim=config.width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class EncodedPrompt:
    """Encoded prompt: states (L,D), mask (L,) and pooled state, as remembered."""

    states: Tensor  # (L,D)
    mask: Tensor  # (L,) bool
    pooled: Tensor | None  # (P,)

    def alone(self) -> EncodedPrompt:
        """The same in memory of its own."""
        return EncodedPrompt(self.states.clone(), self.mask.clone(), None if self.pooled is None else self.pooled.clone())


class TextEncoder:
    """Text encoder: a frozen text model with its tokenizer.

    `encode` gives the states of all tokens after the last layer norm, padding included. Stable Diffusion's networks attend
    to the padding too, and so do ours, so that a model folder draws the same picture in diffusers; `Text.mask` tells
    padding from words for whoever wants to hide it. (Stable Diffusion 2's states of the layer before the last come from a
    text model that was stored one layer shorter.) Captions are remembered, so those that come again cost nothing; where hardly
    any do, those alone that did.

    Args:
        model: a transformers CLIPTextModel, T5EncoderModel, Gemma or Qwen, or a `TowerPair`, whose two towers read the same words.
        tokenizer: its tokenizer, whose model_max_length is the number of tokens; of a pair the first tower's.
        zeros: what the network is told where there is no prompt: zeros, as Stable Diffusion XL, or the empty prompt's states.
    """

    def __init__(self, model: Any, tokenizer: Any, zeros: bool = False) -> None:
        self.model, self.tokenizer, self.zeros = model, tokenizer, zeros
        self.aliases: dict[str, str] = {}  # words of prompts that stand for an added one where they stand alone
        self.learned_words()
        self._memory: OrderedDict[Hashable, EncodedPrompt] = OrderedDict()
        self._again: set[Hashable] = set()  # what was recalled
        self._met, self._seldom = 0, False  # captions that were computed; whether they hardly ever come again
        self._place: tuple[torch.device, torch.dtype] | None = None  # of what is remembered

    @property
    def width(self) -> int:
        """Channels of a token's state."""
        return int(self.model.config.hidden_size)

    @property
    def pooled_width(self) -> int:
        """Channels of a prompt's pooled state."""
        return int(self.model.config.pooled_size) if isinstance(self.model, TowerPair) else self.width

    @property
    def networks(self) -> dict[Part, Any]:
        """The text model, or of a pair both towers, by their folders' names."""
        names: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
        return dict(zip(names, towers(self.model), strict=False))

    @property
    def max_tokens(self) -> int:
        """Tokens of every encoded prompt, start, end and padding included."""
        longest = int(self.tokenizer.model_max_length)
        return min(longest, self.model.config.to_dict().get("max_position_embeddings", longest))  # T5 takes any number

    @cached_property
    def _how(self) -> dict[str, bool]:
        """How words are looked up: where padding is a word too (OpenCLIP pads with `!`), it must not be found in prompts as padding."""
        return {"split_special_tokens": not str(self.tokenizer.pad_token).startswith("<")}

    @cached_property
    def _characters(self) -> int:
        """Longest prompt in characters that can matter: beyond it all tokens are used up, however long each is."""
        return 4 * (self.max_tokens + 8) * max(map(len, self.tokenizer.get_vocab()))

    def _readable(self, prompt: str) -> str:
        """The prompt as tokenizers take it: real characters, blanks joined, no longer than can matter."""
        line = " ".join(prompt[: 64 * self._characters].split())[: self._characters]
        return self._spelt(unicodedata.normalize("NFC", line.encode("utf-8", "replace").decode("utf-8")))

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B,L) and which of them are no padding (B,L)."""
        lines = [self._readable(prompt) for prompt in prompts]
        found = self.tokenizer(lines, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt", **self._how)
        return found["input_ids"], found["attention_mask"].bool()

    @cached_property
    def _special(self) -> tuple[list[int], list[int]]:
        """The ids before and after the words of every prompt."""
        ids, words = (list(self.tokenizer("a", add_special_tokens=on)["input_ids"]) for on in (True, False))
        start = next(i for i in range(len(ids)) if ids[i : i + len(words)] == words)
        return ids[:start], ids[start + len(words) :]

    @property
    def room(self) -> int:
        """Tokens of words that one prompt may have."""
        return self.max_tokens - self.words_start - len(self._special[1])

    @property
    def words_start(self) -> int:
        """How many tokens stand before the words."""
        return len(self._special[0])

    def words(self, text: str) -> list[int]:
        """Token ids of a stretch of text without start, end and padding: of a long one, of as much as any network is told."""
        line = " ".join(text[: MOST * self._characters].split())
        line = self._spelt(unicodedata.normalize("NFC", line.encode("utf-8", "replace").decode("utf-8")))
        return list(self.tokenizer(line, add_special_tokens=False, verbose=False, **self._how)["input_ids"])

    def says(self, text: str, word: str) -> bool:
        """Whether a text has a learned word in it, as prompts are read: another word that only contains it is not it."""
        return set(self.words(word)[:1]) <= set(self.words(text))

    @cached_property
    def _met_whole(self) -> bool:
        """Whether each word of the captions that the byte pairs were learned from is one token.

        Where there was room for all pairs, a piece that no further pair takes up ends a word; a vocabulary that was cut has others.
        """
        said = json.loads(self.tokenizer.backend_tokenizer.to_str())["model"].get("merges", [])
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in said]
        taken = {part for pair in pairs for part in pair}
        return bool(pairs) and all(piece in taken or piece.endswith("</w>") for piece in map("".join, pairs))

    def unknown(self, text: str) -> list[str]:
        """Words that a tokenizer which was made of few captions never met.

        They are not one token, or of a vocabulary with no room for all words, letters alone.
        """
        if len(self.tokenizer) > OWN:
            return []
        most = 1 if self._met_whole else None
        return [word for word in self._written(text) if len(self.words(word)) > (most or len(word.encode("utf-8")) - 1)]

    def _written(self, text: str) -> list[str]:
        """The words of two letters and more in a prompt, each once, without those that the model was taught (textual inversion)."""
        text = self._spelt(text)
        for word in sorted(self.tokenizer.added_tokens_encoder, key=len, reverse=True):
            text = text.replace(word, " ")
        return list(dict.fromkeys(re.findall(r"[^\W\d_]{2,}", NOTATION.sub(" ", text))))

    def misspelt(self, text: str) -> dict[str, str]:
        """Words that such a tokenizer reads in pieces, with the whole word of its own that each is most like.

        A vocabulary that was cut reads words of its captions in pieces, too: there the likeness must be a letter's.
        """
        if len(self.tokenizer) > OWN:
            return {}
        least = 0.75 if self._met_whole else 0.88
        ends = [token.removesuffix(END) for token in self.tokenizer.get_vocab() if token.endswith(END)]
        # Whole words: no other token goes on to the left of them.
        words = [end for end in ends if len(end) > 2 and not any(one != end and one.endswith(end) for one in ends)]
        found = {}
        for word in (word for word in self._written(text) if len(word) > 2):
            own = [one for one in words if one[0] == word[0].lower()]
            if len(self.words(word)) > 1 and (near := difflib.get_close_matches(word.lower(), own, 1, least)):
                found[word] = near[0]
        return found

    def encode(self, prompts: Sequence[str], clip_skip: int = 1) -> Text:
        """Frozen states of prompts (at least one) on the model's device; each depends on its own prompt alone.

        Args:
            clip_skip: the layer whose states are read, counted from the last one, which is 1; the last layer norm follows it.
        """
        return self._encode(prompts, self.tokens, clip_skip)

    def encode_words(self, rows: Sequence[tuple[int, ...]], clip_skip: int = 1) -> Text:
        """The same for token ids of words, at most `room` a row."""
        return self._encode(rows, self.framed, clip_skip)

    def check_skip(self, clip_skip: int) -> None:
        """Refuse a layer that is not there.

        Raises:
            UserError: naming how many there are.
        """
        layers = 1 if self.model.config.model_type not in CLIPS else int(self.model.config.num_hidden_layers)
        if not 1 <= clip_skip <= layers:
            fix = f"from 1 to {layers} is possible" if layers > 1 else "it is read at its end alone; leave it out"
            raise UserError(f"clip_skip: got {clip_skip}, but this model's text encoder has {layers} layers to choose from: {fix}")

    def unheard_skip(self, clip_skip: int) -> str:
        """Why a layer that was asked for is the one that is read anyway, in a line; empty: it is another, or nothing was asked for."""
        usual = clip_skip == self.model.usual_skip if isinstance(self.model, TowerPair) else False
        return f"clip_skip: {clip_skip} is what this model's text encoders are read at anyway; 3 and more change it" if usual else ""

    def framed(self, rows: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """Words' ids with start, end and padding (B,L), and which are no padding (B,L)."""
        before, after = self._special
        ids = torch.full((len(rows), self.max_tokens), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), self.max_tokens, dtype=torch.bool)
        for i, row in enumerate(rows):
            whole = [*before, *row, *after]
            ids[i, : len(whole)] = torch.tensor(whole)
            mask[i, : len(whole)] = True
        return ids, mask

    @torch.no_grad()
    def _encode(self, keys: Sequence[K], tokens: Callable[[Sequence[K]], tuple[Tensor, Tensor]], clip_skip: int) -> Text:
        place = next((p.device, p.dtype) for p in self.model.parameters())
        if place != self._place:
            self.forget()
            self._place = place
        fresh: dict[Hashable, EncodedPrompt] = {}
        missing = [key for key in dict.fromkeys(keys) if (key, clip_skip) not in self._memory]
        for start in range(0, len(missing), ROWS):
            part = missing[start : start + ROWS]
            ids, mask = tokens(part + [part[-1]] * (ROWS - len(part)))
            ids, mask = sent(ids, place[0]), sent(mask, place[0])
            # The states must be the same in training under autocast and in sampling without it.
            with torch.autocast(place[0].type, enabled=False):
                states, pooled = self._run(ids, mask, clip_skip)
            for i, key in enumerate(part):
                fresh[key, clip_skip] = EncodedPrompt(states[i], mask[i], None if pooled is None else pooled[i])
        found = [fresh[key] if key in fresh else self._recall(key) for key in ((one, clip_skip) for one in keys)]
        self._remember(fresh)
        return Text(
            tokens=torch.stack([row.states for row in found]),
            mask=torch.stack([row.mask for row in found]),
            pooled=None if found[0].pooled is None else torch.stack([row.pooled for row in found if row.pooled is not None]),
        )

    def _run(self, ids: Tensor, mask: Tensor, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        if self.model.config.model_type not in CLIPS:
            # T5 looks both ways, so its words must not see the padding; CLIP's cannot. None of these has a pooled state.
            return self.model(ids, attention_mask=mask).last_hidden_state, None
        told = (ids, mask) if isinstance(self.model, TowerPair) else (ids,)
        out = self.model(*told) if clip_skip == 1 else self.model(*told, clip_skip)
        return out.last_hidden_state, out.pooler_output

    def _recall(self, key: Hashable) -> EncodedPrompt:
        self._memory.move_to_end(key)
        self._again.add(key)
        return self._memory[key]

    def _remember(self, fresh: dict[Hashable, EncodedPrompt]) -> None:
        self._met += len(fresh)
        if self._seldom:
            return
        # Copies, or one remembered caption would keep all of its call's.
        self._memory.update({key: row.alone() for key, row in fresh.items()})
        most = MEMORY_BYTES // (4 * self.max_tokens * self.width)
        if len(self._memory) > most and SELDOM * len(self._again) < self._met:
            self._seldom = True
            self._memory = OrderedDict((key, row) for key, row in self._memory.items() if key in self._again)
        while len(self._memory) > most:
            self._again.discard(self._memory.popitem(last=False)[0])

    def learned_words(self) -> None:
        """Find the words of several embeddings in the tokenizer, <a> with <a>_1 and so on: in a prompt the word stands for all of them."""
        added = [word for word, _ in sorted(self.tokenizer.get_added_vocab().items(), key=lambda item: item[1])]
        rest: dict[str, list[str]] = {word: [] for word in added}
        for word in added:
            stem, _, number = word.rpartition("_")
            if stem in rest and number.isdecimal():
                rest[stem].append(word)
        self._spellings = {word: " ".join([word, *others]) for word, others in rest.items() if others}
        special = set(self.tokenizer.all_special_tokens)
        self._learned = {word.lower(): word for word in added if word not in special} | {word: word for word in added}
        longest_first = sorted((word for word in added if word not in special), key=len, reverse=True)
        self._any_case = re.compile("|".join(map(re.escape, longest_first)) or "(?!)", re.I)

    def untaught(self, text: str) -> list[str]:
        """The words that a prompt names as learned ones, in ComfyUI's way (embedding:NAME), and that this model was not taught."""
        return [name for name in dict.fromkeys(LEARNED.findall(text)) if self._own(name) is None]

    def _own(self, name: str) -> str | None:
        """A learned word by the name of its file: without folders and ending, in any case."""
        stem = re.sub(r"\.(safetensors|pt|bin)?$", "", re.split(r"[/\\]", name)[-1])
        own = next((word for word in self.aliases if word.lower() == stem.lower()), None)
        return own or self._learned.get(stem) or self._learned.get(stem.lower())

    def _spelt(self, line: str) -> str:
        line = LEARNED.sub(lambda found: self._own(found[1]) or found[0], line) if self._learned else line
        # In any case, as the web UI finds them; where two differ in that alone, each as it is written.
        for word, own in self.aliases.items():
            line = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", own.replace("\\", r"\\"), line, flags=re.I)
        line = self._any_case.sub(lambda found: self._learned.get(found[0]) or self._learned.get(found[0].lower(), found[0]), line)
        for word, words in self._spellings.items():
            line = re.sub(rf"{re.escape(word)}(?!_\d)", words.replace("\\", r"\\"), line)
        return line

    def unprompted(self, empty: Text) -> Text:
        """What the network is told in place of a prompt, of the text of empty prompts."""
        if not self.zeros:
            return empty
        pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
        return replace(empty, tokens=torch.zeros_like(empty.tokens), pooled=pooled)

    def forget(self) -> None:
        """Encode every caption anew: the model's weights have changed."""
        self._memory.clear()
        self._again.clear()
        self._met, self._seldom = 0, False

    def learn(self, captions: Sequence[str]) -> Text:
        """What `encode` gives, with gradients and without memory."""
        return self._learn(*self.tokens(captions))

    def learn_words(self, rows: Sequence[tuple[int, ...]]) -> Text:
        """What `encode_words` gives, with gradients and without memory."""
        return self._learn(*self.framed(rows))

    def _learn(self, ids: Tensor, mask: Tensor) -> Text:
        device = next(self.model.parameters()).device
        ids, mask = sent(ids, device), sent(mask, device)
        with torch.autocast(device.type, enabled=False):
            states, pooled = self._run(ids, mask)
        return Text(tokens=states, mask=mask, pooled=pooled)

    def forward_train(self, captions: Sequence[str], device: torch.device) -> Tensor:
        """CLIP's state at each caption's end token (B,D), with gradient."""
        ids, _ = self.tokens(captions)
        return self.model(sent(ids, device)).pooler_output

    def save(self, folder: Path) -> None:
        """text_encoder/ and tokenizer/ below `folder`, as any version of transformers reads them; of a pair those of both towers."""
        for name, part in text_parts(self.model).items():
            save_part(*part, folder / name, "model")
        self.save_words(folder)

    def save_words(self, folder: Path) -> None:
        """tokenizer/ below `folder`; of a pair also tokenizer_2/, and what the network is told where there is no prompt."""
        for name, tokenizer in self.tokenizers().items():
            save_tokenizer(tokenizer, folder / name)
        if isinstance(self.model, TowerPair):
            write_json(folder / INDEX, {ZEROS: self.zeros})

    def tokenizers(self) -> dict[str, Any]:
        """By their folders' names; the second one of a pair differs in its padding."""
        if not isinstance(self.model, TowerPair):
            return {"tokenizer": self.tokenizer}
        other = copy.deepcopy(self.tokenizer)
        other.add_special_tokens({"pad_token": other.convert_ids_to_tokens(self.model.padding)})
        return {"tokenizer": self.tokenizer, "tokenizer_2": other}

    @staticmethod
    def load(folder: Path) -> TextEncoder:
        """The encoder in text_encoder/ and tokenizer/ below `folder`, ready to use; with text_encoder_2/ and tokenizer_2/ a pair.

        Raises:
            UserError: naming what is missing, damaged or neither CLIP's nor T5's.
        """
        tokenizer = load_tokenizer(folder / "tokenizer")
        if not (folder / "text_encoder_2").is_dir():
            return TextEncoder.of(load_text_model(folder / "text_encoder"), tokenizer, folder)
        other = load_tokenizer(folder / "tokenizer_2")
        if other.get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{folder / 'tokenizer_2'}: its words are not those of tokenizer; both text encoders must read the same")
        tokenizer.model_max_length = min(tokenizer.model_max_length, other.model_max_length)
        return TextEncoder.of(load_pair(folder, other.pad_token_id), tokenizer, folder, zeros_in(folder))

    @staticmethod
    def of(model: Any, tokenizer: Any, where: Path, zeros: bool = False) -> TextEncoder:
        """The encoder of a text model and a tokenizer that were read from files; `zeros` as the class has it.

        Raises:
            UserError: if the tokenizer has words that the model does not know.
        """
        largest = max(tokenizer.get_vocab().values())
        for tower in towers(model):
            known = tower.get_input_embeddings().weight.shape[0]
            if largest >= known:
                raise UserError(f"{where}: its tokenizer has words up to number {largest}, but its text encoder knows {known} words")
        return TextEncoder(model, tokenizer, zeros)


def zeros_in(folder: Path) -> bool:
    """Whether the network of a folder with two text encoders is told zeros where there is no prompt; it is, unless the folder denies it."""
    return bool(read_json(folder / INDEX).get(ZEROS, True)) if (folder / INDEX).is_file() else True
