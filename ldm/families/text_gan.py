"""Text-to-image GANs: one generator that is told a text draws pictures, or an autoencoder's latents, at once (GAN-INT-CLS to GigaGAN)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, NonNegative, Positive, PositiveFloat, config, plain
from ldm.data.views import ViewKind, kind_of
from ldm.diffusion.batch import ImageBatch, MomentBatch, Text, Views, taken
from ldm.diffusion.rng import Rng
from ldm.families import game
from ldm.families.draws import AFTER, SMALL
from ldm.families.family import Context, Footprint, ModelConfig, ParameterGroup, Product, Terms, TrainingStage
from ldm.families.game import GameLoss, full
from ldm.families.one_pass import OnePass, assemble, known_latents, lerped, pooled_of, size_of
from ldm.families.translator import shown_of
from ldm.formats import atomic
from ldm.formats.clip_folder import load_own_tower
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder, load_codec
from ldm.formats.model_folder import RECORD
from ldm.formats.part import content_hash, load_module, load_weights, save_part
from ldm.models import cost
from ldm.models.cost import IMAGES
from ldm.models.damsm import DamsmConfig, word_scores
from ldm.models.style_generator import StyleGeneratorConfig
from ldm.models.text_discriminator import TextDiscriminatorConfig
from ldm.models.vision_tower import Tower
from ldm.text.encoder import TextEncoder

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOSEN = ("truncation", "precision")
SHOWN = 3  # channels of a picture that is told
APART = 0.1  # mean difference of two pictures whose values have a deviation of 1, as a share of that of their noise
SHARPNESS = 10.0  # inverse temperature of contrastive terms (Zhang 2021, XMC-GAN, arXiv 2101.04702, section 4.1; gamma 3 of AttnGAN)


@config
class TextGANDefaults:
    """How the finished model is sampled unless it is told otherwise."""

    truncation: Fraction = 1.0  # how far styles lie from their mean: 1 as it learned, less for surer and more alike pictures
    chunk: Positive = 8  # pictures per network call; a part of the model's numerics, so that batch size is not


@config
class TextGAN(ModelConfig):
    """A generator and a discriminator, both told by the frozen text encoder what pictures show."""

    kind: Literal["text_gan"] = "text_gan"
    text: str = "text"  # the text encoder, by its name in models
    autoencoder: str = "autoencoder"  # in whose latents it draws, by its name in models; of kind pixels: in pixels
    after: str = ""  # a chain: the model, by its name in models, whose picture this one makes larger (StackGAN); empty: none
    enlarges: Count = 0  # so many times, a picture that it is told beside the text as its view small:N; 0: it is told none
    enlarged_noise: NonNegative = 0.1  # standard deviation of noise that is mixed into that picture, whose values lie in [-1,1]
    consistency: NonNegative = 0.0  # of pixels: weight of the L1 distance from that picture to what is made, as much smaller
    generator: StyleGeneratorConfig = StyleGeneratorConfig()
    discriminator: TextDiscriminatorConfig = TextDiscriminatorConfig()
    loss: GameLoss = "relativistic"  # of both players
    r1: NonNegative = 1.0  # weight of half the squared slope of the discriminator at true pictures
    r2: NonNegative = 1.0  # and at made ones (R3GAN, arXiv 2501.05441); both keep pictures varied
    slope_share: Fraction = 0.25  # of every batch, at whose pictures slopes are taken: they cost more than all else
    matching: NonNegative = 1.0  # weight of true pictures beside another's words, which the discriminator takes for made ones
    interpolation: NonNegative = 0.0  # weight of pictures of texts half way between two, as the generator hears of them (GAN-INT)
    diversity: NonNegative = 0.0  # weight of drawing unlike pictures of unlike noise (DSGAN)
    diversity_bound: PositiveFloat = (
        APART  # of which no more is asked: how far two pictures of a text lie apart, by how far their noise does
    )
    contrastive: NonNegative = 1.0  # weight of telling by the discriminator which words of the batch are a picture's (XMC-GAN)
    damsm: NonNegative = 0.0  # weight of telling by the CLIP's image tower which words a picture and its places show (AttnGAN)
    matcher: DamsmConfig = DamsmConfig()  # of damsm: what the towers see, in one space
    kl: NonNegative = 0.0  # weight of the divergence from N(0,1) of what generator.augmentation draws (StackGAN, eq. 2)
    lr_scale: PositiveFloat = 1.0  # the discriminator's learning rate, as a share of the generator's
    defaults: TextGANDefaults = TextGANDefaults()  # how the finished model is sampled

    refuses: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in ModelConfig.refuses.items() if name not in ("latents", "tags", "prompts")},
        "also": "draws pictures of one size",
        "exact": "compares the captions of the whole batch, which depend on how many processes there are",
    }
    answers = frozenset({"sample", "reconstruct"})

    def __post_init__(self) -> None:
        if not self.damsm and self.matcher != DamsmConfig():
            raise UserError("matcher: damsm is 0, so there is nothing that it could act on; leave it out, or give damsm a weight")
        if not self.diversity and self.diversity_bound != APART:
            why = "diversity is 0, so there is nothing that it could act on"
            raise UserError(f"diversity_bound: {why}; leave it out, or give diversity a weight")
        if self.kl and not self.generator.augmentation:
            raise UserError(f"kl: got {self.kl:g}, but generator.augmentation is 0, so there is nothing that it could act on; leave it out")
        if self.enlarges == 1:
            raise UserError("enlarges: got 1, which is no larger; take 2 or more")
        if self.consistency and not self.enlarges:
            raise UserError(f"consistency: got {self.consistency:g}, but no picture is told; set enlarges, or leave it out")
        if self.after and not self.enlarges:
            raise UserError(f"after: got {self.after}, whose picture is not read; set enlarges, such as 2")

    exports = True
    continues = True

    @property
    def requires(self) -> Mapping[str, str]:
        """A text encoder, for damsm a CLIP whose image tower is read; and an autoencoder."""
        return {"text": "has_tower" if self.damsm else "encodes_text", "autoencoder": "encodes"}

    @property
    def players(self) -> dict[str, Any]:
        """By name, the configurations of networks that learn, which are folders of a product."""
        return {"generator": self.generator, "discriminator": self.discriminator} | ({"damsm": self.matcher} if self.damsm else {})

    def inputs(self) -> dict[str, str]:
        """The text encoder and the autoencoder."""
        return {"text": self.text, "autoencoder": self.autoencoder}

    def assembled_from(self) -> dict[str, str]:
        """Its inputs, and the model before it in a chain."""
        return self.inputs() | ({AFTER: self.after} if self.after else {})

    def views(self) -> tuple[str, ...]:
        """The smaller picture, if it is told one."""
        return (f"{SMALL}:{self.enlarges}",) if self.enlarges else ()

    def identity(self) -> dict[str, Any]:
        """All but names, defaults of sampling, and what only a picture that is told, damsm or diversity brings, where there is none."""
        left_out = {"defaults", "text", "autoencoder", "after"}
        left_out |= set() if self.enlarges else {"enlarges", "enlarged_noise", "consistency"}
        left_out |= set() if self.damsm else {"damsm", "matcher"}
        left_out |= set() if self.diversity else {"diversity", "diversity_bound"}
        return {name: value for name, value in plain(self).items() if name not in left_out}

    def shown(self) -> dict[str, Any]:
        """How the finished model is sampled."""
        return {"defaults": plain(self.defaults)}

    @property
    def step(self) -> int:
        """Sides of latents are multiples of it."""
        return max(self.generator.step, self.discriminator.step)

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """As often as the autoencoder and the networks halve a picture."""
        return self.step * (others["autoencoder"].step_px({}) if "autoencoder" in others else 1)

    def text_width(self) -> int:
        """It takes any."""
        return 0

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the generator, but for its first map, which depends on the size."""
        text, codec = others["text"].text_shape(note, width), others["autoencoder"].latent_network(note)
        with torch.device("meta"):
            shown = SHOWN if self.enlarges else 0
            return cost.count(self.generator.build(self.generator.step, codec.latent_width, text.states, text.pooled, shown))

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """Generator and discriminator; text encoder and autoencoder are frozen."""
        text, codec = others["text"].text_shape(note), others["autoencoder"].latent_network(note)
        small, channels = side // codec.factor, codec.latent_width
        with torch.device("meta"):
            made = self.generator.build(small, channels, text.states, text.pooled, SHOWN if self.enlarges else 0)
            shown = torch.empty(IMAGES, SHOWN, side // self.enlarges, side // self.enlarges) if self.enlarges else None
            judge = self.discriminator.build(small, channels, text.pooled)
            pooled = torch.empty(IMAGES, text.pooled)
            words = Text(tokens=torch.empty(IMAGES, text.tokens, text.states), mask=torch.ones(IMAGES, text.tokens), pooled=pooled)
            noise, picture = torch.empty(IMAGES, made.noise_size), torch.empty(IMAGES, channels, small, small)
            seen = cost.measure(judge, lambda: judge(picture, pooled))
            drawn = cost.measure(made, lambda: made(noise, [words], shown)) * (2 if self.diversity else 1)
            spent = drawn + seen * (2.5 + (self.r1 > 0) + (self.r2 > 0))
        known, encoding, decoding = cost.autoencoder(codec, side, side)
        learned = {"generator": cost.count(made), "discriminator": cost.count(judge)}
        extra = text.cost.forward + (0 if stage.latents else encoding.forward)
        frozen, passed = {"autoencoder": known, "text encoder": text.parameters}, 0
        if self.damsm:
            said = others["text"].image_tower(side, note)
            with torch.device("meta"):
                tower, picture = said.build().requires_grad_(False), torch.empty(IMAGES, 3, side, side, requires_grad=True)
                learned["damsm"] = cost.count(self.matcher.build(text.states, text.pooled, said.width, said.embedding))
                seen = decoding + cost.measure(tower, lambda: tower.seen(picture)[1])
            frozen["image tower"] = cost.count(tower)
            spent, extra, passed = spent + seen, extra + seen.forward, known + frozen["image tower"]
        return Footprint(learned=learned, frozen=frozen, cost=spent, extra=extra, averaged=learned["generator"], passed=passed)

    def build(self, context: Context) -> TextGANFamily:
        """The family, ready to train, on the earlier products; an earlier stage's networks are continued."""
        text = TextEncoder.load(context.products["text"].folder)
        codec = load_codec(autoencoder_folder(context.products["autoencoder"].folder))
        if self.consistency and codec.bound is None:
            raise UserError(f"consistency: compares pixels, but models.{self.autoencoder} makes latents; leave it out, or use kind pixels")
        family = TextGANFamily(self, codec, text, context.resolution, self._tower(context.products["text"].folder))
        if context.init is not None:
            known_latents(context.init, codec)
            family.load(context.init.folder)
        return family

    def _tower(self, folder: Path) -> Tower | None:
        """The image tower that damsm sees by, of the CLIP in a folder."""
        return Tower(*load_own_tower(folder)) if self.damsm else None

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """A model folder: the players, the text encoder, the autoencoder, ldm.json and a card."""
        what = "A generator that draws pictures of a text at once, trained against a discriminator"
        assemble(self, products, target, story, ("gan", what))

    def opened(self, folder: Path) -> TextGANFamily:
        """The family with the weights of a model folder."""
        codec, text = load_codec(autoencoder_folder(folder)), TextEncoder.load(folder)
        family = TextGANFamily(self, codec, text, size_of(folder), self._tower(folder))
        family.load(folder)
        family.content_hash = content_hash(folder)
        return family


class TextGANFamily(OnePass):
    """Generator and discriminator with their autoencoder and text encoder: they learn by `loss` and draw by `sample`.

    Args:
        tower: what damsm sees by; None: there is no such term.
    """

    kind = "text_gan"

    def __init__(self, config: TextGAN, codec: LatentCodec, text: TextEncoder, resolution: int, tower: Tower | None = None) -> None:
        super().__init__(codec, text, resolution, config.defaults.truncation, config.defaults.chunk)
        self.config, self.weighs = config, config.generator.tells == "words"
        side = resolution // codec.factor
        shown = SHOWN if config.enlarges else 0
        self.generator = config.generator.build(side, codec.channels, text.width, text.pooled_width, shown)
        self.discriminator = config.discriminator.build(side, codec.channels, text.pooled_width)
        if tower is not None:
            shape = tower.network.config
            self.damsm = config.matcher.build(text.width, text.pooled_width, shape.width, shape.embedding)
            self._frozen = (*self._frozen, tower)

    def load(self, folder: Path) -> None:
        """Take the weights of the networks from a product or a model folder.

        Raises:
            UserError: naming the part that is missing or does not fit.
        """
        for name in self.config.players:
            network = getattr(self, name)
            setattr(self, name, load_module(lambda network=network: network, load_weights(folder / name), folder / name))  # type: ignore[misc]

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return self.codec.factor * self.config.step

    # Training

    def compilable(self) -> list[nn.Module]:
        """The generator: the discriminator's slope is differentiated."""
        return [self.generator]

    def parameter_groups(self) -> list[ParameterGroup]:
        """Generator, discriminator, and the maps of damsm if there are any."""
        scales = {"discriminator": self.config.lr_scale}
        return [ParameterGroup(name, list(getattr(self, name).parameters()), scales.get(name, 1.0)) for name in self.config.players]

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """What the discriminator and the words of the batch say of made pictures, and the discriminator's own lessons.

        Each network sees a picture once: the discriminator's features of true pictures serve beside their own words and beside others',
        and those of made ones, which come detached, serve both players. So there is one backward pass, and neither player's gradient has
        anything of the other's loss.
        """
        said, judge, captions = self.config, self.discriminator, list(batch.caption)
        text, real, rows = self.words(batch), self.truth(batch, rng), self.ranks.rows
        sentence = pooled_of(text)
        numbers = _numbers(captions)
        if self.ranks.world > 1:
            numbers = rows(numbers.to(real.device)).round()  # of the captions of all processes
        first = self.ranks.rank * len(captions)
        wrong = others(numbers.tolist())[first : first + len(captions)]  # by place among those of all
        noise = self.noise_of(rng).to(real.device)
        small, shown = self._small(batch, rng)
        made = full(self.generator(noise, [text], shown))
        leaf = made.detach().requires_grad_()
        terms: Terms = {}
        with torch.enable_grad():
            seen, seen_made = judge.features(real), judge.features(leaf)
            sure, unsure = full(judge.judge(seen, sentence)), full(judge.judge(seen_made, sentence))
            opinion = game.generator_loss(said.loss, unsure, sure.detach())
            gauges = {"logits_real": sure.detach().mean(), "logits_fake": unsure.detach().mean()}
            gauges["logit_margin"] = gauges["logits_real"] - gauges["logits_fake"]
            terms["discriminator"] = game.discriminator_loss(said.loss, sure, unsure)
            if said.matching:
                fooled = full(judge.judge(seen, rows(sentence)[wrong]))
                terms["matching"] = said.matching * game.discriminator_loss(said.loss, sure, fooled)
                gauges["logits_wrong_words"] = fooled.detach().mean()
            if said.contrastive:
                same, words = (numbers[:, None] == numbers).to(real.device), rows(judge.words(sentence)).T
                terms["contrastive"] = said.contrastive * contrast(rows(judge.pictures(seen)) @ words, same)
                agreed = contrast(rows(judge.pictures(seen_made)) @ words, same)
                gauges["contrastive_made"] = agreed.detach()
                opinion = opinion + said.contrastive * agreed
            else:
                terms["discriminator"] = terms["discriminator"] + game.silent(judge.picture_side) + game.silent(judge.text_side)
            if said.damsm:
                same = (numbers[:, None] == numbers).to(real.device)
                terms["damsm"] = said.damsm * self._matched(real, text, same)
                agreed = self._matched(leaf, text, same)
                gauges["damsm_made"] = agreed.detach()
                opinion = opinion + said.damsm * agreed
        (slope,) = torch.autograd.grad(opinion, leaf, retain_graph=True)
        terms["adversarial"] = game.through(made, slope, opinion)
        if said.consistency:
            assert small is not None
            again = F.avg_pool2d(made, said.enlarges) * self.codec.std + self.codec.mean
            terms["consistency"] = said.consistency * F.l1_loss(again, small)
        if said.kl:
            mean, logvar = self.generator.gaussian(sentence)
            terms["kl"] = said.kl * 0.5 * (full(mean).square() + full(logvar).exp() - 1 - full(logvar)).sum(1).mean()
        if said.interpolation:
            terms["interpolation"] = said.interpolation * self._between(text, wrong, (noise, shown), sure)
        if said.diversity:
            again_noise = self.noise_of(rng, "text_gan/again").to(real.device)
            apart = (made - full(self.generator(again_noise, [text], shown))).abs().mean((1, 2, 3))
            ratio = apart / (noise - again_noise).abs().mean(1)
            terms["diversity"] = said.diversity * (said.diversity_bound - ratio).clamp_min(0).mean()
            gauges["apart"] = ratio.detach().mean()
        some = evenly(len(real), said.slope_share)
        for name, weight, picture in (("r1", said.r1, real), ("r2", said.r2, leaf)):
            if weight:
                terms[name] = weight * game.gradient_penalty(judge, picture[some], sentence[some])
        return terms, gauges

    def _matched(self, latents: Tensor, text: Text, same: Tensor) -> Tensor:
        """DAMSM's loss of latents (B,C,h,w) beside a batch's captions, those of all processes (AttnGAN, eq. 10-13).

        As its authors' code has it, means over the batch stand for its sums, and equal captions are no wrong ones.
        """
        rows = self.ranks.rows
        places, pictures = map(full, self.damsm.pictures(self._frozen[2](self.codec.decode(latents))))
        words, sentences = map(full, self.damsm.captions(text.tokens, pooled_of(text)))
        said = rows(text.mask.to(words)) > 0.5
        with torch.autocast(self.device.type, enabled=False):
            by_words = word_scores(rows(places), rows(words), said)
            return 2 * contrast(by_words, same) + 2 * contrast(rows(pictures) @ rows(sentences).T, same)

    def _small(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Tensor | None, Tensor | None]:
        """The smaller pictures of a batch (B,3,h,w) in [-1,1], and what the generator is told of them, noisy; None: it is told none."""
        if not self.config.enlarges:
            return None, None
        view = (batch.views or {})[self.config.views()[0]]
        assert isinstance(view, Tensor)
        small = 2 * view.to(self.device).float() - 1
        return small, self._noised(small, rng)

    def _noised(self, small: Tensor, rng: Rng) -> Tensor:
        return small + self.config.enlarged_noise * rng.normal("text_gan/shown", small.shape[1:]).to(small)

    def _between(self, text: Text, wrong: list[int], told: tuple[Tensor, Tensor | None], sure: Tensor) -> Tensor:
        """The discriminator's opinion of pictures of texts half way to others of the batch (GAN-INT, Reed 2016, eq. 5 with beta 0.5)."""
        rows = self.ranks.rows
        every = Text(tokens=rows(text.tokens), mask=rows(text.mask.to(text.tokens)) > 0.5, pooled=rows(pooled_of(text)))
        mixed = lerped(text, taken(every, wrong), 0.5)
        made = full(self.generator(told[0], [mixed], told[1]))
        leaf = made.detach().requires_grad_()
        with torch.enable_grad():
            opinion = game.generator_loss(self.config.loss, full(self.discriminator(leaf, pooled_of(mixed))), sure.detach())
        (slope,) = torch.autograd.grad(opinion, leaf)
        return game.through(made, slope, opinion)

    def noise_of(self, rng: Rng, purpose: str = "text_gan/noise") -> Tensor:
        """Noise (B,N) of the generator, standard normal."""
        return rng.normal(purpose, (self.generator.noise_size,))

    def averaged(self) -> list[nn.Parameter]:
        """The generator's."""
        return list(self.generator.parameters())

    def save(self, folder: Path) -> None:
        """generator/, discriminator/ and damsm/, if there is one, and ldm.json, which remembers the autoencoder and the size."""
        for name, given in self.config.players.items():
            save_part(plain(given), dict(getattr(self, name).state_dict()), folder / name)
        atomic.write_json(folder / RECORD, self.remembered())

    # Sampling

    @property
    def told(self) -> Mapping[str, ViewKind]:
        """The smaller picture, if it reads one."""
        return {name: kind_of({}, name) for name in self.config.views()}

    def tell(self, given: Views, strength: Mapping[str, float], size: tuple[int, int]) -> tuple[Any, ...]:
        """As `ldm.families.draws.Draws.tell`."""
        return shown_of(self, given, strength)

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """All noise of pictures, (N,noise_size): that of styles and that of every block."""
        return self.noise_of(Rng(0, seeds))

    @property
    def told_blocks(self) -> int:
        """The generator's."""
        return len(self.generator.blocks)

    def shown(self, edits: Sequence[Any], places: Sequence[int], seeds: Sequence[int]) -> Tensor | None:
        """The smaller pictures, noisy, if it is told any."""
        if not self.config.enlarges:
            return None
        if not edits:
            view = self.config.views()[0]
            self.refuse("given", f"makes a smaller picture larger; give one by --given {view}=FILE, or export it after the model before")
        small = edits[-1].value
        each = small[list(places)] if len(small) > 1 else small.expand(len(places), -1, -1, -1)
        return self._noised(each.to(self.device), Rng(0, seeds))

    def made(self, noise: Tensor, texts: Sequence[Text], shown: Tensor | None, truncation: float) -> Tensor:
        """Of the generator."""
        return self.generator(noise, texts, shown, truncation=truncation)  # type: ignore[no-any-return]


def _numbers(captions: Sequence[str]) -> Tensor:
    """Whole numbers (B,) float64 below 2^48, equal where captions are."""
    digests = [hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=6).digest() for caption in captions]
    return torch.tensor([float(int.from_bytes(digest, "big")) for digest in digests], dtype=torch.float64)


def others(captions: Sequence[Any]) -> list[int]:
    """For each caption of a batch the next other one behind it, in a circle; its own place where all are equal."""
    many = len(captions)
    return [next((j % many for j in range(i + 1, i + many) if captions[j % many] != captions[i]), i) for i in range(many)]


def evenly(many: int, share: float) -> list[int]:
    """That share of the places of a batch, evenly spread, so that halves of the batch hold halves of them; at least one."""
    return [i for i in range(many) if int((i + 1) * share) > int(i * share)] or [0]


def contrast(similarity: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy, both ways, of which of a batch's sentences each picture shows, of cosines (B,B); equal sentences are no wrong ones."""
    own = torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = full(similarity).mul(SHARPNESS).masked_fill(same & ~own, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
