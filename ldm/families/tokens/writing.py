"""Token models that write something else than a picture's codes: captions, told a picture or nothing, and scenes, told a text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.data.scenes import marks
from ldm.data.scenes.render import render, to_bytes
from ldm.diffusion.batch import ImageBatch, MomentBatch
from ldm.diffusion.rng import Rng
from ldm.families.draws import OWN, SamplingCall, Settings, Wanted
from ldm.families.family import Family, Terms
from ldm.families.prompted import Prompted
from ldm.families.tokens.drawing import causal, pieces_of, settings_of
from ldm.families.tokens.folder import PART
from ldm.formats.atomic import write_json
from ldm.formats.latent_codec import LatentCodec
from ldm.formats.model_folder import RECORD
from ldm.formats.part import save_part
from ldm.models.embeddings import coordinates
from ldm.models.token_transformer import AESTHETIC, Past, TokenTransformer, Told
from ldm.models.vision_tower import TowerNetwork
from ldm.text.encoder import TextEncoder
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.prompt_syntax import Piece, Prompt
from ldm.text.weighted import encode

BEFORE_A_MARK = re.compile(r" (?=[,.;:!?](?:\s|$))")  # a blank that no one writes, and that tokenizers of whole words leave


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What is read and written, and how.

    Args:
        reads: text, words, image, codes or none.
        writes: caption or scene.
        usual: guidance, temperature, top_k and top_p of the finished model.
        chunk: sequences per call.
        caption_dropout: share of prompts that are left out when it learns.
        label_smoothing: share of the target that is spread over all tokens.
        resolution: px, of the pictures that it has learned from.
        able: what a metric may ask of it.
    """

    reads: str
    writes: str
    usual: Mapping[str, Any]
    chunk: int
    caption_dropout: float
    label_smoothing: float
    resolution: int
    able: frozenset[str]


class WritingFamily(Family, Prompted):
    """A token transformer in causal order that writes captions or scenes.

    One sequence holds the start, what is read as tokens (codes or words), and what is written. All numbers are of one table: first symbols
    (codes of the autoencoder, or marks of scenes), then the start, then words.

    Args:
        text: its tokenizer writes captions; its states are what is read of a text.
        codec: whose codes are read; None: no codes are.
        tower: whose last map is read; None: no image is.
    """

    kind = "tokens"

    def __init__(
        self, said: Writing, network: TokenTransformer, text: TextEncoder | None, codec: LatentCodec | None, tower: TowerNetwork | None
    ) -> None:
        super().__init__()
        self.said, self.network, self.reader = said, network, text
        self._codec, self._tower = (codec,), (tower,)  # tuples, so that they stay out of the module tree
        self.reads_prompts = said.reads in ("text", "words")
        self.able = said.able
        self.start = codec.codes if codec is not None else marks.MARKS if said.writes == "scene" else 0
        self.first = self.start + 1 if said.writes == "caption" else 0  # the number of the first token that is written
        self.kinds = len(self.text.tokenizer) if said.writes == "caption" else marks.MARKS
        self.end = int(self.text.tokenizer.eos_token_id) if said.writes == "caption" else marks.END
        self.length = self.text.max_tokens if said.writes == "caption" else marks.LENGTH

    def frozen(self) -> list[Any]:
        """What it reads with."""
        text = None if self.reader is None else self.reader.model
        return [one for one in (*self._codec, *self._tower, text) if one is not None]

    # Training

    def compilable(self) -> list[nn.Module]:
        """The transformer's layers."""
        return list(self.network.transformer_layers)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Cross-entropy of what is written, summed over each sequence and divided by the greatest length; gauge: bits of a sequence."""
        captions = list(batch.caption)
        if self.reads_prompts:
            drop = rng.uniform("caption_dropout") < self.said.caption_dropout
            captions = ["" if one else caption for one, caption in zip(drop.tolist(), captions, strict=True)]
        written, counts = self._written(batch)
        told = self._told(self._seen(captions, batch), len(captions))
        error, right = self._error(self._before(captions, batch), told, written, counts)
        plain = error.detach().sum(1).mean() / math.log(2)
        return {"tokens": error.sum(1).mean() / self.length}, {"bits": plain, "tokens_right": right}

    def _error(self, before: Tensor, told: Told, written: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy (B,L) of written tokens, 0 where none counts, and the share of those that are the likeliest."""
        longest = int(counts.sum(1).max())
        written, counts = written[:, :longest], counts[:, :longest]
        logits = self.network.sequence(torch.cat([before, written[:, :-1] + self.first], 1), told)[:, before.shape[1] - 1 :]
        logits = logits[..., self.first : self.first + self.kinds]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.said.label_smoothing if self.training else 0.0
        error = F.cross_entropy(logits.transpose(1, 2), written, reduction="none", label_smoothing=smoothing) * counts
        with torch.no_grad():
            right = ((logits.argmax(-1) == written) & counts).sum() / counts.sum()
        return error, right

    def _written(self, batch: ImageBatch | MomentBatch) -> tuple[Tensor, Tensor]:
        """What is to be written (B,L), and which of it counts (B,L)."""
        if self.said.writes == "caption":
            ids, counts = self.text.tokens(list(batch.caption))
            return ids.to(self.device), counts.to(self.device)
        view = (batch.views or {})["marks"]
        assert isinstance(view, Tensor)
        found = view.flatten(1).long().to(self.device)
        return found, (found == self.end).cumsum(1) <= 1

    def _before(self, captions: Sequence[str], batch: ImageBatch | MomentBatch | None) -> Tensor:
        """The start, and what is read as tokens (B,1+P)."""
        parts = [torch.full((len(captions), 1), self.start, device=self.device)]
        if self.said.reads == "words":
            parts.append(self.text.tokens(captions)[0].to(self.device) + self.start + 1)
        if (codec := self._codec[0]) is not None and batch is not None:
            codes = batch.mean if isinstance(batch, MomentBatch) else codec.encode_codes(batch.image)
            parts.append(codes.flatten(1).long())
        return torch.cat(parts, 1)

    def _seen(self, captions: list[str], batch: ImageBatch | MomentBatch | None) -> tuple[Tensor, Tensor | None] | None:
        """States (B,S,C) that are attended to, and a pooled one (B,P); None: there are none."""
        if self.said.reads == "text":
            text = self.text.encode(captions)
            return text.tokens, text.pooled
        if (tower := self._tower[0]) is None or batch is None:
            return None
        assert isinstance(batch, ImageBatch)
        with torch.no_grad():
            last, embedding = tower.seen(batch.image)  # (B,C,h,w), (B,E)
            where = coordinates(last[:1]).expand(len(last), -1, -1, -1)
            return torch.cat([last, where], 1).flatten(2).transpose(1, 2), embedding

    def _told(self, seen: tuple[Tensor, Tensor | None] | None, many: int) -> Told:
        states, pooled = seen or (None, None)
        side = self.said.resolution
        numbers = torch.tensor([[side, side, 0, 0, AESTHETIC]], device=self.device).float()
        return self.network.told(states, pooled, numbers.expand(many, -1))

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text encoder reads, or than are written."""
        return None if self.reader is None else cut_captions(captions, lambda: self.text.tokenizer, self.text.room)

    preview_by_sample = True

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor | None:
        """Of a model of scenes one picture for each of the batch's captions."""
        if self.said.writes != "scene":
            return None
        captions = list(batch.caption)
        images = self.sample(captions, list(range(seed, seed + len(captions))))
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def save(self, folder: Path) -> None:
        """transformer/ and ldm.json, which remembers the autoencoder and the size."""
        codec, side = self._codec[0], self.said.resolution
        save_part(self.network.shape.to_diffusers(side), dict(self.network.state_dict()), folder / PART)
        own = {} if codec is None else {"autoencoder": codec.hash}
        write_json(folder / RECORD, {**own, "defaults": {"size": [side, side]}})

    # Writing

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px, and how it is sampled."""
        side = self.said.resolution
        return {"size": (side, side), **self.said.usual, "steps": self.length, "chunk": self.said.chunk}

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The numbers of a sampling call, the model's defaults where none are asked for."""
        return settings_of(self, wanted, {"steps": self.length, **self.said.usual}, True)

    def captions(self, image: Tensor | None, seeds: Sequence[int], settings: Wanted = OWN) -> list[str]:
        """A caption for each of pictures (N,3,R,R) in [-1,1] of `defaults["size"]`, or of nothing, one for each seed.

        No caption depends on the pictures beside its own.

        Raises:
            UserError: for settings that it has not, or where it writes no captions, or reads no pictures.
        """
        if self.said.writes != "caption":
            self.refuse("caption", "writes no captions, but scenes; draw these with ldm sample")
        if image is None and self.said.reads != "none":
            self.refuse("pictures", "reads pictures; name a folder or files")
        if image is not None and self.said.reads == "none":
            self.refuse("pictures", "reads none; say how many captions it is to write, by --count")
        chosen, found = self.settings(settings), []
        for rows in self._chunks(len(seeds)):
            batch = None if image is None else _batch(image[rows].to(self.device))
            ids = self._write([""] * len(rows), None, batch, chosen, Rng(0, [seeds[row] for row in rows]))
            lines = self.text.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            found += [BEFORE_A_MARK.sub("", " ".join(line.split())) for line in lines]
        return found[: len(seeds)]

    def bits(self, captions: Sequence[str]) -> list[float]:
        """Bits that each caption takes, its end included, of a model that reads nothing.

        Raises:
            UserError: for a model that reads something, or writes no captions.
        """
        if self.said.reads != "none" or self.said.writes != "caption":
            self.refuse("likelihood", "is no model of captions alone (reads: none, writes: caption)")
        found: list[float] = []
        with torch.no_grad():
            for rows in self._chunks(len(captions)):
                ids, counts = self.text.tokens([captions[row] for row in rows])
                told = self._told(None, len(rows))
                error, _ = self._error(self._before([""] * len(rows), None), told, ids.to(self.device), counts.to(self.device))
                found += (error.double().sum(1) / math.log(2)).tolist()
        return found[: len(captions)]

    def _draws_scenes(self) -> None:
        if self.said.writes != "scene":
            how = "say how many by ldm caption --count" if self.said.reads == "none" else "give it pictures, with ldm caption"
            self.refuse("sample", f"writes captions; {how}")

    def marks_of(
        self, prompts: Sequence[str | Prompt], seeds: Sequence[int], settings: Wanted = OWN, negative: str | Prompt = ""
    ) -> np.ndarray:
        """The marks (N,LENGTH) of a scene for each (prompt, seed), as `ldm.data.scenes.marks` has them."""
        self._draws_scenes()
        chosen, weighs = self.settings(settings), self.said.reads == "text"
        asked, avoided = [pieces_of(self, one, self.length, weighs) for one in prompts], pieces_of(self, negative, self.length, weighs)
        found = []
        for rows in self._chunks(len(prompts)):
            every = [asked[row] for row in rows] + ([avoided] * len(rows) if chosen.guidance != 1 else [])
            lines = ["".join(piece.text for piece in pieces) for pieces in every]
            found.append(self._write(lines, every, None, chosen, Rng(0, [seeds[row] for row in rows])))
        return torch.cat(found)[: len(prompts)].cpu().numpy() if found else np.zeros((0, marks.LENGTH), np.int64)

    def draw(self, call: SamplingCall) -> Tensor:
        """One picture for each (prompt, seed), uint8 (N,H,W,3), of the scene that is written, by the renderer of scenes.

        Raises:
            UserError: for a model of captions, settings that it has not, or a picture that is no square.
        """
        self._draws_scenes()
        height, width = call.size
        if height != width or height < 16:
            raise UserError(f"size: got {width}x{height}; scenes are drawn as squares of at least 16 px")
        found = self.marks_of(call.prompts, call.seeds, call.settings, call.negative)
        specs = marks.from_marks(found, np.array(call.seeds, np.int64))
        if call.on_step is not None:
            call.on_step(1, 1)
        return torch.from_numpy(to_bytes(render(specs, height)))

    @torch.no_grad()
    def _write(
        self, lines: list[str], asked: list[tuple[Piece, ...]] | None, batch: ImageBatch | None, chosen: Settings, rng: Rng
    ) -> Tensor:
        """Tokens (B,L) of a chunk of sequences; with guidance the second half of `lines` is what is avoided."""
        was_training = self.training
        self.eval()
        seen = self._seen(lines, batch)
        if self.said.reads == "text" and asked is not None:
            text = encode(self.text, asked)
            seen = (text.tokens, text.pooled)
        told, before, past = self.network.remember(self._told(seen, len(lines))), self._before(lines, batch), Past()
        many, twice = len(rng), len(lines) // len(rng)

        def guided(ids: Tensor, i: int) -> Tensor:
            latest = before if i == 0 else (ids + self.first)[:, None].repeat(twice, 1)
            logits = self.network.sequence(latest, told, past)[:, -1, self.first : self.first + self.kinds].float()
            if twice > 1:
                with_prompt, without = logits.chunk(2)
                logits = without + chosen.guidance_at(i, chosen.steps) * (with_prompt - without)
            if self.said.writes == "scene":
                logits = logits.masked_fill(~torch.from_numpy(marks.allowed(i)).to(logits.device), -math.inf)
            return logits

        blank = torch.zeros(many, self.length, dtype=torch.long, device=self.device)
        try:
            return causal(guided, blank, blank == 0, 0, chosen, rng, self.end)
        finally:
            self.train(was_training)

    def _chunks(self, many: int) -> list[list[int]]:
        """The numbers of sequences in calls of `chunk`, the last one padded, so that results do not depend on how many there are."""
        each = self.said.chunk
        return [[min(row, many - 1) for row in range(start, start + each)] for start in range(0, many, each)]


def _batch(image: Tensor) -> ImageBatch:
    """Pictures (N,3,R,R) without captions."""
    count = len(image)
    return ImageBatch(image=image, caption=("",) * count, size=torch.zeros(count, 6), position=torch.zeros(count, dtype=torch.int64))
