"""Text-to-image diffusion in the latents of a frozen autoencoder (Rombach 2022, arXiv 2112.10752)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import config
from ldm.data.dataset import offered
from ldm.data.views import ViewKind
from ldm.diffusion import learned_variance
from ldm.diffusion.batch import Cond, ImageBatch, LatentBatch, MomentBatch, Noised, Text, View, Views, sent, where
from ldm.diffusion.rng import Rng
from ldm.diffusion.thresholding import RATIO
from ldm.families.draws import DIRECT, OF_CODES, OF_GANS, OWN, GuideTraining, Running, SamplingCall, See, Settings, VideoEdit, Wanted
from ldm.families.family import Context, Family, Terms
from ldm.families.latent_diffusion import conditions
from ldm.families.latent_diffusion.alignment import Aligned
from ldm.families.latent_diffusion.classifier_guidance import Classifier, learn
from ldm.families.latent_diffusion.conditions import Read
from ldm.families.latent_diffusion.configuration import LatentDiffusionConfig
from ldm.families.latent_diffusion.distillation import SAMPLER, Consistency, errors
from ldm.families.latent_diffusion.edits import all_new, from_inverted, from_picture, wants_mask
from ldm.families.latent_diffusion.engine import Edit, Engine, choose, stay, warn, watching
from ldm.families.latent_diffusion.export import exported
from ldm.families.latent_diffusion.fine_tuning import MERGED, Adaptable
from ldm.families.latent_diffusion.folder import continued_network, defaults_of, fits, process_of, variance_of
from ldm.families.latent_diffusion.inpainting import channels, masks, told
from ldm.families.latent_diffusion.masked_loss import weigh
from ldm.families.latent_diffusion.offload import rest
from ldm.families.latent_diffusion.personalisation import adapted
from ldm.families.latent_diffusion.ports import learned_of
from ldm.families.latent_diffusion.prompt_schedule import MAX_CHUNKS
from ldm.families.latent_diffusion.prompt_to_prompt import Exchange
from ldm.families.latent_diffusion.runtime import ready
from ldm.families.latent_diffusion.video_editing import restyled
from ldm.families.prompted import Prompted
from ldm.formats.atomic import write_json
from ldm.formats.clip_folder import load_own_tower
from ldm.formats.denoiser_folder import load_denoiser, read_denoiser, unconditional
from ldm.formats.export_source import ExportedModel
from ldm.formats.latent_codec import AGREE, AUTOENCODERS, LatentCodec, alike, autoencoder_folder, full, load_codec, pixels
from ldm.formats.lora_keys import sgm_names
from ldm.formats.model_folder import RECORD, open_model, read_record
from ldm.formats.part import content_hash, save_part
from ldm.formats.single_file import open_single
from ldm.models import denoiser
from ldm.models.conditioned import Conditioned, base_of
from ldm.models.lora import LearnedEmbedding, Lora, Merged, halvable, own_state, weighted_modules
from ldm.models.quantized import Bits, quantizable, quantize, quantized_layers, same
from ldm.models.vision_tower import Tower
from ldm.text.encoder import TextEncoder
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.own_clip import OwnClip
from ldm.text.prompt_syntax import Prompt
from ldm.text.textual_inversion import teach
from ldm.text.weighted import chunks_of, encode_captions
from ldm.text.wordless import text_of


@config
class LatentDiffusion(LatentDiffusionConfig):
    """A network that denoises latents, told by the frozen text encoder what to draw."""

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
        self.changed = False  # whether any lie in other bits than their files have

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

    def halve(self, kind: torch.dtype, bits: Bits | None = None) -> None:
        """Put the denoising network's frozen weights, where they are only computed with, into a half type: previews compute in it, too.

        Args:
            bits: large ones are quantized to these instead.
        """
        frozen = halvable(self.denoiser) if self.anew else []
        if bits is not None:
            for layer in quantizable(frozen):
                quantize(layer, bits)
                self.changed = True
        for layer in frozen if kind != torch.float32 else ():
            self.computed, self.changed = "bf16" if kind == torch.bfloat16 else "fp16", True
            layer.to(kind)

    def base_denoiser(self) -> denoiser.Denoiser | None:
        """The denoising network as its files have it; None: its own weights are those, neither halved nor quantized.

        Raises:
            UserError: if the files are no longer those that training began with.
        """
        if not self.changed or self.anew is None:
            return None
        found = self.anew()
        own, quantized = own_state(self.denoiser), {name.replace(".base_layer", ""): one for name, one in quantized_layers(self.denoiser)}
        learned = {name for name, weight in self.denoiser.named_parameters() if weight.requires_grad}
        for name, value in found.state_dict().items():
            if (layer := quantized.get(name.removesuffix(".weight"))) is not None and name.endswith(".weight"):
                kept = same(layer, value)
            else:
                kept = name in learned or torch.equal(value.to(own[name].dtype), own[name].cpu())
            if not kept:
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
        """Another network between pixels and latents, on the model's scale or on its own: that which encodes more as the model's does."""
        own, other = self.codec, load_codec(autoencoder_folder(path if path.is_dir() else open_single(path, note=note)))
        shapes = [f"{one.channels} channels at 1/{one.factor} ({type(one.network).__name__})" for one in (own, other)]
        if shapes[0] != shapes[1]:
            raise UserError(f"vae: {path}: its latents have {shapes[1]}, the model's {shapes[0]}; give one that was made for this model")
        other.to(self.device)
        codec, agreement = alike(own, LatentCodec(other.network, own.statistics, other.hash).to(self.device), other)
        if agreement < AGREE:
            note(
                f"vae: {path} encodes a picture to other latents than the model's (they agree to {100 * max(0.0, agreement):.0f} %), "
                "and the model's scale stays: it may be made for another model"
            )
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

    def restyle(
        self,
        frames: Tensor,
        clip: VideoEdit,
        settings: Settings,
        note: Callable[[str], None],
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Frames drawn anew side by side: see `ldm.families.latent_diffusion.video_editing.restyled`."""
        return restyled(self.engine(note), frames, clip, settings, self.noise([clip.seed], (frames.shape[1], frames.shape[2])), on_step)

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
