"""Drawing in one pass: what generators of a text have in common, from noise and words to pictures, and their model folder."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import plain
from ldm.config.version import __version__
from ldm.data.pictures import finished
from ldm.diffusion.batch import ImageBatch, MomentBatch, Text, cat, rows, sent
from ldm.diffusion.rng import Rng
from ldm.families.chain import within
from ldm.families.draws import AFTER, BEFORE, DIRECT, NUMBERS, OWN, Running, SamplingCall, Settings, Wanted
from ldm.families.family import Family, ModelConfig, Product
from ldm.families.game import full
from ldm.families.prompted import Prompted
from ldm.families.translator import words_of
from ldm.formats import atomic
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder
from ldm.formats.model_folder import OWN_CLIP, RECORD, own_clip, read_record
from ldm.formats.text_folder import TEXT_PARTS
from ldm.text.encoder import TextEncoder
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.prompt_syntax import Piece, Prompt, literal
from ldm.text.weighted import encode

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOSEN = ("truncation", "precision")


class OnePass(Family, Prompted):
    """A generator of text and noise, block by block, with its frozen autoencoder and text encoder."""

    weighs: bool = True  # whether words have weights

    def __init__(self, codec: LatentCodec, text: TextEncoder, resolution: int, truncation: float, chunk: int) -> None:
        super().__init__()
        self.reader, self.resolution, self.truncation, self.chunk = text, resolution, truncation, chunk
        self._frozen: tuple[nn.Module, ...] = (codec, text.model)  # a tuple, so that they stay out of the module tree

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        codec = self._frozen[0]
        assert isinstance(codec, LatentCodec)
        return codec

    def frozen(self) -> list[nn.Module]:
        """The autoencoder and the text encoder."""
        return list(self._frozen)

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px, and how it is sampled."""
        return {"size": (self.resolution, self.resolution), "truncation": self.truncation, "chunk": self.chunk}

    @property
    @abstractmethod
    def told_blocks(self) -> int:
        """How many blocks are told a text, each of which may be another."""

    @abstractmethod
    def made(self, noise: Tensor, texts: Sequence[Text], shown: Tensor | None, truncation: float) -> Tensor:
        """Latents (B,C,h,w) of noise, a text for each block, and what `shown` gave."""

    def shown(self, edits: Sequence[Any], places: Sequence[int], seeds: Sequence[int]) -> Tensor | None:
        """What pictures are made of beside noise and words; None: nothing.

        Args:
            places: of the pictures of a chunk in the whole call.
            seeds: theirs.
        """
        return None

    # Training

    def truth(self, batch: ImageBatch | MomentBatch, rng: Rng) -> Tensor:
        """True latents (B,C,h,w) of a batch."""
        with torch.no_grad():
            mean, std = (batch.mean, batch.std) if isinstance(batch, MomentBatch) else self.codec.moments(batch.image)
            return full(mean) if std is None else full(mean) + full(std) * sent(rng.normal("posterior", mean.shape[1:]), mean.device)

    def words(self, batch: ImageBatch | MomentBatch) -> Text:
        """A batch's captions with their sentences, as cached or encoded now."""
        kept = batch.text if isinstance(batch, MomentBatch) else None
        return with_sentence(self.text.encode(list(batch.caption)) if kept is None else kept)

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text encoder reads."""
        return cut_captions(captions, lambda: self.text.tokenizer, self.text.room)

    preview_by_sample = True

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """One picture for each of the batch's captions, with the default settings."""
        captions = list(batch.caption)
        edits = self.tell(batch.views, {}, (self.resolution, self.resolution)) if batch.views else ()
        images = self.sample(captions, list(range(seed, seed + len(captions))), edits=edits)
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def remembered(self) -> dict[str, Any]:
        """ldm.json of a product: the autoencoder and the size."""
        return {"autoencoder": self.codec.hash, "defaults": {"size": [self.resolution, self.resolution]}}

    # Sampling

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """Truncation and precision, the model's own where none is asked for."""
        for name in NUMBERS:
            value = getattr(wanted, name)
            if name not in CHOSEN and value not in (None, "", getattr(DIRECT, name)):
                self.refuse(f"{name}: got {value!r}", "draws at once and has no such setting; leave it out")
        own = {name: value for name in CHOSEN if (value := getattr(wanted, name)) not in (None, "")}
        return replace(DIRECT, **{"truncation": self.truncation, **own}).checked()

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1]."""
        return self.codec.reconstruct(image)

    @torch.no_grad()
    def draw(self, call: SamplingCall) -> Tensor:
        """One picture for each (prompt, seed), uint8 (N,H,W,3).

        The networks always see `defaults["chunk"]` pictures, padded where fewer are asked for, so that no picture depends on the others.

        Raises:
            UserError: on settings that it has not, or another size than it learned to draw.
        """
        chosen, chunk, own = self.settings(call.settings), self.chunk, (self.resolution, self.resolution)
        if tuple(call.size) != own:
            self.refuse(f"size: got {call.size[1]}x{call.size[0]}", f"draws {own[1]}x{own[0]} alone; leave it out")
        if words_of(call.negative).strip():
            self.refuse("negative", "reads no negative prompt; leave it out")
        texts, many = self._texts([literal(prompt) if isinstance(prompt, str) else prompt for prompt in call.prompts]), len(call.prompts)
        noise = self.noise(call.seeds, own) if call.latents is None else call.latents
        image = torch.empty(many, *own, 3, dtype=torch.uint8)
        was_training, kind = self.training, PRECISION[chosen.precision]
        self.eval()
        try:
            for start in range(0, many, chunk):
                own_rows = list(range(start, min(start + chunk, many)))
                padded = (*own_rows, *[own_rows[-1]] * (chunk - len(own_rows)))
                with torch.autocast(self.device.type, kind, enabled=kind != torch.float32):
                    told = [cat([texts[row][block] for row in padded]) for block in range(self.told_blocks)]
                    shown = self.shown(call.edits, padded, [call.seeds[row] for row in padded])
                    made = self.made(noise[list(padded)].to(self.device), told, shown, chosen.truncation)
                    image[own_rows] = finished(self.codec.decode(full(made)))[: len(own_rows)].cpu()
                if call.on_step is not None:
                    call.on_step(own_rows[-1] + 1, many)
        finally:
            self.train(was_training)
        return image

    def _texts(self, prompts: Sequence[Prompt]) -> list[list[Text]]:
        """What each block is told of each prompt (1,...): words that change by step elsewhere change by block here (prompt mixing)."""
        many = self.told_blocks
        pieces = [[self._pieces(prompt, i) for i in range(many)] for prompt in prompts]
        each = list(dict.fromkeys(block for one in pieces for block in one))
        text = with_sentence(encode(self.text, each))
        known = {block: rows(text, i, i + 1) for i, block in enumerate(each)}
        found = [[known[block] for block in one] for one in pieces]
        ends = {i: prompt.end for i, prompt in enumerate(prompts) if prompt.end is not None}
        for i, others in zip(ends, self._texts(list(ends.values())), strict=True) if ends else ():
            found[i] = [lerped(text, other, prompts[i].share) for text, other in zip(found[i], others, strict=True)]
        return found

    def _pieces(self, prompt: Prompt, block: int) -> tuple[Piece, ...]:
        """The weighted words that a block is told."""
        if len(prompt.parts) > 1:
            self.refuse("prompt", "composes no prompts by AND; write one, or give --literal")
        found = prompt.parts[0].at(block, self.told_blocks)
        if not self.weighs and any(piece.weight != 1 for piece in found):
            self.refuse("prompt", "reads sentences, whose words have no weights; write plain words, or give --literal")
        return found

    def ready(self, folder: Path, running: Running, precision: str) -> None:
        """Decode large pictures in stripes as `running` says."""
        super().ready(folder, running, precision)
        self.codec.tile = running.tile


def with_sentence(text: Text) -> Text:
    """A text whose pooled state is the mean of its words where the encoder gives none."""
    if text.pooled is not None:
        return text
    said = text.mask[..., None].to(text.tokens)
    return replace(text, pooled=(text.tokens * said).sum(1) / said.sum(1).clamp_min(1))


def lerped(text: Text, other: Text, share: float) -> Text:
    """What lies on the straight way from one text to another."""
    return replace(text, tokens=text.tokens.lerp(other.tokens, share), pooled=pooled_of(text).lerp(pooled_of(other), share))


def pooled_of(text: Text) -> Tensor:
    assert text.pooled is not None, "with_sentence gives it"
    return text.pooled


def size_of(folder: Path) -> int:
    """px, height and width of the pictures that a model folder draws.

    Raises:
        UserError: where its ldm.json does not say.
    """
    size = read_record(folder).get("defaults", {}).get("size")
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**16 for side in size)):
        raise UserError(f"{folder / RECORD}: defaults.size: got {size!r}, not [height, width] in px; copy the whole folder again")
    return size[0]


def known_latents(init: Product, codec: LatentCodec) -> None:
    """Refuse weights that learned in the latents of another autoencoder.

    Raises:
        UserError: naming the folder.
    """
    if read_record(init.folder).get("autoencoder") != codec.hash:
        raise UserError(f"{init.folder}: learned in the latents of another autoencoder; train it anew or bring that one")


def assemble(config: ModelConfig, products: Mapping[str, Product], target: Path, story: Mapping[str, Any], card: tuple[str, str]) -> None:
    """A model folder: the networks, the text encoder, the autoencoder, ldm.json and a card; in `before`, the model before in a chain.

    Args:
        card: the tag of the kind, and the first sentence of its card up to what it was trained on.
    """

    def write(folder: Path) -> None:
        shutil.copytree(products["model"].folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(atomic.MANIFEST))
        text, autoencoder = products["text"].folder, autoencoder_folder(products["autoencoder"].folder)
        for name in TEXT_PARTS:
            if (text / name).is_dir():
                shutil.copytree(text / name, folder / name)
        if clip := own_clip(text):
            shutil.copytree(clip, folder / OWN_CLIP)
        shutil.copytree(autoencoder, folder / ("vqvae" if autoencoder.name == "vqvae" else "vae"))
        said = {"kind": config.kind, "config": plain(config), "story": dict(story), "ldm_version": __version__}
        atomic.write_json(folder / RECORD, {**read_record(products["model"].folder), **said})
        (folder / "README.md").write_text(_card(story, *card), encoding="utf-8")
        if AFTER in products and (before := products[AFTER].config) is not None:
            before.assemble(within(products), folder / BEFORE, story)

    atomic.commit(target, write)


def _card(story: Mapping[str, Any], tag: str, what: str) -> str:
    """README.md, as the Hugging Face Hub reads it."""
    stages = "\n".join(f"| {name} | {text} |" for name, text in story.get("stages", {}).items())
    return f"""---
library_name: ldm
pipeline_tag: text-to-image
tags: [ldm, text-to-image, {tag}]
---

# {story.get("name", "A text-to-image model")}

{what} with `ldm` on {story.get("data", "its user's data")}.

## Use

With ldm: `python sample.py "{story.get("prompt", "a picture")}" --model MODEL`. No other program opens it.

## How it was made

| Stage | |
|---|---|
{stages}

## Limits

It knows what its training captions showed and nothing else. It has no safety filter. Its licence is the choice of whoever
trained it, within the rights to the training data.
"""
