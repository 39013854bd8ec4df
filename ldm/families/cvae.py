"""Conditional VAE: a picture of a text and of a few Gaussian numbers, drawn at once (Sohn 2015; Kingma 2013, arXiv 1312.6114)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.config.schema import Count, Fraction, NonNegative, Positive, PositiveFloat, config, plain
from ldm.diffusion.batch import ImageBatch, MomentBatch, Text, sent
from ldm.diffusion.rng import Rng
from ldm.families.family import Context, Footprint, ModelConfig, ParameterGroup, Product, Terms, TrainingStage
from ldm.families.game import full
from ldm.families.one_pass import OnePass, assemble, known_latents, pooled_of, size_of
from ldm.formats import atomic
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder, load_codec
from ldm.formats.model_folder import RECORD
from ldm.formats.part import content_hash, load_module, load_weights, save_part
from ldm.models import cost
from ldm.models.cost import IMAGES
from ldm.models.variational import DecoderConfig, PosteriorConfig
from ldm.text.encoder import TextEncoder

ACTIVE = 0.01  # variance over pictures of a unit's posterior mean from which on it counts (Burda 2015, arXiv 1509.00519, section 5.2)
PICTURES = 1000  # held-out ones of which units are counted when training ends, at most


@config
class CVAEDefaults:
    """How the finished model is sampled unless it is told otherwise."""

    truncation: Fraction = 1.0  # scale of z: 1 as it learned, less for more usual pictures that are more alike
    chunk: Positive = 8  # pictures per network call; a part of the model's numerics, so that batch size is not


@config
class CVAE(ModelConfig):
    """Encoder q(z|x,c) and decoder p(x|z,c) of a picture's latents, both told the text; z is drawn from N(0,1)."""

    kind: Literal["cvae"] = "cvae"
    text: str = "text"  # the text encoder, by its name in models
    autoencoder: str = "autoencoder"  # whose latents are drawn, by its name in models; of kind pixels: pixels
    units: Positive = 32  # numbers of z
    posterior: PosteriorConfig = PosteriorConfig()  # the encoder
    decoder: DecoderConfig = DecoderConfig()
    beta: PositiveFloat = 1.0  # weight of the divergence from N(0,1); 1: the evidence's bound
    free_bits: NonNegative = 0.0  # nats of each unit and picture that cost nothing (Kingma 2016, arXiv 1606.04934, appendix C.8)
    warmup_images: Count = 0  # over so many beta rises from 0 (Bowman 2015, arXiv 1511.06349); 0: it is whole from the start
    defaults: CVAEDefaults = CVAEDefaults()  # how the finished model is sampled

    refuses: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in ModelConfig.refuses.items() if name not in ("latents", "tags", "prompts")},
        "also": "draws pictures of one size",
    }
    answers = frozenset({"sample", "reconstruct", "units"})
    requires: ClassVar[Mapping[str, str]] = {"text": "encodes_text", "autoencoder": "encodes"}
    exports = True
    continues = True

    def inputs(self) -> dict[str, str]:
        """The text encoder and the autoencoder."""
        return {"text": self.text, "autoencoder": self.autoencoder}

    def identity(self) -> dict[str, Any]:
        """All but names and defaults of sampling."""
        return {name: value for name, value in plain(self).items() if name not in ("defaults", "text", "autoencoder")}

    def shown(self) -> dict[str, Any]:
        """How the finished model is sampled."""
        return {"defaults": plain(self.defaults)}

    @property
    def step(self) -> int:
        """Sides of latents are multiples of it."""
        return max(self.posterior.step, self.decoder.step)

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """As often as the autoencoder and the networks halve a picture."""
        return self.step * (others["autoencoder"].step_px({}) if "autoencoder" in others else 1)

    def text_width(self) -> int:
        """It takes any."""
        return 0

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the decoder, but for its first map, which depends on the size."""
        text, codec = others["text"].text_shape(note, width), others["autoencoder"].latent_network(note)
        with torch.device("meta"):
            return cost.count(self.decoder.build(self.decoder.step, codec.latent_width, text.states, text.pooled, self.units))

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """Encoder and decoder; text encoder and autoencoder are frozen."""
        text, codec = others["text"].text_shape(note), others["autoencoder"].latent_network(note)
        small, channels = side // codec.factor, codec.latent_width
        with torch.device("meta"):
            encoder = self.posterior.build(small, channels, text.pooled, self.units)
            decoder = self.decoder.build(small, channels, text.states, text.pooled, self.units)
            pooled, picture = torch.empty(IMAGES, text.pooled), torch.empty(IMAGES, channels, small, small)
            words = Text(tokens=torch.empty(IMAGES, text.tokens, text.states), mask=torch.ones(IMAGES, text.tokens), pooled=pooled)
            spent = cost.measure(encoder, lambda: torch.cat(encoder(picture, pooled)))
            spent = spent + cost.measure(decoder, lambda: decoder(torch.empty(IMAGES, self.units), [words]))
        known, encoding, _ = cost.autoencoder(codec, side, side)
        extra = text.cost.forward + (0 if stage.latents else encoding.forward)
        learned = {"encoder": cost.count(encoder), "decoder": cost.count(decoder)}
        return Footprint(learned=learned, frozen={"autoencoder": known, "text encoder": text.parameters}, cost=spent, extra=extra)

    def build(self, context: Context) -> CVAEFamily:
        """The family, ready to train, on the earlier products; an earlier stage's networks are continued."""
        codec = load_codec(autoencoder_folder(context.products["autoencoder"].folder))
        family = CVAEFamily(self, codec, TextEncoder.load(context.products["text"].folder), context.resolution)
        if context.init is not None:
            known_latents(context.init, codec)
            family.load(context.init.folder)
        return family

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """A model folder: both networks, the text encoder, the autoencoder, ldm.json and a card."""
        assemble(self, products, target, story, ("vae", "A conditional VAE that draws pictures of a text at once, trained"))

    def opened(self, folder: Path) -> CVAEFamily:
        """The family with the weights of a model folder."""
        family = CVAEFamily(self, load_codec(autoencoder_folder(folder)), TextEncoder.load(folder), size_of(folder))
        family.load(folder)
        family.content_hash = content_hash(folder)
        return family


class CVAEFamily(OnePass):
    """Encoder and decoder with their autoencoder and text encoder: they learn by `loss` and draw by `sample`."""

    kind = "cvae"

    def __init__(self, config: CVAE, codec: LatentCodec, text: TextEncoder, resolution: int) -> None:
        super().__init__(codec, text, resolution, config.defaults.truncation, config.defaults.chunk)
        self.config, self.weighs, self.able = config, config.decoder.tells == "words", config.answers
        side = resolution // codec.factor
        self.encoder = config.posterior.build(side, codec.channels, text.pooled_width, config.units)
        self.decoder = config.decoder.build(side, codec.channels, text.width, text.pooled_width, config.units)
        self._seen = 0  # images

    def load(self, folder: Path) -> None:
        """Take the weights of both networks from a product or a model folder.

        Raises:
            UserError: naming the part that is missing or does not fit.
        """
        for name in ("encoder", "decoder"):
            network = getattr(self, name)
            setattr(self, name, load_module(lambda network=network: network, load_weights(folder / name), folder / name))  # type: ignore[misc]

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return self.codec.factor * self.config.step

    # Training

    def compilable(self) -> list[nn.Module]:
        """Both sides."""
        return [self.encoder, self.decoder]

    def parameter_groups(self) -> list[ParameterGroup]:
        """Both networks, which learn one loss."""
        return [ParameterGroup("model", list(self.parameters()))]

    def progress(self, images: int) -> None:
        """How far beta has risen."""
        super().progress(images)
        self._seen = images

    @property
    def beta(self) -> float:
        """Weight of the divergence at this step."""
        many = self.config.warmup_images
        return self.config.beta * min(1.0, self._seen / many if many else 1.0)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """The negative bound of the evidence, in nats for each of a picture's values: -E log p(x|z,c) + beta KL(q(z|x,c) || N(0,1)).

        p is a Gaussian whose deviation is learned for each channel. Of the divergence at least `free_bits` counts of each unit and picture,
        so less than that has no slope.
        """
        x, text = self.truth(batch, rng), self.words(batch)
        mean, logvar = map(full, self.encoder(x, pooled_of(text)))
        z = mean + (0.5 * logvar).exp() * sent(rng.normal("cvae/z", (self.config.units,)), mean.device).to(mean)
        made, deviation = full(self.decoder(z, [text])), full(self.decoder.deviation)
        error = 0.5 * ((x - made) / deviation.exp()).square() + deviation + 0.5 * math.log(2 * math.pi)
        each, values = divergence(mean, logvar), x[0].numel()
        counted = each.clamp_min(self.config.free_bits).sum(1).mean()
        gauges = {"kl_nats": each.detach().sum(1).mean(), "deviation": deviation.detach().exp().mean()}
        return {"reconstruction": error.mean(), "kl": self.beta * counted / values}, gauges

    @torch.no_grad()
    def posterior(self, batch: ImageBatch | MomentBatch) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B,Z) of a batch's pictures with their captions."""
        mean, logvar = self.encoder(self.truth(batch, Rng(0, batch.position)), pooled_of(self.words(batch)))
        return full(mean), full(logvar)

    def units(self, batch: ImageBatch | MomentBatch) -> dict[str, float]:
        """Of these pictures: units of z that are active, all of them, and the nats that z tells of a picture."""
        was_training = self.training
        self.eval()
        mean, logvar = self.posterior(batch)
        self.train(was_training)
        active = int((mean.var(0, correction=0) > ACTIVE).sum())
        return {"active": active, "units": self.config.units, "nats": float(divergence(mean, logvar).sum(1).mean())}

    def finish(self, context: Context) -> dict[str, Any]:
        """Units of held-out pictures, as `units` counts them."""
        count = min(PICTURES, len(context.val))
        if not count:
            return {}
        index = list(range(count))
        found = self.units(context.val.load(index, index, context.resolution, context.seed, False).to(context.device))
        return {f"units_{name}" if name != "units" else name: value for name, value in found.items()} | {"units_of": count}

    def save(self, folder: Path) -> None:
        """encoder/ and decoder/, and ldm.json, which remembers the autoencoder and the size."""
        for name, given in (("encoder", self.config.posterior), ("decoder", self.config.decoder)):
            save_part({**plain(given), "units": self.config.units}, dict(getattr(self, name).state_dict()), folder / name)
        atomic.write_json(folder / RECORD, self.remembered())

    # Sampling

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """z (N,Z), standard normal."""
        return Rng(0, seeds).normal("cvae/z", (self.config.units,))

    @property
    def told_blocks(self) -> int:
        """The decoder's."""
        return len(self.decoder.blocks)

    def made(self, noise: Tensor, texts: Sequence[Text], shown: Tensor | None, truncation: float) -> Tensor:
        """The mean of p(x|z,c)."""
        return self.decoder(truncation * noise, texts)  # type: ignore[no-any-return]


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0,1)) of each unit, in nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
