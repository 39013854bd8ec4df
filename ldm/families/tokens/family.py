"""Token models of pictures: the codes of a VQ autoencoder by one transformer, told a text (MaskGIT, MUSE; Parti)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, NonNegative, Positive, config, plain
from ldm.data.pictures import to_uint8
from ldm.diffusion.batch import ImageBatch, MomentBatch
from ldm.diffusion.rng import Rng
from ldm.families.draws import DIRECT, NUMBERS, OWN, Draws, Running, Settings, Wanted
from ldm.families.family import Context, Family, Footprint, ModelConfig, Product, Terms, TrainingStage
from ldm.families.tokens.drawing import Known, causal, first_step, masked
from ldm.families.tokens.folder import PART, assemble, codec_of
from ldm.formats.atomic import write_json
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder, load_codec
from ldm.formats.model_folder import RECORD, read_record
from ldm.formats.part import content_hash, load_module, load_weights, read_config, save_part
from ldm.models import cost
from ldm.models.autoencoder import VQConfig
from ldm.models.cost import IMAGES
from ldm.models.token_transformer import NUMBERS as SIZES
from ldm.models.token_transformer import Past, TokenShape, TokenTransformer, TokenTransformerConfig, Told
from ldm.text.encoder import TextEncoder
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.penultimate import PenultimateText
from ldm.text.prompt_syntax import Piece, Prompt, literal
from ldm.text.weighted import chunks_of, encode

AESTHETIC = 6.0  # the score that is told of every picture: what diffusers' AmusedPipeline tells where nothing is said
WORDS = 1 / 8  # share of the words in the loss of a sequence of words and codes (Ramesh 2021, arXiv 2102.12092)
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOSEN = ("steps", "guidance", "guidance_from", "guidance_to", "guidance_curve", "precision", "temperature", "top_k", "top_p")


@config
class TokenDefaults:
    """How the finished model is sampled unless it is told otherwise."""

    steps: Positive = 12  # of masked order; causal order takes one for each code
    guidance: NonNegative = 3.0  # classifier-free guidance scale, on logits; 1: none
    temperature: NonNegative = 1.0  # logits are divided by it; 0: the likeliest codes
    top_k: Count = 0  # so many likeliest codes are drawn from; 0: all
    top_p: Fraction = 1.0  # the likeliest codes of so much probability together are drawn from
    noise: NonNegative = (
        2.0  # of masked order: Gumbel noise on log confidences at the first step, falling to 0 (AmusedPipeline's temperature)
    )
    chunk: Positive = 8  # pictures per network call; a part of the model's numerics, so that batch size is not


@config
class Tokens(ModelConfig):
    """A transformer that draws the codes of a VQ autoencoder, told by the frozen text encoder what to draw."""

    kind: Literal["tokens"] = "tokens"
    text: str = "text"  # the text encoder, by its name in models
    autoencoder: str = "autoencoder"  # whose codes are drawn, by its name in models
    order: Literal["masked", "causal"] = "masked"  # several codes at a time, the surest first (MaskGIT), or one after another (Parti)
    reads: Literal["text", "words"] = "text"  # the text encoder's states, or the caption's words before the codes, in one sequence (DALL-E)
    network: TokenTransformerConfig = TokenTransformerConfig()
    caption_dropout: Fraction = 0.1  # share of captions replaced by the empty prompt, for guidance
    label_smoothing: Fraction = 0.1  # share of the target that is spread over all codes (MaskGIT, MUSE)
    defaults: TokenDefaults = TokenDefaults()  # how the finished model is sampled

    refuses: ClassVar[Mapping[str, str]] = {
        name: why for name, why in ModelConfig.refuses.items() if name not in ("latents", "caption_dropout", "tags", "prompts")
    }
    answers = frozenset({"sample", "reconstruct"})
    requires: ClassVar[Mapping[str, str]] = {"text": "encodes_text", "autoencoder": "has_codes"}
    reads_codes = True
    exports = True
    continues = True

    def inputs(self) -> dict[str, str]:
        """The text encoder and the autoencoder."""
        return {"text": self.text, "autoencoder": self.autoencoder}

    def for_stage(self, stage: TrainingStage) -> Tokens:
        """With what the stage says of caption dropout."""
        return self if stage.caption_dropout is None else replace(self, caption_dropout=stage.caption_dropout)

    def identity(self) -> dict[str, Any]:
        """All but names and defaults of sampling."""
        left_out = ("defaults", "text", "autoencoder")
        return {name: value for name, value in plain(self).items() if name not in left_out and (name, value) != ("reads", "text")}

    def shown(self) -> dict[str, Any]:
        """How the finished model is sampled."""
        return {"defaults": plain(self.defaults)}

    def check(self, stage: TrainingStage, where: str, begins: str) -> Iterator[str]:
        """What tells places apart: convolutions in masked order, positions of one resolution in causal order."""
        blocks, own = self.network.res_blocks, f"models.{stage.model}"
        if self.order == "causal" and blocks:
            yield f"{own}.network.res_blocks: got {blocks}; convolutions see what comes later, so causal order has none; leave it out"
        if self.order == "masked" and blocks == 0:
            yield f"{own}.network.res_blocks: 0 leaves masked order without anything that tells places apart; give 2 or more"
        if self.order == "masked" and self.reads == "words":
            yield f"{own}.reads: words stand before the codes, which is causal order; set {own}.order=causal"
        if self.order == "causal" and stage.also:
            yield f"{where}.also: causal order has positions for one resolution; leave it out"

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """The autoencoder's."""
        return others["autoencoder"].step_px({}) if "autoencoder" in others else 1

    def text_width(self) -> int:
        """It takes any."""
        return 0

    def shape(self, codes: int, places: int, states: int, pooled: int, words: tuple[int, int]) -> TokenShape:
        """The network that its autoencoder, its text encoder and its resolution make.

        Where it reads words, their numbers stand behind those of the codes and of the start.

        Args:
            words: how many a caption has, and how many there are.
        """
        if self.reads == "words":
            every = codes + 1 + words[1]
            return TokenShape.of(self.network, codes=every, vocabulary=every, context=0, pooled=0, positions=words[0] + places)
        positions = places if self.order == "causal" else 0
        return TokenShape.of(self.network, codes=codes, vocabulary=codes + 1, context=states, pooled=pooled, positions=positions)

    def counted_shape(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], side: int, width: int = 768) -> TokenShape:
        """The same, as a plan counts it."""
        text, codec = others["text"].text_shape(note, width), others["autoencoder"].latent_network(note)
        codes = codec.codes if isinstance(codec, VQConfig) else VQConfig().codes
        return self.shape(codes, (side // codec.factor) ** 2, text.states, text.pooled, (text.tokens, text.vocabulary))

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the transformer, but for the positions of causal order."""
        with torch.device("meta"):
            return cost.count(self.counted_shape(others, note, 0, width).build())

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """The transformer; text encoder and autoencoder are frozen."""
        text, codec, shape = (
            others["text"].text_shape(note),
            others["autoencoder"].latent_network(note),
            self.counted_shape(others, note, side),
        )
        small = side // codec.factor
        with torch.device("meta"):
            network, codes = shape.build(), torch.zeros(IMAGES, small, small, dtype=torch.long)
            states, pooled = torch.empty(IMAGES, text.tokens, text.states), torch.empty(IMAGES, text.pooled)
            numbers, stream = torch.zeros(IMAGES, SIZES), torch.zeros(IMAGES, shape.positions, dtype=torch.long)

            def call() -> Tensor:
                told = network.told(states if shape.context_width else None, pooled if shape.pooled_width else None, numbers)
                return network.sequence(stream, told) if shape.positions else network(codes, told)

            spent = cost.measure(network, call)
        known, encoding, _ = cost.autoencoder(codec, side, side)
        extra = text.cost.forward + (0 if stage.latents else encoding.forward)
        return Footprint(
            learned={PART: cost.count(network)}, frozen={"autoencoder": known, "text encoder": text.parameters}, cost=spent, extra=extra
        )

    def build(self, context: Context) -> TokensFamily:
        """The family, ready to train, on the earlier products; an earlier stage's network is continued."""
        text = PenultimateText.of_encoder(TextEncoder.load(context.products["text"].folder))
        codec = load_codec(autoencoder_folder(context.products["autoencoder"].folder))
        if not codec.codes:
            raise UserError(f"models.{self.autoencoder}: a {type(codec.network).__name__} has no codebook; tokens need a VQ autoencoder")
        words = text.max_tokens, len(text.tokenizer)
        shape = self.shape(codec.codes, (context.resolution // codec.factor) ** 2, text.width, text.pooled_width, words)
        network = shape.build() if context.init is None else _continued(context.init, shape, codec)
        return TokensFamily(self, network, codec, text, context.resolution)

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """A model folder, in masked order with a CLIP one that diffusers' AmusedPipeline opens."""
        folders = {role: product.folder for role, product in products.items()}
        assemble(folders, target, {"kind": self.kind, "config": plain(self), "story": dict(story)})

    def opened(self, folder: Path) -> TokensFamily:
        """The family with the weights of a model folder."""
        text = PenultimateText.of_encoder(TextEncoder.load(folder))
        network = _load(folder)
        size = read_record(folder).get("defaults", {}).get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**16 for side in size)):
            raise UserError(f"{folder / RECORD}: defaults.size: got {size!r}, not [height, width] in px; copy the whole folder again")
        family = TokensFamily(self, network, codec_of(folder), text, size[0])
        family.content_hash = content_hash(folder)
        return family


def _load(folder: Path) -> TokenTransformer:
    part = folder / PART
    shape = TokenShape.from_diffusers(read_config(part), str(part / "config.json"))
    return load_module(shape.build, load_weights(part), part)


def _continued(init: Product, shape: TokenShape, codec: LatentCodec) -> TokenTransformer:
    said = read_record(init.folder).get("autoencoder")
    if said != codec.hash:
        raise UserError(f"{init.folder}: these weights were trained on the codes of another autoencoder; train it anew or bring that one")
    network = _load(init.folder)
    if network.shape != shape:
        raise UserError(f"{init.folder}: the transformer to continue has another shape than network says; make them equal")
    return network


class TokensFamily(Family, Draws):
    """A token transformer with its autoencoder and text encoder: it learns by `loss` and draws by `sample`."""

    kind = "tokens"

    def __init__(self, config: Tokens, network: TokenTransformer, codec: LatentCodec, text: TextEncoder, resolution: int) -> None:
        super().__init__()
        self.config, self.network, self.text, self.resolution = config, network, text, resolution
        self._frozen = (codec, text.model)  # a tuple, so that they stay out of the module tree
        self.hidden = codec.codes  # the number that stands for a code that is not known, and before the first one

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        return self._frozen[0]

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return self.codec.factor

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px, and how it is sampled."""
        return {"size": (self.resolution, self.resolution), **plain(self.config.defaults), "steps": self.steps}

    @property
    def steps(self) -> int:
        """Network calls of a picture."""
        return (self.resolution // self.factor) ** 2 if self.config.order == "causal" else self.config.defaults.steps

    def frozen(self) -> list[nn.Module]:
        """The autoencoder and the text encoder."""
        return list(self._frozen)

    # Training

    def codes_of(self, batch: ImageBatch | MomentBatch) -> Tensor:
        """Numbers (B,h,w) of a batch's codes."""
        return batch.mean if isinstance(batch, MomentBatch) else self.codec.encode_codes(batch.image)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Cross-entropy of codes, those that are hidden in masked order, all of them in causal order.

        Masked: of u ~ U(0,1) the share cos(u pi/2) of a picture's codes, rounded up, is hidden (MaskGIT, section 3.1); the sum over hidden
        codes (eq. 2 there) is divided by the number of all codes. Words in the sequence have an eighth of the weight (DALL-E, section 2.2).
        """
        codes = self.codes_of(batch)  # (B,h,w)
        drop = rng.uniform("caption_dropout") < self.config.caption_dropout
        captions = ["" if one else caption for one, caption in zip(drop.tolist(), batch.caption, strict=True)]
        told, terms = self._told_captions(captions, batch), {}
        flat = codes.flatten(1)  # (B,L)
        if self.config.order == "causal":
            hidden = torch.ones_like(flat, dtype=torch.bool)
            start, said = self._start(captions)
            logits = _full(self.network.sequence(torch.cat([start, flat[:, :-1]], 1), told))
            if said.any():
                words = F.cross_entropy(
                    logits[:, : said.shape[1], self.hidden + 1 :].transpose(1, 2), start[:, 1:] - self.hidden - 1, reduction="none"
                )
                terms["words"] = WORDS * ((words * said).sum(1) / said.sum(1)).mean()
            logits = logits[:, said.shape[1] :, : self.hidden]
        else:
            length = flat.shape[1]
            share = (rng.uniform("mask_share") * math.pi / 2).cos()
            rank = rng.uniform("mask", (length,)).argsort(1).argsort(1)
            hidden = (rank < (share * length).ceil()[:, None]).to(flat.device)
            logits = _full(self.network(codes.masked_fill(hidden.view_as(codes), self.hidden), told))
        error = F.cross_entropy(logits.transpose(1, 2), flat, reduction="none", label_smoothing=self.config.label_smoothing)  # (B,L)
        with torch.no_grad():
            right = ((logits.argmax(-1) == flat) & hidden).sum() / hidden.sum()
        terms["codes"] = (1 - WORDS if self.config.reads == "words" else 1) * (error * hidden).mean()
        return terms, {"codes_right": right}

    def _start(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What stands before the codes (B,1+W): the start and, where it reads words, these; which of them are no padding (B,W)."""
        start = torch.full((len(captions), 1), self.hidden, device=self.device)
        if self.config.reads != "words":
            return start, torch.zeros(len(captions), 0, dtype=torch.bool, device=self.device)
        words, said = self.text.tokens(captions)
        return torch.cat([start, words.to(self.device) + self.hidden + 1], 1), said.to(self.device)

    def _told_captions(self, captions: list[str], batch: ImageBatch | MomentBatch) -> Told:
        text = self.text.encode(captions) if self.config.reads == "text" else None
        size = batch.size.to(self.device, torch.float32)
        # The size that it comes out in, as is told when drawing: what it was cut out of says nothing of a picture that is drawn.
        numbers = torch.stack([size[:, 5], size[:, 4], *(torch.full_like(size[:, 0], value) for value in (0, 0, AESTHETIC))], 1)
        return self.network.told(None if text is None else text.tokens, None if text is None else text.pooled, numbers)

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text encoder reads."""
        return cut_captions(captions, lambda: self.text.tokenizer, self.text.room)

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """One picture for each of the batch's captions, with the default settings."""
        captions = list(batch.caption)
        images = self.sample(captions, list(range(seed, seed + len(captions))))
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def save(self, folder: Path) -> None:
        """transformer/ under diffusers' names and ldm.json, which remembers the autoencoder and the size."""
        side = self.resolution // self.factor
        save_part(self.network.shape.to_diffusers(side), dict(self.network.state_dict()), folder / PART)
        write_json(folder / RECORD, {"autoencoder": self.codec.hash, "defaults": {"size": [self.resolution, self.resolution]}})

    # Sampling

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1]."""
        return self.codec.reconstruct(image)

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The numbers of a sampling call, the model's defaults where none are asked for."""
        for name in NUMBERS:
            value = getattr(wanted, name)
            if name not in CHOSEN and value not in (None, "", getattr(DIRECT, name)):
                self.refuse(f"{name}: got {value!r}", "draws codes and has no such setting; leave it out")
        own = {name: value for name in CHOSEN if (value := getattr(wanted, name)) not in (None, "")}
        usual = {name: getattr(self.config.defaults, name) for name in ("guidance", "temperature", "top_k", "top_p")}
        chosen = replace(DIRECT, **{"steps": self.steps, **usual, **own}).checked()
        if self.config.order == "causal" and chosen.steps != self.steps:
            self.refuse(f"steps: got {chosen.steps}", f"draws one code after another, {self.steps} of them; leave it out")
        return chosen

    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Known, ...]:
        """Inpainting and image-to-image: codes are drawn where `mask` shows a pixel of theirs, or a random part of them; others stay."""
        strength = (0.75 if mask is None else 1.0) if strength is None else strength
        if not 0 <= strength <= 1:
            raise UserError(f"strength: got {strength}; a number from 0 (the picture as it is) to 1 (all new) is needed")
        values = image.permute(0, 3, 1, 2).to(next(self.codec.network.parameters())) / 127.5 - 1
        codes = torch.cat([self.codec.encode_codes(one[None]) for one in values])
        new = torch.ones_like(codes, dtype=torch.bool)
        if mask is not None:
            new = F.max_pool2d(mask[:, None].float(), self.factor)[:, 0].bool().to(codes.device)
        return (Known(codes, new, float(strength), image, mask),)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int] | None = None,
        settings: Wanted = OWN,
        *,
        size: tuple[int, int] | None = None,
        negative: str | Prompt = "",
        latents: Tensor | None = None,
        edits: Sequence[Any] = (),
        on_step: Callable[[int, int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Tensor:
        """One picture for each (prompt, seed), uint8 (N,H,W,3); arguments as `Draws.sample` has them.

        The networks always see `defaults["chunk"]` pictures, padded where fewer are asked for, so that no picture depends on the others.

        Raises:
            UserError: on settings that it has not, or a size that is no multiple of `factor`.
        """
        height, width = size or self.defaults["size"]
        if height % self.factor or width % self.factor or min(height, width) < self.factor:
            raise UserError(f"size: got {width}x{height}; both must be multiples of {self.factor}")
        chosen, chunk, seeds = self.settings(settings), self.config.defaults.chunk, range(len(prompts)) if seeds is None else seeds
        asked, avoided = [self._pieces(prompt, chosen.steps) for prompt in prompts], self._pieces(negative, chosen.steps)
        known: Known | None = edits[-1] if edits else None  # a second pass of hires takes the first one's place
        places = (height // self.factor, width // self.factor)
        if self.config.order == "causal" and places[0] * places[1] != self.steps:
            raise UserError(f"size: got {width}x{height}; causal order has positions for {self.resolution}x{self.resolution} alone")
        if known is not None and known.codes.shape[1:] != places:
            raise UserError(f"init: has {tuple(known.codes.shape[1:])} codes, but {places} are drawn; make the picture as large as size")
        image = torch.empty(len(prompts), height, width, 3, dtype=torch.uint8)
        was_training = self.network.training
        self.network.eval()
        starts, kind = range(0, len(prompts), chunk), PRECISION[chosen.precision]
        try:
            for number, start in enumerate(starts):
                rows = list(range(start, min(start + chunk, len(prompts))))
                padded = (*rows, *[rows[-1]] * (chunk - len(rows)))
                rng = Rng(0, [seeds[row] for row in padded])
                report = _offset(on_step, number * chosen.steps, len(starts) * chosen.steps)
                with torch.autocast(self.device.type, kind, enabled=kind != torch.float32):
                    told, before = self._told([asked[row] for row in padded], avoided, chosen, (height, width))
                    blank = torch.full((chunk, places[0] * places[1]), self.hidden, device=self.device)
                    codes, new = (blank, blank == self.hidden) if known is None else known.rows(padded, rng)
                    first = first_step(chosen, known)
                    codes = self._draw(told, before, codes.unflatten(1, places), new, chosen, first, rng, report)
                    made = to_uint8(self.codec.decode_codes(codes.unflatten(1, places)))
                image[rows] = (made if known is None else known.paste(made, padded))[: len(rows)]
        finally:
            self.network.train(was_training)
        return image

    def _pieces(self, prompt: str | Prompt, steps: int) -> tuple[Piece, ...]:
        """The weighted words of a prompt."""
        read = literal(prompt) if isinstance(prompt, str) else prompt
        if read.end is not None or len(read.parts) > 1 or len({read.at(i, steps) for i in range(steps)}) > 1:
            self.refuse("prompt", "reads neither AND nor words that change while it draws; write plain words, or give --literal")
        pieces = read.parts[0].at(0, steps)
        if self.config.reads == "words" and any(piece.weight != 1 for piece in pieces):
            self.refuse("prompt", "reads words, which have no weights; write plain words, or give --literal")
        return pieces

    def _told(
        self, prompts: list[tuple[Piece, ...]], negative: tuple[Piece, ...], chosen: Settings, size: tuple[int, int]
    ) -> tuple[Told, Tensor]:
        """What the network is told of a chunk of pictures, and what stands before their codes; with guidance also without their prompts."""
        every = prompts + [negative] * len(prompts) if chosen.guidance != 1 else prompts
        numbers = torch.tensor([[size[1], size[0], 0, 0, AESTHETIC]]).expand(len(every), SIZES).to(self.device)
        before, _ = self._start(["".join(piece.text for piece in pieces) for pieces in every])
        if self.config.reads == "words":
            return self.network.remember(self.network.told(None, None, numbers)), before
        text = encode(self.text, every)
        return self.network.remember(self.network.told(text.tokens, text.pooled, numbers)), before

    def _draw(
        self, told: Told, before: Tensor, codes: Tensor, new: Tensor, chosen: Settings, first: int, rng: Rng, report: Callable[[int], None]
    ) -> Tensor:
        """Codes (B,L) of a chunk of pictures, of which `codes` (B,h,w) are known where `new` (B,L) does not say otherwise."""
        past, twice, places = Past(), 1 + (chosen.guidance != 1), codes.shape[1:]

        def guided(ids: Tensor, i: int) -> Tensor:
            if self.config.order == "causal":
                latest = before if i == 0 else ids[:, None].repeat(twice, 1)
                logits = self.network.sequence(latest, told, past)[:, -1, : self.hidden]
            else:
                logits = self.network(ids.unflatten(1, places).repeat(twice, 1, 1), told)
            report(i + 1)
            if twice == 1:
                return logits
            with_prompt, without = logits.chunk(2)
            return without + chosen.guidance_at(i, chosen.steps) * (with_prompt - without)

        if self.config.order == "causal":
            return causal(guided, codes.flatten(1), new, self.hidden, chosen, rng)
        return masked(guided, codes.flatten(1), new, self.hidden, chosen, self.config.defaults.noise, first, rng)

    def overlong(self, prompt: Prompt) -> str:
        """How a prompt is read that is longer than the text encoder reads at once; empty: it is not."""
        longer = any(len(chunks_of(self.text, pieces)) > 1 for pieces in prompt.at(0, 1))
        return f"is longer than the model's {self.text.max_tokens} tokens; the rest is left out" if longer else ""

    def says(self, prompt: str, word: str) -> bool:
        """Whether a prompt has a learned word in it, as the text encoder reads it."""
        return self.text.says(prompt, word)

    def tokens(self, prompt: Prompt) -> tuple[int, int]:
        """Of the words, without the special tokens."""
        return max(sum(len(chunk.ids) for chunk in chunks_of(self.text, pieces)) for pieces in prompt.at(0, 1)), self.text.room

    def unknown(self, prompt: str) -> list[str]:
        """The words of a prompt that a tokenizer of the run's own captions has never met."""
        return self.text.unknown(prompt)

    def ready(self, folder: Path, running: Running, precision: str) -> None:
        """Decode large pictures in stripes as `running` says."""
        super().ready(folder, running, precision)
        self.codec.tile = running.tile


def _full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _offset(on_step: Callable[[int, int], None] | None, done: int, total: int) -> Callable[[int], None]:
    return (lambda step: None) if on_step is None else (lambda step: on_step(done + step, total))
