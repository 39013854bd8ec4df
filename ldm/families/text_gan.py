"""Text-to-image GANs: one generator that is told a text draws pictures, or an autoencoder's latents, at once (GAN-INT-CLS to GigaGAN)."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, NonNegative, Positive, PositiveFloat, config, plain
from ldm.config.version import __version__
from ldm.data.pictures import to_uint8
from ldm.data.views import ViewKind, kind_of
from ldm.diffusion.batch import ImageBatch, MomentBatch, Text, Views, cat, rows, taken
from ldm.diffusion.rng import Rng
from ldm.families import game
from ldm.families.chain import within
from ldm.families.draws import AFTER, BEFORE, DIRECT, NUMBERS, OWN, SMALL, Running, Settings, Wanted
from ldm.families.family import Context, Family, Footprint, ModelConfig, ParameterGroup, Product, Terms, TrainingStage
from ldm.families.game import GameLoss, full
from ldm.families.prompted import Prompted
from ldm.families.translator import Shown, words_of
from ldm.formats import atomic
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder, load_codec
from ldm.formats.model_folder import OWN_CLIP, RECORD, own_clip, read_record
from ldm.formats.part import content_hash, load_module, load_weights, save_part
from ldm.formats.text_folder import TEXT_PARTS
from ldm.models import cost
from ldm.models.cost import IMAGES
from ldm.models.style_generator import StyleGeneratorConfig
from ldm.models.text_discriminator import TextDiscriminatorConfig
from ldm.text.encoder import TextEncoder
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.prompt_syntax import Piece, Prompt, literal
from ldm.text.weighted import encode

PLAYERS = ("generator", "discriminator")  # networks, and folders of a product
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHOSEN = ("truncation", "precision")
SHOWN = 3  # channels of a picture that is told
SHARPNESS = 10.0  # inverse temperature of the contrastive term (Zhang 2021, XMC-GAN, arXiv 2101.04702, section 4.1)


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
    contrastive: NonNegative = 1.0  # weight of telling by the discriminator which words of the batch are a picture's (XMC-GAN)
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
        if self.kl and not self.generator.augmentation:
            raise UserError(f"kl: got {self.kl:g}, but generator.augmentation is 0, so there is nothing that it could act on; leave it out")
        if self.enlarges == 1:
            raise UserError("enlarges: got 1, which is no larger; take 2 or more")
        if self.consistency and not self.enlarges:
            raise UserError(f"consistency: got {self.consistency:g}, but no picture is told; set enlarges, or leave it out")
        if self.after and not self.enlarges:
            raise UserError(f"after: got {self.after}, whose picture is not read; set enlarges, such as 2")

    requires: ClassVar[Mapping[str, str]] = {"text": "encodes_text", "autoencoder": "encodes"}
    exports = True
    continues = True

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
        """All but names, defaults of sampling, and what only a picture that is told brings, where there is none."""
        left_out = ("defaults", "text", "autoencoder", "after", *(() if self.enlarges else ("enlarges", "enlarged_noise", "consistency")))
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
            spent = cost.measure(made, lambda: made(noise, [words], shown)) + seen * (2.5 + (self.r1 > 0) + (self.r2 > 0))
        known, encoding, _ = cost.autoencoder(codec, side, side)
        learned = {"generator": cost.count(made), "discriminator": cost.count(judge)}
        extra = text.cost.forward + (0 if stage.latents else encoding.forward)
        frozen = {"autoencoder": known, "text encoder": text.parameters}
        return Footprint(learned=learned, frozen=frozen, cost=spent, extra=extra, averaged=learned["generator"])

    def build(self, context: Context) -> TextGANFamily:
        """The family, ready to train, on the earlier products; an earlier stage's networks are continued."""
        text = TextEncoder.load(context.products["text"].folder)
        codec = load_codec(autoencoder_folder(context.products["autoencoder"].folder))
        if self.consistency and codec.bound is None:
            raise UserError(f"consistency: compares pixels, but models.{self.autoencoder} makes latents; leave it out, or use kind pixels")
        family = TextGANFamily(self, codec, text, context.resolution)
        if context.init is not None:
            said = read_record(context.init.folder).get("autoencoder")
            if said != codec.hash:
                raise UserError(f"{context.init.folder}: learned in the latents of another autoencoder; train it anew or bring that one")
            family.load(context.init.folder)
        return family

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """A model folder: both networks, the text encoder, the autoencoder, ldm.json and a card."""

        def write(folder: Path) -> None:
            shutil.copytree(products["model"].folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(atomic.MANIFEST))
            text, autoencoder = products["text"].folder, autoencoder_folder(products["autoencoder"].folder)
            for name in TEXT_PARTS:
                if (text / name).is_dir():
                    shutil.copytree(text / name, folder / name)
            if clip := own_clip(text):
                shutil.copytree(clip, folder / OWN_CLIP)
            shutil.copytree(autoencoder, folder / ("vqvae" if autoencoder.name == "vqvae" else "vae"))
            said = {"kind": self.kind, "config": plain(self), "story": dict(story), "ldm_version": __version__}
            atomic.write_json(folder / RECORD, {**read_record(products["model"].folder), **said})
            (folder / "README.md").write_text(_card(said), encoding="utf-8")
            if AFTER in products and (before := products[AFTER].config) is not None:
                before.assemble(within(products), folder / BEFORE, story)

        atomic.commit(target, write)

    def opened(self, folder: Path) -> TextGANFamily:
        """The family with the weights of a model folder."""
        size = read_record(folder).get("defaults", {}).get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**16 for side in size)):
            raise UserError(f"{folder / RECORD}: defaults.size: got {size!r}, not [height, width] in px; copy the whole folder again")
        family = TextGANFamily(self, load_codec(autoencoder_folder(folder)), TextEncoder.load(folder), size[0])
        family.load(folder)
        family.content_hash = content_hash(folder)
        return family


def _card(said: Mapping[str, Any]) -> str:
    """README.md, as the Hugging Face Hub reads it."""
    story = said["story"]
    stages = "\n".join(f"| {name} | {text} |" for name, text in story.get("stages", {}).items())
    return f"""---
library_name: ldm
pipeline_tag: text-to-image
tags: [ldm, text-to-image, gan]
---

# {story.get("name", "A text-to-image GAN")}

A generator that draws pictures of a text at once, trained against a discriminator with `ldm` on {story.get("data", "its user's data")}.

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


class TextGANFamily(Family, Prompted):
    """Generator and discriminator with their autoencoder and text encoder: they learn by `loss` and draw by `sample`."""

    kind = "text_gan"

    def __init__(self, config: TextGAN, codec: LatentCodec, text: TextEncoder, resolution: int) -> None:
        super().__init__()
        self.config, self.reader, self.resolution = config, text, resolution
        side = resolution // codec.factor
        shown = SHOWN if config.enlarges else 0
        self.generator = config.generator.build(side, codec.channels, text.width, text.pooled_width, shown)
        self.discriminator = config.discriminator.build(side, codec.channels, text.pooled_width)
        self._frozen = (codec, text.model)  # a tuple, so that they stay out of the module tree

    def load(self, folder: Path) -> None:
        """Take the weights of both networks from a product or a model folder.

        Raises:
            UserError: naming the part that is missing or does not fit.
        """
        for name in PLAYERS:
            network = getattr(self, name)
            setattr(self, name, load_module(lambda network=network: network, load_weights(folder / name), folder / name))  # type: ignore[misc]

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        return self._frozen[0]

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return self.codec.factor * self.config.step

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px, and how it is sampled."""
        return {"size": (self.resolution, self.resolution), **plain(self.config.defaults)}

    def frozen(self) -> list[nn.Module]:
        """The autoencoder and the text encoder."""
        return list(self._frozen)

    # Training

    def parameter_groups(self) -> list[ParameterGroup]:
        """Generator and discriminator."""
        judge = ParameterGroup("discriminator", list(self.discriminator.parameters()), self.config.lr_scale)
        return [ParameterGroup("generator", list(self.generator.parameters())), judge]

    def true(self, batch: ImageBatch | MomentBatch, rng: Rng) -> Tensor:
        """True pictures as the discriminator sees them (B,C,h,w)."""
        with torch.no_grad():
            mean, std = (batch.mean, batch.std) if isinstance(batch, MomentBatch) else self.codec.moments(batch.image)
            return full(mean) if std is None else full(mean) + full(std) * rng.normal("posterior", mean.shape[1:]).to(mean.device)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """What the discriminator and the words of the batch say of made pictures, and the discriminator's own lessons.

        Each network sees a picture once: the discriminator's features of true pictures serve beside their own words and beside others',
        and those of made ones, which come detached, serve both players. So there is one backward pass, and neither player's gradient has
        anything of the other's loss.
        """
        said, judge, captions = self.config, self.discriminator, list(batch.caption)
        kept = batch.text if isinstance(batch, MomentBatch) else None
        text = with_sentence(self.text.encode(captions) if kept is None else kept)
        sentence, real, rows = _pooled(text), self.true(batch, rng), self.ranks.rows
        numbers = _numbers(captions)
        if self.ranks.world > 1:
            numbers = rows(numbers.to(real.device)).round()  # of the captions of all processes
        first = self.ranks.rank * len(captions)
        wrong = others(numbers.tolist())[first : first + len(captions)]  # by place among those of all
        noise = self.noise_of(rng).to(real.device)
        small, shown = self._shown(batch, rng)
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
        some = evenly(len(real), said.slope_share)
        for name, weight, picture in (("r1", said.r1, real), ("r2", said.r2, leaf)):
            if weight:
                terms[name] = weight * game.gradient_penalty(judge, picture[some], sentence[some])
        return terms, gauges

    def _shown(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Tensor | None, Tensor | None]:
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
        every = Text(tokens=rows(text.tokens), mask=rows(text.mask.to(text.tokens)) > 0.5, pooled=rows(_pooled(text)))
        mixed = lerped(text, taken(every, wrong), 0.5)
        made = full(self.generator(told[0], [mixed], told[1]))
        leaf = made.detach().requires_grad_()
        with torch.enable_grad():
            opinion = game.generator_loss(self.config.loss, full(self.discriminator(leaf, _pooled(mixed))), sure.detach())
        (slope,) = torch.autograd.grad(opinion, leaf)
        return game.through(made, slope, opinion)

    def noise_of(self, rng: Rng) -> Tensor:
        """Noise (B,N) of the generator, standard normal."""
        return rng.normal("text_gan/noise", (self.generator.noise_size,))

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text encoder reads."""
        return cut_captions(captions, lambda: self.text.tokenizer, self.text.room)

    def averaged(self) -> list[nn.Parameter]:
        """The generator's."""
        return list(self.generator.parameters())

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """One picture for each of the batch's captions, with the default settings."""
        captions = list(batch.caption)
        edits = self.tell(batch.views, {}, (self.resolution, self.resolution)) if batch.views else ()
        images = self.sample(captions, list(range(seed, seed + len(captions))), edits=edits)
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def save(self, folder: Path) -> None:
        """generator/ and discriminator/, and ldm.json, which remembers the autoencoder and the size."""
        for name, given in ((PLAYERS[0], self.config.generator), (PLAYERS[1], self.config.discriminator)):
            save_part(plain(given), dict(getattr(self, name).state_dict()), folder / name)
        atomic.write_json(folder / RECORD, {"autoencoder": self.codec.hash, "defaults": {"size": [self.resolution, self.resolution]}})

    # Sampling

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1]."""
        return self.codec.reconstruct(image)

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """Truncation and precision, the model's own where none is asked for."""
        for name in NUMBERS:
            value = getattr(wanted, name)
            if name not in CHOSEN and value not in (None, "", getattr(DIRECT, name)):
                self.refuse(f"{name}: got {value!r}", "draws at once and has no such setting; leave it out")
        own = {name: value for name in CHOSEN if (value := getattr(wanted, name)) not in (None, "")}
        return replace(DIRECT, **{"truncation": self.config.defaults.truncation, **own}).checked()

    @property
    def told(self) -> Mapping[str, ViewKind]:
        """The smaller picture, if it reads one."""
        return {name: kind_of({}, name) for name in self.config.views()}

    def tell(self, given: Views, strength: Mapping[str, float], size: tuple[int, int]) -> tuple[Any, ...]:
        """As `ldm.families.draws.Draws.tell`."""
        if weak := [name for name, value in strength.items() if value != 1]:
            self.refuse(f"given: {weak[0]}@{strength[weak[0]]:g}", "knows no weights of a view; leave @ out")
        if unread := [name for name in given if name not in self.told]:
            self.refuse(f"given: {unread[0]}", f"reads {', '.join(self.told) or 'no views'}; leave it out")
        return tuple(Shown(2 * view.float() - 1) for view in given.values() if isinstance(view, Tensor))

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """All noise of pictures, (N,noise_size): that of styles and that of every block."""
        return self.noise_of(Rng(0, seeds))

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
            UserError: on settings that it has not, or another size than it learned to draw.
        """
        chosen, chunk, own = self.settings(settings), self.config.defaults.chunk, (self.resolution, self.resolution)
        if tuple(size or own) != own:
            self.refuse(f"size: got {size[1]}x{size[0]}" if size else "size", f"draws {own[1]}x{own[0]} alone; leave it out")
        if words_of(negative).strip():
            self.refuse("negative", "reads no negative prompt; leave it out")
        texts = self._texts([literal(prompt) if isinstance(prompt, str) else prompt for prompt in prompts])
        numbers = list(range(len(prompts)) if seeds is None else seeds)
        noise, small = self.noise(numbers, own) if latents is None else latents, edits[-1].value if edits else None
        if self.config.enlarges and small is None:
            view = self.config.views()[0]
            self.refuse("given", f"makes a smaller picture larger; give one by --given {view}=FILE, or export it after the model before")
        image = torch.empty(len(prompts), *own, 3, dtype=torch.uint8)
        was_training, kind = self.training, PRECISION[chosen.precision]
        self.eval()
        try:
            for start in range(0, len(prompts), chunk):
                own_rows = list(range(start, min(start + chunk, len(prompts))))
                padded = (*own_rows, *[own_rows[-1]] * (chunk - len(own_rows)))
                with torch.autocast(self.device.type, kind, enabled=kind != torch.float32):
                    told = [cat([texts[row][block] for row in padded]) for block in range(len(self.generator.blocks))]
                    shown = None
                    if small is not None:
                        each = small[list(padded)] if len(small) > 1 else small.expand(len(padded), -1, -1, -1)
                        shown = self._noised(each.to(self.device), Rng(0, [numbers[row] for row in padded]))
                    made = self.generator(noise[list(padded)].to(self.device), told, shown, truncation=chosen.truncation)
                    image[own_rows] = to_uint8(self.codec.decode(full(made)))[: len(own_rows)].cpu()
                if on_step is not None:
                    on_step(own_rows[-1] + 1, len(prompts))
        finally:
            self.train(was_training)
        return image

    def _texts(self, prompts: Sequence[Prompt]) -> list[list[Text]]:
        """What each block is told of each prompt (1,...): words that change by step elsewhere change by block here (prompt mixing)."""
        many = len(self.generator.blocks)
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
        found = prompt.parts[0].at(block, len(self.generator.blocks))
        if self.config.generator.tells == "sentence" and any(piece.weight != 1 for piece in found):
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
    return replace(text, tokens=text.tokens.lerp(other.tokens, share), pooled=_pooled(text).lerp(_pooled(other), share))


def _pooled(text: Text) -> Tensor:
    assert text.pooled is not None, "with_sentence gives it"
    return text.pooled


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
