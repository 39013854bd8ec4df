"""Text-to-image diffusion in the latents of a frozen autoencoder (Rombach 2022, arXiv 2112.10752)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, Positive, config, plain
from ldm.data.dataset import offered
from ldm.data.views import EMBEDDING, ViewKind, parted
from ldm.diffusion import learned_variance
from ldm.diffusion.batch import Cond, ImageBatch, LatentBatch, MomentBatch, Noised, Text, View, Views, sent, where
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.thresholding import RATIO
from ldm.families.chain import within
from ldm.families.draws import (
    AFTER,
    BEFORE,
    DIRECT,
    OF_CODES,
    OF_GANS,
    OWN,
    GuideTraining,
    Running,
    SamplingCall,
    See,
    Settings,
    VideoEdit,
    Wanted,
)
from ldm.families.family import Context, Family, Footprint, Found, ModelConfig, Product, Terms, TrainingStage, agree, in_words
from ldm.families.latent_diffusion import conditions
from ldm.families.latent_diffusion.alignment import Aligned, Alignment, projection
from ldm.families.latent_diffusion.classifier_guidance import Classifier, learn
from ldm.families.latent_diffusion.conditions import Condition, Read
from ldm.families.latent_diffusion.distillation import SAMPLER, Consistency, errors
from ldm.families.latent_diffusion.edits import all_new, from_inverted, from_picture, wants_mask
from ldm.families.latent_diffusion.engine import Defaults, Edit, Engine, choose, stay, warn, watching
from ldm.families.latent_diffusion.export import exported
from ldm.families.latent_diffusion.fine_tuning import KEPT, MERGED, Adaptable, LowRank
from ldm.families.latent_diffusion.folder import continued_network, defaults_of, fits, process_of, variance_of
from ldm.families.latent_diffusion.inpainting import Inpainting, channels, masks, told
from ldm.families.latent_diffusion.masked_loss import MaskedLoss, weigh
from ldm.families.latent_diffusion.offload import rest
from ldm.families.latent_diffusion.personalisation import Adapt, adapted
from ldm.families.latent_diffusion.ports import learned_of
from ldm.families.latent_diffusion.prompt_schedule import MAX_CHUNKS
from ldm.families.latent_diffusion.prompt_to_prompt import Exchange
from ldm.families.latent_diffusion.runtime import ready
from ldm.families.latent_diffusion.video_editing import restyled
from ldm.families.pretrained import PretrainedAutoencoder, PretrainedText, config_files, local_folder, model_folder
from ldm.families.prompted import Prompted
from ldm.formats.assembly import assemble
from ldm.formats.atomic import write_json
from ldm.formats.clip_folder import load_own_tower
from ldm.formats.denoiser_folder import denoiser_folder, load_denoiser, read_denoiser, unconditional
from ldm.formats.export_source import ExportedModel
from ldm.formats.integrity import check
from ldm.formats.latent_codec import AUTOENCODERS, LatentCodec, autoencoder_folder, full, load_codec, pixels
from ldm.formats.lora_keys import sgm_names
from ldm.formats.model_folder import RECORD, open_model, read_record
from ldm.formats.part import PARTS, content_hash, read_json, save_part
from ldm.formats.single_file import open_single
from ldm.models import cost, denoiser
from ldm.models.conditioned import Conditioned, base_of
from ldm.models.cost import TextShape
from ldm.models.lora import LearnedEmbedding, Lora, Merged, halvable, own_state, weighted_modules
from ldm.models.vision_tower import Tower
from ldm.text.encoder import TextEncoder
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.own_clip import OwnClip
from ldm.text.prompt_syntax import Prompt
from ldm.text.textual_inversion import teach
from ldm.text.weighted import chunks_of, encode_captions
from ldm.text.wordless import SHAPE as WORDLESS
from ldm.text.wordless import text_of

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
class LatentDiffusion(ModelConfig):
    """A network that denoises latents, told by the frozen text encoder what to draw."""

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

    @property
    def requires(self) -> Mapping[str, str]:
        """A text encoder, or where embeddings of pictures are told both sides of a CLIP; and an autoencoder."""
        embeds = any(parted(view)[0] == EMBEDDING for view in self.views())
        return {"text": "has_tower" if embeds else "encodes_text", "autoencoder": "encodes"}

    @property
    def reads_masks(self) -> bool:
        """Whether its loss is masked."""
        return self.masked_loss is not None

    def views(self) -> tuple[str, ...]:
        """Those of its conditions; to align with what is seen of them, the pictures."""
        own = tuple(each.view for each in self.conditions)
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

    def continued(self, base: Path) -> LatentDiffusion:
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

    def for_stage(self, stage: TrainingStage) -> LatentDiffusion:
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

    def counted(self, base: str, note: Callable[[str], None]) -> LatentDiffusion:
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
            halved = sum(map(cost.count, halvable(built))) if self.adapt.halves else 0
            learns, blocks = self.adapt.count(built, text), [cost.count(block) for block in built.recomputed()]
        passed = learned - sum(blocks) + max(blocks, default=0) if network.checkpointing else learned  # recomputed: a block at a time
        return Footprint(
            learned=learns,
            frozen={network.folder: learned} | frozen,
            cost=spent,
            extra=extra,
            halved=halved,
            passed=0 if halved else passed,
        )

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """A diffusers pipeline folder with a model card; of a link of a chain the model before lies in it, in a folder of its own."""

        def beside(folder: Path) -> None:
            if AFTER in products and (config := products[AFTER].config) is not None:
                config.assemble(within(products), folder / BEFORE, story)
                config.lead_in(folder)

        text = products["text"].folder if self.text else None
        assemble(text, products["autoencoder"].folder, products["model"].folder, target, dict(story), beside)

    @classmethod
    def open(cls, folder: Path, device: str | torch.device, low_memory: bool = False) -> LatentDiffusionFamily:
        """A finished text-to-image model."""
        return load(folder, device, low_memory)

    def build(self, context: Context) -> Family:
        """The family, ready to train, on the earlier products; an earlier stage's network is continued."""
        text = text_of(context.products["text"].folder if self.text else None)
        codec = load_codec(autoencoder_folder(context.products["autoencoder"].folder))
        reads = conditions.kinds_for(self.conditions, offered(context.data, self.views()), "models.diffusion")
        network = replace(
            self.network,
            in_channels=(channels(codec) if self.inpaint else codec.channels) + conditions.joined_channels(reads, codec.channels),
            out_channels=codec.channels if self.variance is None else 2 * codec.channels,
            context_width=text.width,
        ).told_pooled(text.pooled_width)
        clip = conditions.clip_of(reads, context.products["text"].folder) if self.text else None
        beside = conditions.beside(codec, clip)
        for read in reads:
            network = read.condition.port.fitted(network, beside.embedding)
        if context.init is None:
            built = conditions.conditioned(network.build(), reads, beside)
        else:
            built = continued_network(context.init, network, codec, reads, beside)
        if self.learn == "new":
            base_of(built).requires_grad_(False)
            for weight in learned_of(base_of(built), (read.condition.port for read in reads)):
                weight.requires_grad_(True)
        teacher = None
        if self.distill is not None:
            teacher = copy.deepcopy(built).requires_grad_(False).eval()
            built = self.distill.told_by(built)
            network = cast("denoiser.Network", built.config)
        family = LatentDiffusionFamily(replace(self, network=network), built, codec, text, reads, teacher, clip)
        if self.align is not None:
            family.alignment = Aligned(built, Tower(*load_own_tower(context.products["text"].folder)))
        family.resolution = context.resolution
        if self.adapt is None:
            return family
        if (init := context.init) is not None:
            family.anew = lambda: continued_network(init, network, codec, (), beside)
        return adapted(self.adapt, family, context)


class LatentDiffusionFamily(Adaptable, Prompted):
    """A denoising network with its process, autoencoder and text encoder: it learns by `loss` and draws by `sample`."""

    shardable = True
    kind = "latent_diffusion"
    able = LatentDiffusion.answers
    redraws = True

    def __init__(
        self,
        config: LatentDiffusion,
        network: denoiser.Denoiser,
        codec: LatentCodec,
        text: TextEncoder,
        reads: tuple[Read, ...] = (),
        teacher: denoiser.Denoiser | None = None,
        clip: OwnClip | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.reads = reads  # its conditions
        self.denoiser = network
        self._frozen = (codec, text.model)  # a tuple, so that they stay out of the module tree
        self._teacher: tuple[denoiser.Denoiser, ...] = () if teacher is None else (teacher,)  # whose guided steps are distilled
        self.noised = teacher is None
        self.reader, self.clip, self.reads_prompts = text, clip, network.config.context_width > 0
        self.process = config.process
        self.resolution = 0
        self.content_hash = ""
        self.turn: Callable[[nn.Module], None] = stay
        self.text_learns = False
        self.alignment: Aligned | None = None  # in training, with what sees the clean pictures
        self.anew: Callable[[], denoiser.Denoiser] | None = None  # reads the denoising network's files again
        self.computed: Literal["", "bf16", "fp16"] = ""  # what its frozen weights lie in; empty: float32

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        return self._frozen[0]

    @property
    def base(self) -> denoiser.Denoiser:
        """The denoising network without the networks of its conditions."""
        return base_of(self.denoiser)

    @property
    def told(self) -> dict[str, ViewKind]:
        """The views that it reads, by name."""
        return {read.view: read.kind for read in self.reads}

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of it, px: of the latents' pixels, and of the network's patches."""
        return self.codec.factor * self.denoiser.config.multiple

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px, steps, guidance, rescale, precision, sampler, chunk."""
        d = self.config.defaults
        size = (self.resolution, self.resolution)
        return {
            "size": size,
            "steps": d.steps,
            "guidance": d.guidance if self.reads_prompts else 1.0,
            "rescale": d.rescale,
            "precision": d.precision,
            "sampler": d.sampler,
            "chunk": d.chunk,
            **({"threshold": d.threshold} if d.threshold else {}),
        }

    def frozen(self) -> list[nn.Module]:
        """The autoencoder, the text encoder, the network that is distilled, and what sees or embeds pictures."""
        seeing = [*(self.clip.networks() if self.clip else ()), *([self.alignment.tower] if self.alignment else ())]
        return [*self._frozen, *self._teacher, *seeing]

    # Training

    def compilable(self) -> list[nn.Module]:
        """The denoising network."""
        return [self.denoiser]

    def encode(self, batch: ImageBatch | MomentBatch, rng: Rng) -> LatentBatch:
        """Latents drawn from the posterior, and the captions encoded."""
        with torch.no_grad():
            mean, std = (batch.mean, batch.std) if isinstance(batch, MomentBatch) else self.codec.moments(batch.image)
        x0 = full(mean)
        if std is not None:
            x0 = x0 + full(std) * sent(rng.normal("posterior", mean.shape[1:]), x0.device).to(x0)
        whole = self.text_learns or self.config.caption_chunks > 1  # states that are kept are one chunk's
        kept = batch.text if isinstance(batch, MomentBatch) and not whole else None
        text = self._told(list(batch.caption)) if kept is None else kept
        return LatentBatch(x0=x0, cond=Cond(text=text, size=batch.size.to(x0.device)), position=batch.position)

    def _given(self, batch: ImageBatch | MomentBatch, latents: LatentBatch, rng: Rng | None) -> LatentBatch:
        """Latents with the batch's views among what the network is told; `rng` draws which samples are not told which."""
        if not self.reads:
            return latents
        height, width = latents.x0.shape[2:]
        given = conditions.told(self.reads, batch.views, self._views_by, (height, width), rng)
        return replace(latents, cond=replace(latents.cond, given=given))

    @property
    def _views_by(self) -> conditions.Frozen:
        return conditions.Frozen(self.codec, self.text, self.process, self.clip)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Weighted squared error of the network's prediction, mean over latent values."""
        latents = self.encode(batch, rng)
        if self.config.distill is not None:
            return self._distilled(self.config.distill, latents, rng)
        if self.config.caption_dropout:
            drop = sent(rng.uniform("caption_dropout") < self.config.caption_dropout, latents.x0.device)
            latents = replace(latents, cond=where(drop, self._without_caption(latents.cond), latents.cond))
        latents = self._given(batch, latents, rng)
        noised = self.process.noise(latents.x0, rng)
        error, bound = self._error(batch, latents, noised, rng)
        terms, gauges = {"denoising": (noised.weight * error).mean()}, {"error": error.detach().mean(), "latent_std": latents.x0.std()}
        if self.alignment is not None and self.config.align is not None:
            terms["alignment"] = self.config.align.weight * self.alignment(batch.views, (latents.x0.shape[2], latents.x0.shape[3]))
        if self.config.variance is not None:
            terms["variance"] = learned_variance.bits(self.process, self.config.variance.weight) * bound.mean()
        return terms, gauges

    def _distilled(self, asked: Consistency, latents: LatentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """The distance of the network's answers one noise level apart."""
        unprompted = self._without_caption(latents.cond)
        found = errors(asked, self.denoiser, self._teacher[0], self.process, latents, unprompted, rng).mean()
        return {"consistency": found}, {"latent_std": latents.x0.std()}

    def _error(self, batch: ImageBatch | MomentBatch, latents: LatentBatch, noised: Noised, rng: Rng) -> tuple[Tensor, Tensor]:
        """Squared error (B,) of the network's prediction, mean over latent values; and of a learned variance the bound (B,), in nats."""
        cond = latents.cond
        if self.config.inpaint is not None:
            assert isinstance(batch, ImageBatch), "ldm.runs.run refuses cached latents"
            mask = masks(self.config.inpaint, rng, (batch.image.shape[2], batch.image.shape[3]))
            cond = replace(cond, image=told(self.codec, batch.image, mask).to(latents.x0))
        output = full(self.denoiser(noised.x, noised.t, cond))
        bound = output.new_zeros(len(output))
        if self.config.variance is not None:
            output, said = output.chunk(2, dim=1)
            x0, share = self.process.x0_from(output, noised.x, noised.t), learned_variance.share_of(said)
            half_bin = None if self.codec.bound is None else self.codec.bound / 255
            bound = learned_variance.variational(self.process, latents.x0, x0, noised.t, share, half_bin)
        squares = (output - noised.target).square()
        return (squares if self.config.masked_loss is None else weigh(self.config.masked_loss, batch, squares)).mean((1, 2, 3)), bound

    def loss_at(self, batch: ImageBatch | MomentBatch, rng: Rng, level: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted squared error (B,) of captioned samples, and sigma (B,)."""
        latents = self._given(batch, self.encode(batch, rng), None)
        noised = self.process.noise_at(latents.x0, self.process.schedule.draw(level), rng)
        return noised.weight * self._error(batch, latents, noised, rng)[0], self.process.alpha_sigma(noised.t)[1]

    def known(self, batch: ImageBatch | MomentBatch) -> MomentBatch | None:
        """Moments of latents, but where a loss needs the picture."""
        if self.config.inpaint is not None or batch.mask is not None or isinstance(batch, MomentBatch):
            return None
        mean, std = self.codec.moments(batch.image)
        return MomentBatch(mean=mean, std=std, caption=batch.caption, size=batch.size, position=batch.position, views=batch.views)

    def _told(self, captions: list[str]) -> Text:
        if self.config.caption_chunks > 1:
            return encode_captions(self.text, captions, self.config.caption_chunks, self.text_learns)
        return self.text.learn(captions) if self.text_learns else self.text.encode(captions)

    def _without_caption(self, cond: Cond) -> Cond:
        assert cond.text is not None
        batch = len(cond.text.tokens)
        empty = self.text.unprompted(self._told([""]))
        text = replace(
            empty,
            tokens=empty.tokens.expand(batch, -1, -1),
            mask=empty.mask.expand(batch, -1),
            pooled=None if empty.pooled is None else empty.pooled.expand(batch, -1),
        )
        return replace(cond, text=text)

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text encoder reads."""
        if not self.reads_prompts:
            return None
        return cut_captions(captions, lambda: self.text.tokenizer, self.text.room * self.config.caption_chunks)

    preview_by_sample = True

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """One picture for each of the batch's captions, with the default settings."""
        captions = list(batch.caption)
        d = self.defaults
        wanted = Wanted(steps=min(d["steps"], 20), guidance=d["guidance"], sampler=d["sampler"], precision=self.computed)
        size = (self.resolution, self.resolution)
        views = {name: view for name, view in (batch.views or {}).items() if name in self.told}
        edits = self.tell(views, {}, size) if views else ()
        images = self.sample(captions, list(range(seed, seed + len(captions))), wanted, size=size, edits=edits)
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def save(self, folder: Path) -> None:
        """The denoising network in diffusers' layout and ldm.json, which remembers the autoencoder."""
        said = conditions.save(self.reads, self.denoiser, folder, self.process) if isinstance(self.denoiser, Conditioned) else {}
        self.save_denoiser(dict((self.base_denoiser() or self.base).state_dict()), folder, **said)

    def save_denoiser(self, state: dict[str, Tensor], folder: Path, **said: Any) -> None:
        """The same with other weights of the denoising network; ldm.json remembers what is `said` besides."""
        save_part(self.config.network.to_diffusers(), state, folder / self.config.network.folder)
        write_json(folder / RECORD, {"autoencoder": self.codec.hash, **self.describe(), **said})

    def halve(self, kind: torch.dtype) -> None:
        """Put the denoising network's frozen weights, where they are only computed with, into a half type: previews compute in it, too."""
        for layer in halvable(self.denoiser) if self.anew else ():
            self.computed = "bf16" if kind == torch.bfloat16 else "fp16"
            layer.to(kind)

    def base_denoiser(self) -> denoiser.Denoiser | None:
        """The denoising network as its files have it; None: nothing has been halved, so its own weights are those.

        Raises:
            UserError: if the files are no longer those that training began with.
        """
        if not self.computed or self.anew is None:
            return None
        found = self.anew()
        own = own_state(self.denoiser)
        learned = {name for name, weight in self.denoiser.named_parameters() if weight.requires_grad}
        for name, value in found.state_dict().items():
            if name not in learned and not torch.equal(value.to(own[name].dtype), own[name].cpu()):
                raise UserError(f"init: {name} of the base model has changed since the training began; put its files back, and start again")
        return found

    def exported(self, root: Path, path: Path) -> ExportedModel:
        """Its networks and records, as files are written from."""
        return exported(self, root, path)

    def describe(self) -> dict[str, Any]:
        """What a model folder must say besides the networks' own configurations."""
        offset = {"offset_noise": self.process.offset_noise} if self.process.offset_noise else {}
        scheduler = self.process.scheduler_config(distilled=self.config.distill is not None)
        scheduler |= pixel_scheduling(self.config, self.codec.bound)
        return {"defaults": {**self.defaults}, "scheduler": scheduler, **offset}

    # Sampling

    def take_autoencoder(self, path: Path, note: Callable[[str], None]) -> str:
        """Another network between pixels and latents, whose statistics stay the model's, which its network was trained on."""
        own, other = self.codec, load_codec(autoencoder_folder(path if path.is_dir() else open_single(path, note=note)))
        shapes = [f"{one.channels} channels at 1/{one.factor} ({type(one.network).__name__})" for one in (own, other)]
        if shapes[0] != shapes[1]:
            raise UserError(f"vae: {path}: its latents have {shapes[1]}, the model's {shapes[0]}; give one that was made for this model")
        if not torch.allclose(own.std, other.std.to(own.std), rtol=0.05) or not torch.allclose(
            own.mean, other.mean.to(own.mean), atol=0.05
        ):
            note(f"vae: {path} says another scale of its latents than the model's, which stays: it may be made for another model")
        codec = LatentCodec(other.network, own.statistics, other.hash).to(self.device)
        self._frozen = (codec, self._frozen[1])
        return other.hash

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1]."""
        return self.codec.reconstruct(image)

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The numbers of a sampling call, the model's defaults where none are asked for."""
        own = self.config.defaults if self.reads_prompts else replace(self.config.defaults, guidance=1.0)
        chosen, network = choose(own, wanted), self.config.network
        if not self.reads_prompts and chosen.guidance != 1:
            self.refuse(f"guidance: got {chosen.guidance:g}", "reads no prompt that could guide; leave it out")
        told = next((name for name in ("original_size", "crop", "target_size") if getattr(chosen, name)), "")
        if told and not network.reads_size:
            self.refuse(f"{told}: got {getattr(chosen, told)}", "has a network that is told no sizes; leave it out")
        for names, why in ((OF_CODES, "draws no codes"), (OF_GANS, "is no GAN")):
            if other := next((name for name in names if getattr(chosen, name) != getattr(DIRECT, name)), ""):
                self.refuse(f"{other}: got {getattr(chosen, other)}", f"{why}; leave it out")
        self.text.check_skip(chosen.clip_skip)
        if network.reads_guidance:
            usual = choose(self.config.defaults)
            for name in ("guidance_from", "guidance_to", "guidance_curve", "rescale"):
                if getattr(chosen, name) != getattr(usual, name):
                    self.refuse(f"{name}: got {getattr(chosen, name)}", "is told one guidance scale for all steps; leave it out")
        for name in ("link_steps", "stop_after"):
            if value := getattr(chosen, name):
                self.refuse(f"{name}: got {value}", "is no chain of models; leave it out")
        if self.codec.bound is not None:
            return replace(chosen, threshold=chosen.threshold or "static")
        if chosen.threshold not in ("", "none"):
            self.refuse(f"threshold: got {chosen.threshold}", "draws in latents, which have no range; leave it out")
        return replace(chosen, threshold="")

    @torch.no_grad()
    def draw(self, call: SamplingCall) -> Tensor:
        """One picture for each (prompt, seed), uint8 (N,H,W,3).

        The networks always see `defaults["chunk"]` images, padded where fewer are asked for, so how many are asked for in
        one call does not change a bit.

        Raises:
            UserError: on an unknown sampler or a size that is not a multiple of `factor`.
        """
        edits = (*([all_new(self.codec, call.size)] if wants_mask(self.denoiser, self.codec) else ()), *call.edits)
        chosen, engine = self.settings(call.settings), self.engine(call.note or warn)
        if unheard := self.text.unheard_skip(chosen.clip_skip):
            engine.note(unheard)
        if self.config.network.reads_guidance:
            if str(call.negative):
                engine.note("negative: this model is told the guidance scale, and draws without a negative prompt; it changes nothing")
            if chosen.sampler != SAMPLER:
                engine.note(f"sampler: this model is made for {SAMPLER}; {chosen.sampler} takes its answers for a denoiser's")
        return engine.draw(
            call.prompts, call.seeds, chosen, call.size, negative=call.negative, latents=call.latents, edits=edits, on_step=call.on_step
        )[0]

    @torch.no_grad()
    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Edit, ...]:
        """Image-to-image and inpainting: see `ldm.families.latent_diffusion.edits.from_picture`."""
        return from_picture(self.denoiser, self.codec, image, mask, strength)

    @torch.no_grad()
    def tell(self, given: Views, strength: Mapping[str, float], size: tuple[int, int]) -> tuple[Edit, ...]:
        """Views: see `ldm.families.latent_diffusion.conditions.tell`."""
        latents = (size[0] // self.codec.factor, size[1] // self.codec.factor)
        return (conditions.tell(self.reads, given, strength, self._views_by, latents),)

    def unheard(self, name: str, view: View) -> Iterator[str]:
        """As `Draws.unheard`: what its port leaves out, and words that the text encoder cuts or never met."""
        yield from next(read for read in self.reads if read.view == name).condition.port.left_out(view)
        for text in dict.fromkeys(conditions.texts(view)):
            if len(self.text.words(text)) > self.text.room:
                yield f"{text[:40]!r}... is longer than the model's {self.text.max_tokens} tokens; the rest is left out"
            for word in self.text.unknown(text):
                yield f"{word}: no text that the text encoder learned from had such a word"

    @torch.no_grad()
    def inverted(self, image: Tensor, source: Prompt, settings: Settings, strength: float) -> tuple[Edit, ...]:
        """DDIM inversion: see `ldm.families.latent_diffusion.edits.from_inverted`."""
        return (from_inverted(self.engine(), image, source, settings, strength),)

    def exchanged(self, source: Prompt, cross: float, inward: float) -> tuple[Edit, ...]:
        """Prompt-to-prompt: see `ldm.families.latent_diffusion.prompt_to_prompt.Exchange`."""
        return (Edit(exchange=Exchange(source, cross, inward)),)

    def noise(self, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """The noise (N,c,h,w) that pictures begin with."""
        return Rng(0, list(seeds)).normal("init", (self.codec.channels, size[0] // self.codec.factor, size[1] // self.codec.factor))

    def watch(self, see: See) -> tuple[Edit, ...]:
        """Tell `see` of the estimated x0 (B,c,h,w) of a chunk at every step."""
        return (watching(see),)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Tensor:
        """Images (B,3,H,W) of latents (B,c,h,w)."""
        return self.codec.decode(x0.to(self.device)).float()

    def guide(self, file: Path) -> Classifier:
        """The classifier of noisy latents in a file."""
        return Classifier.load(file, self.codec.hash, self.process, self.device)

    def restyle(self, frames: Tensor, clip: VideoEdit, settings: Settings, note: Callable[[str], None]) -> Tensor:
        """Frames drawn anew side by side: see `ldm.families.latent_diffusion.video_editing.restyled`."""
        return restyled(self.engine(note), frames, clip, settings, self.noise([clip.seed], (frames.shape[1], frames.shape[2])))

    def adapt(self, loras: Sequence[tuple[Lora, float]], words: Sequence[LearnedEmbedding]) -> None:
        """Merge LoRAs into the UNet and the text encoder, and teach that new words."""
        for word in (*words, *(word for lora, _ in loras for word in lora.words)):
            if not self.reads_prompts:
                self.refuse("embedding", "reads no words; leave it out")
            teach(self.text, word)
        if loras:
            names = sgm_names(self.base.config, weighted_modules(self.base))
            Merged(self.networks, loras, names)
        self.text.forget()

    def overlong(self, prompt: Prompt) -> str:
        """How a prompt is read that is longer than the text encoder reads at once; empty: it is not."""
        chunks = 1 if not self.reads_prompts else max(len(chunks_of(self.text, pieces)) for pieces in prompt.at(0, 1))
        if chunks == 1:
            return ""
        how = f"in {chunks} chunks" if chunks <= MAX_CHUNKS else f"in {MAX_CHUNKS} chunks, and the rest is left out"
        return f"is longer than the model's {self.text.max_tokens} tokens; it is read {how}"

    def ready(self, folder: Path, running: Running, precision: str) -> None:
        """Prepare the networks for inference: see `ldm.families.latent_diffusion.runtime.ready`."""
        ready(self, folder, running, precision)

    def learn_guide(self, cache: Path, training: GuideTraining, on_images: Callable[[int, float], None]) -> Classifier:
        """A classifier of noisy latents: see `ldm.families.latent_diffusion.classifier_guidance.learn`."""
        return learn(cache, self.codec, self.process, training, self.device, on_images)

    def engine(self, note: Callable[[str], None] = warn) -> Engine:
        """What draws."""
        return Engine(self.denoiser, self.process, self.codec, self.text, self.config.defaults.chunk, note, self.turn)


def load(folder: str | Path, device: str | torch.device = "cpu", low_memory: bool = False) -> LatentDiffusionFamily:
    """A finished text-to-image model: a diffusers folder of ours or of a Stable Diffusion, or a run folder with one in model/.

    With `low_memory` every part is emptied as soon as it is found whole; `ready` makes them take turns.

    Raises:
        UserError: naming what is missing, damaged or does not belong together.
    """
    root = open_model(Path(folder)).folder
    with ThreadPoolExecutor(1) as beside:  # hashing takes as long as reading
        whole = beside.submit(content_hash, root)
        family = _load(root, device, low_memory)
        family.content_hash = whole.result()
    return family


def _load(root: Path, device: str | torch.device, low_memory: bool) -> LatentDiffusionFamily:
    record = read_record(root)
    wordless = unconditional(root)
    codec = pixels() if wordless and not any((root / name).is_dir() for name in AUTOENCODERS) else load_codec(autoencoder_folder(root))
    if record.get("autoencoder") not in (None, codec.hash):
        raise UserError(f"{root}: its autoencoder is not the one its UNet was trained with; put that one back")
    text = text_of(None if wordless else root)
    if low_memory:
        rest(codec.network)
        rest(text.model)
    config = read_denoiser(root)
    base, stored = load_denoiser(root, config)
    reads = conditions.reads_of(record, root / RECORD)
    clip = conditions.clip_of(reads, root)
    network = conditions.conditioned(base, reads, conditions.beside(codec, clip), record, root)
    process = process_of(root)
    defaults, size = defaults_of(record, root)
    fits(config, text, root)
    if wordless and config.in_channels not in (codec.channels, channels(codec)):
        why = f"its network reads {config.in_channels} channels, and pictures have {codec.channels}"
        raise UserError(f"{root}: {why}; give a model of coloured pictures")
    said = tuple(read.condition for read in reads)
    reader = "" if wordless else "text"
    made = LatentDiffusion(text=reader, network=config, process=process, defaults=defaults, conditions=said, variance=variance_of(root))
    family = LatentDiffusionFamily(made, network, codec, text, reads, clip=clip)
    sample_size = stored.get("sample_size") or 64
    family.resolution = size or sample_size * codec.factor
    family.merged = frozenset(str(record.get(MERGED, "")).split())
    if low_memory:
        rest(network)
    for module in (family, *family.frozen()):
        module.to(device)
    return family.eval()


def pixel_scheduling(config: LatentDiffusion, bound: float | None) -> dict[str, Any]:
    """What scheduler_config.json of a model in pixels says more, as IFPipeline reads it; of one in latents nothing."""
    if bound is None or config.distill is not None or learned_variance.flows(config.process):
        return {"variance_type": "learned_range"} if config.variance else {}
    how = config.defaults.threshold or "static"
    return {
        "_class_name": "DDPMScheduler",
        "variance_type": "learned_range" if config.variance else "fixed_small",
        "clip_sample": how == "static",
        "clip_sample_range": bound,
        "thresholding": how == "dynamic",
        "dynamic_thresholding_ratio": RATIO,
        "sample_max_value": 1000.0,  # above it diffusers would cut; Imagen does not
    }
