"""Text-to-image diffusion in the latents of a frozen autoencoder (Rombach 2022, arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, NonNegative, Positive, config
from ldm.diffusion.batch import Cond, ImageBatch, LatentBatch, MomentBatch, Text, where
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import SAMPLERS
from ldm.families.family import Context, Family, Product, Terms
from ldm.families.latent_diffusion.edits import all_new, from_picture, wants_mask
from ldm.families.latent_diffusion.engine import Edit, Engine, Settings, choose, stay, warn
from ldm.families.latent_diffusion.fine_tuning import Adapt, Adaptable, adapted
from ldm.families.latent_diffusion.inpainting import Inpainting, channels, masks, told, widened
from ldm.formats.atomic import write_json
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder, full, load_codec
from ldm.formats.model_folder import RECORD, read_record
from ldm.formats.part import load_module, load_part, save_part
from ldm.models.unet import UNet, UNetConfig
from ldm.text.encoder import TextEncoder
from ldm.text.prompt_syntax import Prompt


@config
class Defaults:
    """How the finished model is sampled unless it is told otherwise."""

    steps: Positive = 30  # denoising steps
    guidance: NonNegative = 5.0  # classifier-free guidance scale; 1: none
    rescale: Fraction = 0.0  # guidance rescale (Lin 2023, arXiv 2305.08891, eq. 16)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of matrix products and convolutions, by autocast
    sampler: str = "dpmpp_2m"  # a name of ldm.diffusion.samplers.SAMPLERS
    chunk: Positive = 8  # images per network call; a part of the model's numerics, so that batch size is not

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise UserError(f"sampler: got {self.sampler!r}; choose one of {', '.join(SAMPLERS)}")


@config
class LatentDiffusion:
    """A cross-attention UNet that denoises latents, told by the frozen text encoder what to draw."""

    kind: Literal["latent_diffusion"] = "latent_diffusion"
    network: UNetConfig = UNetConfig()  # in_channels, out_channels and context_width follow the autoencoder and the text encoder
    process: Process = Process()  # how data becomes noise, and what the network predicts
    caption_dropout: Fraction = 0.1  # share of captions replaced by the empty prompt, for guidance
    defaults: Defaults = Defaults()  # how the finished model is sampled
    inpaint: Inpainting | None = None  # learn to paint into pictures, told a mask and what is known; null: to draw from prompts alone
    adapt: Adapt | None = None  # what alone learns of the model given by init; null: all weights of the UNet

    def inputs(self) -> tuple[str, ...]:
        """The families whose products this one reads."""
        return ("text", "autoencoder")

    def build(self, context: Context) -> Family:
        """The family, ready to train, on the earlier products; an earlier stage's UNet is continued."""
        text = TextEncoder.load(context.products["text"].folder)
        codec = load_codec(autoencoder_folder(context.products["autoencoder"].folder))
        network = replace(
            self.network,
            in_channels=channels(codec) if self.inpaint else codec.channels,
            out_channels=codec.channels,
            context_width=text.width,
        )
        if context.init is None:
            unet = network.build()
        else:
            unet = _continue(context.init, network, codec)
        family = LatentDiffusionFamily(replace(self, network=network), unet, codec, text)
        family.resolution = context.resolution
        if self.adapt is None:
            return family
        return adapted(self.adapt, family, context)


def _continue(init: Product, network: UNetConfig, codec: LatentCodec) -> UNet:
    stored, state = load_part(init.folder / "unet")
    record = read_record(init.folder)
    if record.get("autoencoder") not in (None, codec.hash):
        raise UserError(
            f"{init.folder}: this UNet was trained on the latents of another autoencoder "
            f"({record['autoencoder'][:12]}, not {codec.hash[:12]}); train it anew or bring that autoencoder"
        )
    theirs = UNetConfig.from_diffusers(stored)
    if theirs.in_channels == channels(codec) != network.in_channels:
        raise UserError(f"{init.folder}: this UNet is made for inpainting; set diffusion.inpaint={{}} to continue it as such")
    wide = network.in_channels == channels(codec) != theirs.in_channels
    like = replace(network, in_channels=codec.channels) if wide else network
    if theirs.to_diffusers() != like.to_diffusers():
        raise UserError(f"{init.folder}: the UNet to continue has another shape than diffusion.network; make them equal")
    unet: UNet = load_module(like.build, state, init.folder / "unet")
    return widened(unet, network) if wide else unet


class LatentDiffusionFamily(Adaptable):
    """A UNet with its process, autoencoder and text encoder: it learns by `loss` and draws by `sample`."""

    shardable = True

    def __init__(self, config: LatentDiffusion, unet: UNet, codec: LatentCodec, text: TextEncoder) -> None:
        super().__init__()
        self.config = config
        self.denoiser = unet
        self._frozen = (codec, text.model)  # a tuple, so that they stay out of the module tree
        self.text = text
        self.process = config.process
        self.resolution = 0
        self.content_hash = ""
        self.turn: Callable[[nn.Module], None] = stay
        self.text_learns = False

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        return self._frozen[0]

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel."""
        return self.codec.factor

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px, steps, guidance, rescale, precision, sampler, chunk."""
        d = self.config.defaults
        size = (self.resolution, self.resolution)
        return {
            "size": size,
            "steps": d.steps,
            "guidance": d.guidance,
            "rescale": d.rescale,
            "precision": d.precision,
            "sampler": d.sampler,
            "chunk": d.chunk,
        }

    def frozen(self) -> list[nn.Module]:
        """The autoencoder and the text encoder."""
        return list(self._frozen)

    # Training

    def compilable(self) -> list[nn.Module]:
        """The UNet."""
        return [self.denoiser]

    def encode(self, batch: ImageBatch | MomentBatch, rng: Rng) -> LatentBatch:
        """Latents drawn from the posterior, and the captions encoded."""
        with torch.no_grad():
            mean, std = (batch.mean, batch.std) if isinstance(batch, MomentBatch) else self.codec.moments(batch.image)
        x0 = full(mean)
        if std is not None:
            x0 = x0 + full(std) * rng.normal("posterior", mean.shape[1:]).to(x0)
        kept = batch.text if isinstance(batch, MomentBatch) and not self.text_learns else None
        text = self._told(list(batch.caption)) if kept is None else kept
        return LatentBatch(x0=x0, cond=Cond(text=text, size=batch.size.to(x0.device)), position=batch.position)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Weighted squared error of the network's prediction, mean over latent values."""
        latents = self.encode(batch, rng)
        cond = latents.cond
        if self.config.caption_dropout:
            drop = (rng.uniform("caption_dropout") < self.config.caption_dropout).to(latents.x0.device)
            cond = where(drop, self._without_caption(cond), cond)
        if self.config.inpaint is not None:
            assert isinstance(batch, ImageBatch), "ldm.runs.run refuses cached latents"
            mask = masks(self.config.inpaint, rng, (batch.image.shape[2], batch.image.shape[3]))
            cond = replace(cond, image=told(self.codec, batch.image, mask).to(latents.x0))
        noised = self.process.noise(latents.x0, rng)
        output = full(self.denoiser(noised.x, noised.t, cond))
        error = (output - noised.target).square().mean((1, 2, 3))  # (B,)
        gauges = {"error": error.detach().mean(), "latent_std": latents.x0.std()}
        return {"denoising": (noised.weight * error).mean()}, gauges

    def _told(self, captions: list[str]) -> Text:
        return self.text.learn(captions) if self.text_learns else self.text.encode(captions)

    def _without_caption(self, cond: Cond) -> Cond:
        assert cond.text is not None
        batch = len(cond.text.tokens)
        empty = self._told([""])
        text = replace(
            empty,
            tokens=empty.tokens.expand(batch, -1, -1),
            mask=empty.mask.expand(batch, -1),
            pooled=None if empty.pooled is None else empty.pooled.expand(batch, -1),
        )
        return replace(cond, text=text)

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """One picture for each of the batch's captions, with the default settings."""
        captions = list(batch.caption)
        d = self.defaults
        images = self.sample(
            captions,
            list(range(seed, seed + len(captions))),
            steps=min(d["steps"], 20),
            guidance=d["guidance"],
            sampler=d["sampler"],
            size=(self.resolution, self.resolution),
        )
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def save(self, folder: Path) -> None:
        """unet/ in diffusers' layout and ldm.json, which remembers the autoencoder."""
        self.save_denoiser(dict(self.denoiser.state_dict()), folder)

    def save_denoiser(self, state: dict[str, Tensor], folder: Path, **said: str) -> None:
        """The same with other weights of the denoising network; ldm.json remembers what is `said` besides."""
        save_part(self.config.network.to_diffusers(), state, folder / "unet")
        write_json(folder / RECORD, {"autoencoder": self.codec.hash, **self.describe(), **said})

    def describe(self) -> dict[str, Any]:
        """What a model folder must say besides the networks' own configurations."""
        offset = {"offset_noise": self.process.offset_noise} if self.process.offset_noise else {}
        return {"defaults": {**self.defaults}, "scheduler": self.process.scheduler_config(), **offset}

    # Sampling

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1]."""
        return self.codec.reconstruct(image)

    def settings(self, **wanted: Any) -> Settings:
        """The numbers of a sampling call, by the names of `Settings`; the model's defaults where none are given."""
        return choose(self.config.defaults, **wanted)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        rescale: float | None = None,
        sampler: str | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        precision: str | None = None,
        guidance_from: float = 0.0,
        guidance_to: float = 1.0,
        guidance_curve: str = "constant",
        negative: str | Prompt = "",
        size: tuple[int, int] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        latents: Tensor | None = None,
        edits: Sequence[Edit] = (),
        note: Callable[[str], None] = warn,
    ) -> Tensor:
        """One picture for each (prompt, seed), uint8 (N,H,W,3).

        Picture i depends on its own prompt, seed, size and settings alone: the networks always see `defaults["chunk"]`
        images, padded where fewer are asked for, so how many are asked for in one call does not change a bit.

        Args:
            prompts: N texts, taken as they stand, or what `ldm.text.prompt_syntax.read` makes of their notation.
            seeds: N integers; by default 0, 1, 2, ...
            size: (height, width) in px, multiples of `factor`; None: the size the model was trained at.
            on_step: called as on_step(steps done, steps in all) over the whole call.
            latents: (N,c,h,w) initial noise of unit variance, in place of the seeds' own.
            edits: methods that depart from drawing out of noise, such as `edits` makes of a picture.
            note: told what a user should know, one line each; by default a warning.

        Raises:
            UserError: on an unknown sampler or a size that is not a multiple of `factor`.
        """
        settings = self.settings(
            steps=steps,
            guidance=guidance,
            rescale=rescale,
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            precision=precision,
            guidance_from=guidance_from,
            guidance_to=guidance_to,
            guidance_curve=guidance_curve,
        )
        seeds, size = range(len(prompts)) if seeds is None else seeds, size or self.defaults["size"]
        if wants_mask(self.config.network, self.codec):
            edits = (all_new(self.codec, size), *edits)
        return self.engine(note).draw(prompts, seeds, settings, size, negative=negative, latents=latents, edits=edits, on_step=on_step)[0]

    @torch.no_grad()
    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Edit, ...]:
        """What `sample` is told to draw out of pictures: see `ldm.families.latent_diffusion.edits.from_picture`."""
        return from_picture(self.config.network, self.codec, image, mask, strength)

    def engine(self, note: Callable[[str], None] = warn) -> Engine:
        """What draws."""
        return Engine(self.denoiser, self.process, self.codec, self.text, self.config.defaults.chunk, note, self.turn)
