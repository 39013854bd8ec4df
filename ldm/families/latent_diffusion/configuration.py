"""Configuration of latent diffusion: its fields, what cannot be had together, and what a training of it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import torch

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, Positive, config, plain
from ldm.data.views import EMBEDDING, parted
from ldm.diffusion import learned_variance
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.process import Process
from ldm.families.chain import within
from ldm.families.draws import AFTER, BEFORE
from ldm.families.family import Footprint, Found, ModelConfig, Product, TrainingStage, agree, in_words
from ldm.families.latent_diffusion import conditions
from ldm.families.latent_diffusion.alignment import Alignment, projection
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.distillation import Consistency
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.fine_tuning import KEPT, LowRank
from ldm.families.latent_diffusion.folder import defaults_of, process_of, variance_of
from ldm.families.latent_diffusion.inpainting import Inpainting
from ldm.families.latent_diffusion.masked_loss import MaskedLoss
from ldm.families.latent_diffusion.personalisation import Adapt
from ldm.families.pretrained import PretrainedAutoencoder, PretrainedText, config_files, local_folder, model_folder
from ldm.formats.assembly import assemble
from ldm.formats.denoiser_folder import denoiser_folder, read_denoiser
from ldm.formats.integrity import check
from ldm.formats.model_folder import RECORD, read_record
from ldm.formats.part import PARTS, content_hash, read_json
from ldm.models import cost, denoiser
from ldm.models.cost import TextShape
from ldm.models.lora import halvable
from ldm.models.quantized import BYTES, quantizable
from ldm.text.wordless import SHAPE as WORDLESS

OFF: tuple[tuple[str, Any], ...] = (  # fields that say nothing in an identity
    ("adapt", None),
    ("inpaint", None),
    ("masked_loss", None),
    ("variance", None),
    ("align", None),
    ("caption_chunks", 1),
    ("conditions", []),
    ("learn", "all"),
    ("distill", None),
)
FOLLOWS = ("in_channels", "out_channels", "context_width")  # of a denoising network: these the other models decide


@config
class LatentDiffusionConfig(ModelConfig):
    """What a latent diffusion model is made of and learns, and what its stages may ask of it."""

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    text: str = "text"  # the text encoder, by its name in models; empty: none, and the network reads no text (DDPM)
    after: str = (
        ""  # a chain: the model, by its name in models, that draws what this one is told as its view small:N or embedding; empty: none
    )
    autoencoder: str = "autoencoder"  # whose latents are denoised, by its name in models
    network: denoiser.Network = denoiser.DEFAULT  # in_channels, out_channels and context_width follow the autoencoder and the text encoder
    process: Process = Process()  # how data becomes noise, and what the network predicts
    variance: LearnedVariance | None = None  # learn the variance of ddpm's steps too (IDDPM, ADM, Imagen); null: it is the posterior's
    align: Alignment | None = None  # lead inner states to what the CLIP's image tower sees (REPA); null: the denoising loss alone
    caption_chunks: Positive = 1  # of CLIP's 75 tokens (or what the text encoder reads) that a caption may have: kohya's 225 are 3
    caption_dropout: Fraction = 0.1  # share of captions replaced by the empty prompt, for guidance
    defaults: Defaults = Defaults()  # how the finished model is sampled
    masked_loss: MaskedLoss | None = None  # weigh errors by the data's masks; null: all of a picture is learned
    inpaint: Inpainting | None = None  # learn to paint into pictures, told a mask and what is known; null: to draw from prompts alone
    conditions: tuple[Condition, ...] = ()  # what the network is told besides the caption: views of pictures, each by a port
    learn: Literal["all", "new"] = "all"  # new: only what the conditions bring; the base given by init stays as it is
    adapt: Adapt | None = None  # what alone learns of the model given by init; null: all weights of the network
    distill: Consistency | None = None  # learn to draw in a few steps what the model given by init draws in many; null: learn from the data

    refuses: ClassVar[Mapping[str, str]] = {}
    answers = frozenset({"sample", "reconstruct", "complete"})
    exports = True
    continues = True
    beside = KEPT

    def remarks(self) -> list[str]:
        """What its adapters have to say."""
        return [f"adapt.{line}" for line in self.adapt.remarks()] if self.adapt is not None else []

    @property
    def reads_prompts(self) -> bool:
        """Where it has a text encoder."""
        return bool(self.text)

    @property
    def requires(self) -> Mapping[str, str]:
        """A text encoder, or where embeddings of pictures are told both sides of a CLIP; and an autoencoder."""
        embeds = any(parted(view)[0] == EMBEDDING for view in self.views())
        return {"text": "has_tower" if embeds else "encodes_text", "autoencoder": "encodes"}

    @property
    def reads_masks(self) -> bool:
        """Whether its loss is masked."""
        return self.masked_loss is not None

    @property
    def learns_masked_out(self) -> bool:
        """As `ldm.families.family.ModelConfig.learns_masked_out`."""
        return self.masked_loss is not None and self.masked_loss.unmasked > 0

    def told(self) -> tuple[str, ...]:
        """Those of its conditions."""
        return tuple(each.view for each in self.conditions)

    def views(self) -> tuple[str, ...]:
        """Those of its conditions; to align with what is seen of them, the pictures."""
        own = self.told()
        return own if self.align is None or EMBEDDING in own else (*own, EMBEDDING)

    def inputs(self) -> dict[str, str]:
        """The text encoder, if it reads by one, and the autoencoder."""
        return ({"text": self.text} if self.text else {}) | {"autoencoder": self.autoencoder}

    def assembled_from(self) -> dict[str, str]:
        """Its inputs, and the model before it in a chain."""
        return self.inputs() | ({AFTER: self.after} if self.after else {})

    def from_base(self, base: str) -> dict[str, ModelConfig]:
        """The base's own text encoder and autoencoder."""
        return ({"text": PretrainedText(path=base)} if self.text else {}) | {"autoencoder": PretrainedAutoencoder(path=base)}

    def find(self, path: str, note: Callable[[str], None]) -> Found:
        """The base model's folder; its network and its schedule count.

        Raises:
            UserError: naming the part that is missing.
        """
        folder = model_folder(path, [f"{part}/*" for part in PARTS] + ["model_index.json", RECORD], note)
        network, scheduler = denoiser_folder(folder), folder / "scheduler"
        for part in (network, scheduler):
            if not part.is_dir():
                raise UserError(f"init: {path} has no {part.name}; give a whole model's folder or file")
        check(folder / RECORD)
        said = f"{content_hash(network)} {content_hash(scheduler)}"
        return Found(path, folder, hashlib.sha256(said.encode()).hexdigest())

    def continued(self, base: Path) -> Self:
        """With the network, the schedule and the target of a base model.

        What the configuration says of them must agree, but need not be said at all; offset noise is the base's where the configuration
        is silent. What else only concerns training (weights of errors, density of times, dropout) is the configuration's own.

        Raises:
            UserError: naming the field, both values and the fix.
        """
        network, process = denoiser.continued(self.network, read_denoiser(base)), process_of(base)
        own = self.network
        if own != denoiser.continued(own, type(own)()):  # more than what concerns training alone is said
            if own.kind != network.kind:
                message = f"got {own.kind}, but the base model {base} has {network.kind}; leave network out"
                raise UserError(f"models.diffusion.network.kind: {message}")
            agree("models.diffusion.network", own, network, FOLLOWS, base)
        if network.in_channels == 2 * network.out_channels + 1 and self.inpaint is None and not self.conditions:
            raise UserError(f"{base}: this UNet is made for inpainting; set models.diffusion.inpaint={{}} to continue it as such")
        if self.adapt is not None:
            with torch.device("meta"):
                shapes = network.build()
            self.adapt.suits(shapes)
        if self.distill is not None:
            self.distill.suits(network)
        usual = type(self.process)()
        for name in ("schedule", "target"):
            said, theirs = getattr(self.process, name), getattr(process, name)
            if said not in (getattr(usual, name), theirs):
                message = f"got {in_words(said)}, but the base model {base} has {in_words(theirs)}; leave it out"
                raise UserError(f"models.diffusion.process.{name}: {message}")
        own_offset = self.process.offset_noise
        offset = process.offset_noise if own_offset is None else own_offset
        defaults = self.defaults
        if defaults == Defaults():
            found = defaults_of(read_record(base), base)[0]
            defaults = found if self.distill is None else replace(self.distill.drawn(), chunk=found.chunk, precision=found.precision)
        process = replace(self.process, schedule=process.schedule, target=process.target, offset_noise=offset)
        variance = self.variance or variance_of(base)
        if variance is not None and self.distill is not None:
            raise UserError("models.diffusion.distill: a model that has learned a variance cannot be distilled; give one without by init")
        if variance is not None and variance_of(base) is None:
            raise UserError(f"models.diffusion.variance: the base model {base} has learned none; leave it out")
        return replace(self, network=network, process=process, defaults=defaults, variance=variance)

    def for_stage(self, stage: TrainingStage) -> Self:
        """With what the stage says of recomputing and of caption dropout."""
        found = self
        if stage.checkpointing is not None:
            found = replace(found, network=replace(found.network, checkpointing=stage.checkpointing))
        return found if stage.caption_dropout is None else replace(found, caption_dropout=stage.caption_dropout)

    def shards(self) -> bool:
        """The whole network, not what is learned beside it."""
        return self.adapt is None

    def identity(self) -> dict[str, Any]:
        """All but names, defaults of sampling, recomputing (which changes no bit), and what is switched off."""
        left_out = ("defaults", "text", "autoencoder", "after")
        found = {k: v for k, v in plain(self).items() if k not in left_out and (k, v) not in OFF}
        found["network"] = self.network.identity()
        if self.adapt is not None:
            found["adapt"] = self.adapt.identity()
        if found["process"]["offset_noise"] is None:
            del found["process"]["offset_noise"]
        return found

    def shown(self) -> dict[str, Any]:
        """How the finished model is sampled."""
        said = plain(self.defaults)
        return {"defaults": said if said["threshold"] else {name: value for name, value in said.items() if name != "threshold"}}

    def check(self, stage: TrainingStage, where: str, begins: str) -> Iterator[str]:
        """Inpainting and its channels, adapters and their base."""
        own = f"models.{stage.model}"
        network = self.network
        if not self.text:
            yield from self._wordless(stage, own, where)
        if self.variance is not None and (why := learned_variance.refusal(self.process)):
            yield f"{own}.variance: {why}"
        yield from conditions.problems(self.conditions, self.learn, begins, own, network)
        if self.inpaint is not None and conditions.joined_channels(conditions.assumed(self.conditions), network.out_channels):
            yield f"{own}.inpaint: cannot be had beside conditions that join the input channels (port concat); leave one of the two out"
        if self.distill is not None and self.conditions:
            yield f"{own}.distill: cannot be had beside conditions yet; leave one of the two out"
        if self.align is not None and not network.aligned_width:
            yield f"{own}.align: {network.class_names[0]} has no block for it; leave align out"
        if self.align is not None and (self.adapt or self.distill or self.learn == "new"):
            beside = "distill" if self.distill else "adapt" if self.adapt else "learn=new"
            yield f"{own}.align: cannot be had beside {beside}, where no inner state learns as a whole; leave one of the two out"
        if self.adapt is not None and self.conditions:
            yield f"{own}.adapt: cannot be had beside conditions yet; learn one after the other, or leave one of the two out"
        if self.inpaint is None and not self.conditions and network.in_channels == 2 * network.out_channels + 1:
            yield f"{own}.network: has {network.in_channels} input channels, as for inpainting; set {own}.inpaint={{}} too"
        if stage.latents and self.inpaint is not None:
            yield f"{where}.latents: {own}.inpaint hides parts of pictures, which cached latents do not have; leave latents out"
        if self.distill is not None:
            yield from self._distilled(stage, own, where, begins)
        if self.adapt is not None and not begins:
            yield f"{own}.adapt: there is no model to adapt; give one by init, or leave adapt out"
        elif self.adapt is not None and begins.startswith("stages."):
            yield f"{where}: {begins} has learned what {own}.adapt names; give that one more images"
        if self.adapt is not None:
            try:
                self.adapt.check()
            except UserError as error:
                yield f"{own}.adapt.{error}"

    def _wordless(self, stage: TrainingStage, own: str, where: str) -> Iterator[str]:
        """What is not to be had without a text encoder."""
        if self.network.kind != "unet":
            yield f"{own}.network.kind: got {self.network.kind}; without a text encoder (text empty) there is unet"
        idle: dict[str, Any] = {"conditions": self.conditions, "adapt": self.adapt, "distill": self.distill, "after": self.after}
        idle["align"] = self.align
        yield from (f"{own}.{name}: cannot be had without a text encoder yet; name one by text" for name, said in idle.items() if said)
        if self.caption_chunks > 1 or stage.caption_dropout is not None:
            name = f"{own}.caption_chunks" if self.caption_chunks > 1 else f"{where}.caption_dropout"
            yield f"{name}: has no effect without a text encoder; leave it out"

    def _distilled(self, stage: TrainingStage, own: str, where: str, begins: str) -> Iterator[str]:
        """What a distillation cannot have: no base, and what only learning from data reads."""
        assert self.distill is not None
        if not begins or begins.startswith("stages."):
            yield f"{own}.distill: there is no finished model to distill; give one by init, or leave distill out"
        if self.adapt is not None and (self.distill.told or not isinstance(self.adapt, LowRank)):
            yield f"{own}.distill: adapters are not told the guidance scale; give one scale twice, as guidance=[3, 3], and adapt.kind=lora"
        idle: dict[str, Any] = {"inpaint": self.inpaint, "masked_loss": self.masked_loss}
        usual = type(self.process)()
        idle |= {f"process.{name}": getattr(self.process, name) != getattr(usual, name) for name in ("weighting", "density")}
        yield from (f"{own}.{name}: has no effect with {own}.distill; leave it out" for name, said in idle.items() if said)
        if stage.caption_dropout:
            yield f"{where}.caption_dropout: {own}.distill drops no captions; leave it out"
        if stage.held_out:
            yield f"{where}.held_out: {own}.distill has no loss by noise level; leave it out"

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """The autoencoder's, times what the network cuts latents into."""
        return self.network.multiple * (others["autoencoder"].step_px({}) if "autoencoder" in others else 1)

    def usage(self, prompt: str, model: str) -> str:
        """A prompt, if it reads any."""
        return ModelConfig.usage(self, prompt if self.text else "", model)

    def example_of(self, caption: str) -> str:
        """A caption; of textual inversion with the new word."""
        return self.adapt.example_of(caption) if self.adapt else caption

    def counted(self, base: str, note: Callable[[str], None]) -> Self:
        """With the network of a base model, where its files are here, else Stable Diffusion 1's."""
        if not base:
            return self
        file = next(config_files(local_folder(base), *denoiser.FOLDERS), None)
        own: Any = self.network
        if file is None and own != own.continuing(type(own)()):  # it says what a base must have
            note(f"unet of {base}: its config.json is not here; counted as models.diffusion.network says")
            return self
        if file is None:
            note(f"unet of {base}: its config.json is not here; counted as Stable Diffusion 1's")
            return replace(self, network=replace(denoiser.DEFAULT, checkpointing=self.network.checkpointing))
        return replace(self, network=denoiser.continued(self.network, denoiser.config_of(read_json(file), str(file))))

    def oversized(self, others: Mapping[str, ModelConfig]) -> Iterator[str]:
        """Ranks of its adapters."""
        if self.adapt is None:
            return
        width = self.network.context_width
        text = others["text"].text_shape(lambda said: None, width) if self.text and self.adapt.text_learns else WORDLESS
        with torch.device("meta"):
            built = self.network.build()
        yield from (f"adapt.{line}" for line in self.adapt.oversized(built, text))

    def fitted(self, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> tuple[denoiser.Network, TextShape]:
        """The network as its autoencoder and its text encoder make it."""
        text = others["text"].text_shape(note, self.network.context_width) if self.text else WORDLESS
        channels = others["autoencoder"].latent_network(note).latent_width
        inputs = channels + conditions.joined_channels(conditions.assumed(self.conditions), channels)
        outputs = channels if self.variance is None else 2 * channels
        network = replace(self.network, in_channels=inputs, out_channels=outputs, context_width=text.states)
        network = network.told_pooled(text.pooled)
        for each in self.conditions:
            network = each.port.fitted(network, text.embedding)
        return network, text

    def text_width(self) -> int:
        """Width of the text states that its network expects."""
        return self.network.context_width

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the denoising network."""
        with torch.device("meta"):
            return cost.count(self.fitted(others, note)[0].build())

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """The denoising network, or what is adapted of it; text encoder and autoencoder are frozen."""
        network, text = self.fitted(others, note)
        latent = others["autoencoder"].latent_network(note)
        small = side // latent.factor
        if self.distill is not None:
            with torch.device("meta"):
                network = cast("denoiser.Network", self.distill.told_by(network.build()).config)
        learned, spent = cost.denoiser(network, small, small, text.tokens)
        known, encode, _ = cost.autoencoder(latent, side, side)
        extra = text.cost.forward + (0 if stage.latents else encode.forward)
        frozen = {"autoencoder": known} | ({"text encoder": text.parameters} if self.text else {})
        aligning = {}
        if self.align is not None:
            tower = others["text"].image_tower(side, note)
            with torch.device("meta"):
                seeing, picture = tower.build(), torch.empty(cost.IMAGES, 3, side, side)
                aligning = {"alignment": cost.count(projection(network.aligned_width, tower.width))}
                extra += cost.measure(seeing, lambda: seeing.seen(picture)[1]).forward
            frozen["image tower"] = cost.count(seeing)
        if self.distill is not None:  # guided, with and without the prompt, and the target
            frozen["distilled network"], extra = learned, extra + 3 * spent.forward
        if self.conditions:
            with torch.device("meta"):
                shape = conditions.Shape(latent.factor, latent.latent_width, text.embedding)
                networks, inside = conditions.count(self.conditions, network.build(), shape)
            spent = spent * (1 + networks / learned)  # as if their weights were used as often as the base's
            learns = {network.folder: learned, "conditions": networks} | aligning
            if self.learn == "all":
                return Footprint(learned=learns, frozen=frozen, cost=spent, extra=extra)
            spent, own = replace(spent, backward=spent.backward // 2), learned - inside
            return Footprint(
                learned={"conditions": networks + inside}, frozen={network.folder: own} | frozen, cost=spent, extra=extra, passed=own
            )
        if self.adapt is None:
            return Footprint(learned={network.folder: learned} | aligning, frozen=frozen, cost=spent, extra=extra)
        # Gradients of the base's weights are not made; where captions are learned, the text encoder's are.
        spent = replace(spent, backward=spent.backward // 2)
        if self.adapt.text_learns:
            spent = spent + replace(text.cost, backward=text.cost.backward // 2)
            extra -= text.cost.forward
        with torch.device("meta"):
            built = network.build().requires_grad_(False)
            frozen_layers = halvable(built) if self.adapt.halves else []
            halved, spared = sum(map(cost.count, frozen_layers)), 0
            if bits := self.adapt.bits:
                few = sum(layer.weight.numel() for layer in quantizable(frozen_layers))  # type: ignore[operator,union-attr,misc]
                halved, spared = halved - few, int(few * (4 - BYTES[bits]))  # float32 has 4 bytes
            learns, blocks = self.adapt.count(built, text), [cost.count(block) for block in built.recomputed()]
        passed = learned - sum(blocks) + max(blocks, default=0) if network.checkpointing else learned  # recomputed: a block at a time
        return Footprint(
            learned=learns,
            frozen={network.folder: learned} | frozen,
            cost=spent,
            extra=extra,
            halved=halved,
            spared=spared,
            passed=0 if halved or spared else passed,
        )

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """A diffusers pipeline folder with a model card; of a link of a chain the model before lies in it, in a folder of its own."""

        def beside(folder: Path) -> None:
            if AFTER in products and (config := products[AFTER].config) is not None:
                config.assemble(within(products), folder / BEFORE, story)
                config.lead_in(folder)

        text = products["text"].folder if self.text else None
        assemble(text, products["autoencoder"].folder, products["model"].folder, target, dict(story), beside)
