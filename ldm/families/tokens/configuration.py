"""Configuration of token models: their fields, what cannot be had together, and what a training of one costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, NonNegative, Positive, config, plain
from ldm.data.scenes import marks
from ldm.families.draws import AFTER, SMALL
from ldm.families.family import Footprint, ModelConfig, TrainingStage
from ldm.families.tokens.folder import PART
from ldm.formats.latent_codec import Codec
from ldm.models import cost
from ldm.models.autoencoder import VQConfig
from ldm.models.cost import IMAGES
from ldm.models.embeddings import COORDINATES
from ldm.models.palette import PaletteConfig
from ldm.models.token_transformer import NUMBERS as SIZES
from ldm.models.token_transformer import TokenShape, TokenTransformerConfig


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


TAKES = {
    "codes": ("text", "words", "none"),
    "caption": ("image", "codes", "none"),
    "scene": ("text", "words"),
}  # by what is written: what is read
ANSWERS = {"codes": ("sample", "reconstruct", "complete"), "caption": ("caption",), "scene": ("sample", "scene")}


@config
class TokensConfig(ModelConfig):
    """What a token model reads and writes, and what its stages may ask of it."""

    kind: Literal["tokens"] = "tokens"
    text: str = "text"  # the text encoder, by its name in models
    autoencoder: str = "autoencoder"  # whose codes are drawn, by its name in models
    order: Literal["masked", "causal"] = "masked"  # several codes at a time, the surest first (MaskGIT), or one after another (Parti)
    # The text encoder's states; the caption's words before what is written, in one sequence (DALL-E); the last map of the CLIP's image
    # tower; a picture's codes, in one sequence; or nothing.
    reads: Literal["text", "words", "image", "codes", "none"] = "text"
    writes: Literal["codes", "caption", "scene"] = "codes"  # of a picture; its caption; or the marks of a scene, which are drawn
    after: str = ""  # a chain: the model, by its name in models, whose picture this one makes larger (MUSE); empty: none
    enlarges: Count = 0  # so many times, a picture whose codes it is told beside the text, its view small:N; 0: it is told none
    small: str = ""  # the VQ autoencoder of these codes, by its name in models; empty: that whose codes are drawn
    network: TokenTransformerConfig = TokenTransformerConfig()
    caption_dropout: Fraction = 0.1  # share of captions replaced by the empty prompt, for guidance
    label_smoothing: Fraction = 0.1  # share of the target that is spread over all codes (MaskGIT, MUSE)
    defaults: TokenDefaults = TokenDefaults()  # how the finished model is sampled

    refuses: ClassVar[Mapping[str, str]] = {
        name: why for name, why in ModelConfig.refuses.items() if name not in ("latents", "caption_dropout", "tags", "prompts")
    }
    exports = True
    continues = True

    def __post_init__(self) -> None:
        if self.reads not in TAKES[self.writes]:
            raise UserError(f"reads: got {self.reads}; what writes {self.writes} reads {' or '.join(TAKES[self.writes])}")
        if self.order == "masked" and (self.writes != "codes" or self.reads not in ("text", "image")):
            what = f"what reads {self.reads} writes one code" if self.writes == "codes" else f"a {self.writes} is written one token"
            raise UserError(f"order: {what} after another, which is causal order; set order: causal")
        if self.enlarges == 1:
            raise UserError("enlarges: got 1, which is no larger; take 2 or more")
        if self.enlarges and (self.order, self.reads, self.writes) != ("masked", "text", "codes"):
            told = (("order", self.order, "masked"), ("reads", self.reads, "text"), ("writes", self.writes, "codes"))
            name, got, right = next(one for one in told if one[1] != one[2])
            raise UserError(f"{name}: got {got}; what is told smaller codes (enlarges) takes {right}; set {name}: {right}")
        if not self.enlarges and (unread := self.after or self.small):
            raise UserError(f"{'after' if self.after else 'small'}: got {unread}, whose picture is not read; set enlarges, such as 2")

    @property
    def answers(self) -> frozenset[str]:
        """Pictures; or captions, of captions alone their likelihood; or scenes."""
        if self.enlarges:
            return frozenset({"sample"})
        return frozenset({*ANSWERS[self.writes], *(("likelihood",) if (self.reads, self.writes) == ("none", "caption") else ())})

    @property
    def reads_codes(self) -> bool:
        """Where an autoencoder's codes are read or written."""
        return "codes" in (self.reads, self.writes)

    @property
    def requires(self) -> Mapping[str, str]:
        """A text encoder, or a CLIP whose image tower is read; and VQ autoencoders."""
        return {"text": "has_tower" if self.reads == "image" else "encodes_text", "autoencoder": "has_codes", SMALL: "has_codes"}

    def views(self) -> tuple[str, ...]:
        """Of scenes their marks; the smaller picture, if it is told one."""
        return ("marks",) if self.writes == "scene" else (f"{SMALL}:{self.enlarges}",) if self.enlarges else ()

    def usage(self, prompt: str, model: str) -> str:
        """Of what writes captions, how to have them written."""
        if self.writes != "caption":
            return ModelConfig.usage(self, prompt if self.reads_prompts else "", model)
        return f"python -m ldm caption {'--count 8' if self.reads == 'none' else 'FOLDER --dry-run'} --model {model}"

    def inputs(self) -> dict[str, str]:
        """The text encoder where words are read or written, the autoencoder where codes are, and that of a smaller picture's."""
        worded = self.reads in ("text", "words", "image") or self.writes == "caption"
        found = ({"text": self.text} if worded else {}) | ({"autoencoder": self.autoencoder} if self.reads_codes else {})
        return found | ({SMALL: self.small or self.autoencoder} if self.enlarges else {})

    def assembled_from(self) -> dict[str, str]:
        """Its inputs, and the model before it in a chain."""
        return self.inputs() | ({AFTER: self.after} if self.after else {})

    def for_stage(self, stage: TrainingStage) -> Self:
        """With what the stage says of caption dropout."""
        return self if stage.caption_dropout is None else replace(self, caption_dropout=stage.caption_dropout)

    def identity(self) -> dict[str, Any]:
        """All but names and defaults of sampling."""
        left_out, usual = ("defaults", "text", "autoencoder", "after", "small"), (("reads", "text"), ("writes", "codes"), ("enlarges", 0))
        return {name: value for name, value in plain(self).items() if name not in left_out and (name, value) not in usual}

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
        if stage.latents and not self.reads_codes:
            yield f"{where}.latents: what reads {self.reads} and writes {self.writes} knows no codes; leave it out"
        if self.writes == "caption" and stage.caption_dropout is not None:
            yield f"{where}.caption_dropout: captions are written here, and none is left out; leave it out"
        if self.order == "causal" and stage.also:
            yield f"{where}.also: causal order has positions for one resolution; leave it out"

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """The autoencoder's, and that of the smaller picture, as much larger."""
        own = others["autoencoder"].step_px({}) if "autoencoder" in others else 1
        if SMALL not in others:
            return own
        small = others[SMALL].step_px({})
        self.spread(own, small)  # told before any work
        return math.lcm(own, self.enlarges * small)

    def spread(self, factor: int, small: int) -> int:
        """Places of a side over one of the smaller picture's codes, of the downsampling factors of both autoencoders.

        Raises:
            UserError: where they do not lie over whole codes.
        """
        if self.enlarges * small % factor:
            told = f"a code of the smaller picture stands for {self.enlarges * small} px, one that is drawn for {factor}"
            raise UserError(f"tokens: enlarges: got {self.enlarges}; {told}, which does not divide that; take another N or autoencoder")
        return self.enlarges * small // factor

    @property
    def reads_prompts(self) -> bool:
        """Whether words change what it writes."""
        return self.reads in ("text", "words")

    @property
    def usual(self) -> dict[str, Any]:
        """How the finished model is sampled, but for its steps; without prompts there is no guidance."""
        found = {name: getattr(self.defaults, name) for name in ("guidance", "temperature", "top_k", "top_p")}
        return found if self.reads_prompts else {**found, "guidance": 1.0}

    def text_width(self) -> int:
        """It takes any."""
        return 0

    def shape(
        self, codes: int, places: int, states: int, pooled: int, words: tuple[int, int], small: tuple[int, int] = (0, 1)
    ) -> TokenShape:
        """The network that its autoencoder, its text encoder and its resolution make.

        Where it reads words, their numbers stand behind those of the codes and of the start.

        Args:
            words: how many a caption has, and how many there are.
            small: how many codes a smaller picture's have, and the places of a side over one of them.
        """
        spoken = self.reads == "words" or self.writes == "caption"
        if self.reads not in ("text", "image"):
            states, pooled = 0, 0
        symbols = marks.MARKS if self.writes == "scene" else codes if self.reads_codes else 0
        every = symbols + 1 + (words[1] if spoken else 0)
        positions = (words[0] if spoken else 0) + (marks.LENGTH if self.writes == "scene" else places if self.reads_codes else 0)
        if self.order == "masked":
            positions = 0
        written = every if spoken else symbols
        return TokenShape.of(self.network, codes=written, vocabulary=every, context=states, pooled=pooled, positions=positions, small=small)

    def counted_shape(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], side: int, width: int = 768) -> TokenShape:
        """The same, as a plan counts it."""
        codes, places, states, pooled, words, small = 0, 0, 0, 0, (0, 0), (0, 1)
        if "autoencoder" in others:
            codec = others["autoencoder"].latent_network(note)
            codes, places = codes_in(codec), (side // codec.factor) ** 2
        if SMALL in others:
            told = others[SMALL].latent_network(note)
            small = codes_in(told), self.spread(codec.factor, told.factor)
        if "text" in others:
            text = others["text"].text_shape(note, width)
            states, pooled, words = text.states, text.pooled, (text.tokens, text.vocabulary)
        if self.reads == "image":
            tower = others["text"].image_tower(side, note)
            states, pooled = tower.width + COORDINATES, tower.embedding
        return self.shape(codes, places, states, pooled, words, small)

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the transformer, but for the positions of causal order."""
        with torch.device("meta"):
            return cost.count(self.counted_shape(others, note, 0, width).build())

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """The transformer; text encoder, image tower and autoencoder are frozen."""
        shape, small, seen, extra, frozen = self.counted_shape(others, note, side), 1, 0, 0, {}
        if "autoencoder" in others:
            codec = others["autoencoder"].latent_network(note)
            frozen["autoencoder"], encoding, _ = cost.autoencoder(codec, side, side)
            small, extra = side // codec.factor, 0 if stage.latents else encoding.forward
        below = side // self.enlarges if self.enlarges else 0  # px of the smaller picture, whose codes are read at every step
        if SMALL in others:
            told_codec = others[SMALL].latent_network(note)
            frozen["small autoencoder"], encoding, _ = cost.autoencoder(told_codec, below, below)
            extra, below = extra + encoding.forward, below // told_codec.factor
        if "text" in others and self.reads != "image":
            text = others["text"].text_shape(note)
            frozen["text encoder"], seen = text.parameters, text.tokens
            extra += text.cost.forward if shape.context_width else 0
        elif self.reads == "image":
            said = others["text"].image_tower(side, note)
            with torch.device("meta"):
                tower = said.build()
            frozen["image tower"], seen = cost.count(tower), said.places(side)
            extra += cost.tower(tower, side).forward
        with torch.device("meta"):
            network, codes = shape.build(), torch.zeros(IMAGES, small, small, dtype=torch.long)
            states, pooled = torch.empty(IMAGES, seen, shape.context_width), torch.empty(IMAGES, shape.pooled_width)
            numbers, stream = torch.zeros(IMAGES, SIZES), torch.zeros(IMAGES, shape.positions, dtype=torch.long)

            def call() -> Tensor:
                smaller = torch.zeros(IMAGES, below, below, dtype=torch.long) if shape.small_codes else None
                told = network.told(states if shape.context_width else None, pooled if shape.pooled_width else None, numbers, smaller)
                return network.sequence(stream, told) if shape.positions else network(codes, told)

            spent = cost.measure(network, call)
        return Footprint(learned={PART: cost.count(network)}, frozen=frozen, cost=spent, extra=extra)


def codes_in(codec: Codec) -> int:
    """Entries of an autoencoder's codebook, as far as is known."""
    return codec.codes if isinstance(codec, VQConfig | PaletteConfig) else VQConfig().codes
