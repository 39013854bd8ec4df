"""Autoencoders, KL or VQ, with pixel, perceptual and adversarial losses in one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import Count, Fraction, NonNegative, PositiveFloat, config, plain
from ldm.data.sources import DataSet
from ldm.diffusion.batch import ImageBatch, sent
from ldm.diffusion.rng import Rng
from ldm.families import game
from ldm.families.family import Context, Family, Footprint, Found, ModelConfig, ParameterGroup, Product, Terms, TrainingStage, agree
from ldm.families.game import GameLoss, full
from ldm.families.perceptual_loss import Perceptual, PerceptualClip, PerceptualLpips, PerceptualNone
from ldm.families.pretrained import PretrainedAutoencoder, encoding_of, found_autoencoder
from ldm.formats.latent_codec import LatentCodec, Statistics, autoencoder_folder, codec_config, load_codec, save_codec
from ldm.formats.part import CONFIG, load_module, load_part, load_weights, read_config, save_part
from ldm.models import cost
from ldm.models.autoencoder import KLAutoencoder, KLConfig, VQAutoencoder, VQConfig, code_use, redraw_dead
from ldm.models.coder import Bottom, CoderStage
from ldm.models.cost import Cost
from ldm.models.discriminator import DiscriminatorConfig

DISCRIMINATOR = "discriminator"  # folder of a product


@config
class PixelLoss:
    """Per-pixel distances, each a mean over all pixel values in [-1,1]."""

    l1: NonNegative = 1.0  # weight of |a - b|
    l2: NonNegative = 0.0  # weight of (a - b)^2; strong on corners, weak on grain
    gradient: NonNegative = 0.0  # weight of |difference of neighbouring-pixel differences|


@config
class Adversarial:
    """The discriminator's game: Esser 2021 (VQGAN, arXiv 2012.09841) eq. 7 with its adaptive weight."""

    weight: NonNegative = 0.5  # factor on the adaptive weight; 0: no discriminator at all
    start: Fraction = 0.5  # share of the stage before which the discriminator neither learns nor is heard
    loss: GameLoss = "hinge"  # of autoencoder and discriminator
    max_weight: PositiveFloat = 1e4  # clamp of the adaptive weight before the factor
    lr_scale: PositiveFloat = 1.0  # the discriminator's learning rate, as a share of the autoencoder's
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class AutoencoderConfig(ModelConfig):
    """What the KL and the VQ autoencoder answer alike."""

    __slots__ = ()
    refuses: ClassVar[Mapping[str, str]] = {
        name: why for name, why in ModelConfig.refuses.items() if name not in ("buckets", "checkpointing")
    }
    answers = frozenset({"reconstruct"})
    encodes = True
    requires: ClassVar[Mapping[str, str]] = {"text": "has_tower"}
    continues = True
    network: KLConfig | VQConfig
    perceptual: PerceptualNone | PerceptualLpips | PerceptualClip
    adversarial: Adversarial

    def inputs(self) -> dict[str, str]:
        """What the perceptual distance reads."""
        return self.perceptual.inputs()

    def assembled_from(self) -> dict[str, str]:
        """Nothing: the perceptual distance only teaches."""
        return {}

    def counted(self, base: str, note: Callable[[str], None]) -> ModelConfig:
        """With the network of a base model, where its files are here."""
        network = PretrainedAutoencoder(path=base).latent_network(note) if base else self.network
        # Others do not learn here, which `continued` says.
        return self.with_network(network) if isinstance(network, KLConfig | VQConfig) else self

    def find(self, path: str, note: Callable[[str], None]) -> Found:
        """The autoencoder of a model folder or file, to begin with."""
        return found_autoencoder(path, note)

    def continued(self, base: Path) -> ModelConfig:
        """With the network of a base model's autoencoder.

        Raises:
            UserError: naming the field, both values and the fix.
        """
        folder = autoencoder_folder(base)
        values = read_config(folder)
        network = codec_config(values, folder)
        if not isinstance(network, KLConfig | VQConfig) or type(network) is not type(self.network):
            raise UserError(f"autoencoder: kind: got {self.kind}, but the base model {base} has the other kind; write that one")
        if self.network != type(self.network)():
            agree("models.autoencoder.network", self.network, network, (), base)
        return self.with_network(replace(network, checkpointing=self.network.checkpointing))

    def for_stage(self, stage: TrainingStage) -> ModelConfig:
        """With what the stage says of recomputing."""
        if stage.checkpointing is None:
            return self
        return self.with_network(replace(self.network, checkpointing=stage.checkpointing))

    def with_network(self, network: KLConfig | VQConfig) -> ModelConfig:
        """The same with another network."""
        return replace(self, network=network)  # type: ignore[type-var, return-value]

    def identity(self) -> dict[str, Any]:
        """All but recomputing, with and without which the result is the same to the bit."""
        found = plain(self)
        found["network"]["checkpointing"] = False
        for name in ("latents_mean", "latents_std"):  # which no network that learns here has
            found["network"].pop(name, None)
        return found

    def step_px(self, others: Mapping[str, ModelConfig]) -> int:
        """The downsampling factor."""
        return self.network.factor

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of encoder and decoder."""
        with torch.device("meta"):
            return cost.count(self.network.build())

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """Encoder, decoder, discriminator and perceptual distance; the discriminator for the share of the stage that it learns in."""
        learned, encode, decode = cost.autoencoder(self.network, side, side)
        spent, counts, frozen = encode + decode, {"autoencoder": learned}, {}
        if self.adversarial.weight:
            counts["discriminator"], game = cost.discriminator(self.adversarial.discriminator, side, side)
            heard = game * (1 - self.adversarial.start)
            spent += replace(heard, activations=game.activations)  # memory must hold all of it then
        with torch.device("meta"):
            judge = self.perceptual.network(others, side, note)
        if judge is not None:
            judge.requires_grad_(False)
            frozen["perceptual"] = cost.count(judge)
            spent += cost.distance(judge, side, side)
        return Footprint(learned=counts, frozen=frozen, cost=spent, averaged=learned, passed=sum(frozen.values()))

    def latent_network(self, note: Callable[[str], None]) -> KLConfig | VQConfig:
        """The network that makes latents."""
        return self.network

    def encoding(self, side: int, note: Callable[[str], None]) -> tuple[Cost, int]:
        """Of encoder; the posterior's mean and deviation, or the latents."""
        return encoding_of(self.network, side)

    def encoder(self, product: Path, device: torch.device) -> LatentCodec:
        """The frozen autoencoder with its latent statistics."""
        return load_codec(autoencoder_folder(product)).to(device)

    def measured(self, products: Mapping[str, Product], scratch: Path, story: Mapping[str, Any], device: torch.device) -> LatentCodec:
        """The frozen autoencoder, which reconstructs."""
        return self.encoder(products["model"].folder, device)

    def build(self, context: Context) -> AutoencoderFamily:
        """The family, ready to train."""
        assert isinstance(self, KL | VQ)
        return AutoencoderFamily(self, context)


@config
class KL(AutoencoderConfig):
    """Autoencoder with a Gaussian posterior held near N(0,1) (Rombach 2022, arXiv 2112.10752, appendix G)."""

    kind: Literal["kl"] = "kl"
    network: KLConfig = KLConfig()
    weight: NonNegative = 1e-6  # of the KL term: summed over the latent, divided by the number of pixel values
    pixel: PixelLoss = PixelLoss()
    perceptual: Perceptual = PerceptualNone()
    adversarial: Adversarial = Adversarial()


@config
class VQ(AutoencoderConfig):
    """Autoencoder whose latents are snapped to a learned codebook (van den Oord 2017, arXiv 1711.00937)."""

    kind: Literal["vq"] = "vq"
    network: VQConfig = VQConfig()
    codebook: NonNegative = 1.0  # weight of the codebook term
    commitment: NonNegative = 0.25  # weight of the commitment term (beta)
    redraw_every: Count = 10  # steps between re-drawing codes that are not used; 0: never
    redraw_until: Fraction = 0.7  # share of the stage after which codes are left alone
    pixel: PixelLoss = PixelLoss()
    perceptual: Perceptual = PerceptualNone()
    adversarial: Adversarial = Adversarial()

    has_codes = True
    refuses: ClassVar[Mapping[str, str]] = {
        **AutoencoderConfig.refuses,
        "exact": "learns from codes of the whole batch, which depend on how many processes there are",
    }


def _continued(config: KL | VQ, init: Product) -> KLAutoencoder | VQAutoencoder:
    folder = autoencoder_folder(init.folder)
    theirs = (KLConfig if isinstance(config, KL) else VQConfig).from_diffusers(read_config(folder), str(folder / CONFIG))
    if theirs != config.network:
        raise UserError(f"{folder}: the autoencoder to continue has another shape than autoencoder.network; make them equal")
    build: Callable[[], KLAutoencoder | VQAutoencoder] = config.network.build
    return load_module(build, load_weights(folder), folder)


class AutoencoderFamily(Family):
    """An autoencoder and its discriminator, learning from the same batch.

    The loss's gradients with respect to the reconstruction are taken once, for the reconstruction loss and for the
    discriminator's opinion apart; their norms at the decoder's last layer give the adaptive weight, and their weighted sum goes
    back through the autoencoder once. The discriminator sees a detached reconstruction, so the two networks' gradients never mix.
    """

    usage: Tensor

    def __init__(self, config: KL | VQ, context: Context) -> None:
        super().__init__()
        self.config = config
        self.network: KLAutoencoder | VQAutoencoder
        self.network = config.network.build() if context.init is None else _continued(config, context.init)
        self.total_images = context.total_images
        self.images = 0
        self.discriminator: nn.Module | None = config.adversarial.discriminator.build() if config.adversarial.weight else None
        if self.discriminator is not None and context.init is not None and (context.init.folder / DISCRIMINATOR).is_dir():
            discriminator, path = config.adversarial.discriminator, context.init.folder / DISCRIMINATOR
            self.discriminator = load_module(discriminator.build, load_part(path)[1], path)
        distance = config.perceptual.build(context)
        self._frozen = () if distance is None else (distance,)  # a tuple, so that it stays out of the module tree
        self.statistics: Statistics | None = None
        if isinstance(config, VQ):
            self.register_buffer("usage", torch.ones(config.network.codes))
        self._seen: list[tuple[Tensor, Tensor]] = []  # of the present step: encoder outputs (N,c), uses of each code (codes,)

    def frozen(self) -> list[nn.Module]:
        """The perceptual network, if there is one."""
        return list(self._frozen)

    def compilable(self) -> list[nn.Module]:
        """The autoencoder's blocks; its last layer, to which the adaptive weight goes back by itself, and the discriminator stay."""
        return [block for block in self.network.modules() if isinstance(block, CoderStage | Bottom)]

    def parameter_groups(self) -> list[ParameterGroup]:
        """The autoencoder and its discriminator."""
        found = [ParameterGroup(name="autoencoder", parameters=list(self.network.parameters()))]
        if self.discriminator is not None:
            found.append(ParameterGroup("discriminator", list(self.discriminator.parameters()), self.config.adversarial.lr_scale))
        return found

    def progress(self, images: int) -> None:
        """How far the stage is, for the discriminator's start; a new step begins."""
        self.images = images
        self._seen.clear()

    @property
    def discriminator_active(self) -> bool:
        """Whether the discriminator learns and is heard at this step."""
        return self.discriminator is not None and self.images >= self.config.adversarial.start * self.total_images

    def idle(self) -> list[nn.Parameter]:
        """The discriminator's parameters before its start."""
        return [] if self.discriminator is None or self.discriminator_active else list(self.discriminator.parameters())

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1], through the posterior's mean or the codebook."""
        if isinstance(self.network, VQAutoencoder):
            return self.network.decode(self.network.encode(image))
        return self.network.decode(self.network.encode(image)[0])

    def loss(self, batch: ImageBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Pixel, perceptual, adversarial and latent terms; the discriminator's own term; gauges of the game."""
        image = batch.image
        recon, terms, gauges = self._vq(image) if isinstance(self.config, VQ) else self._kl(image, rng)

        leaf = recon.detach().requires_grad_()
        with torch.enable_grad():
            seen = self._pixel(leaf, image)
            for distance in self._frozen:
                seen["perceptual"] = distance(leaf, image).mean()
            judged = torch.stack(list(seen.values())).sum()
        (slope,) = torch.autograd.grad(judged, leaf)
        gauges["psnr"] = -10 * torch.log10(F.mse_loss(recon.detach(), image) / 4)

        if self.discriminator is not None and self.discriminator_active:
            opinion, opinion_slope = game.opinion(self.discriminator, self.config.adversarial.loss, leaf, image)
            weight, balance = self._adaptive_weight(recon, slope, opinion_slope)
            gauges |= balance
            slope = slope + weight * opinion_slope
            terms["adversarial"] = (weight * opinion).detach()
            terms["discriminator"], logits = game.lesson(self.discriminator, self.config.adversarial.loss, image, leaf.detach())
            gauges |= logits
        elif self.discriminator is not None:
            terms["discriminator"] = game.silent(self.discriminator)
        terms["reconstruction"] = game.through(recon, slope, judged)
        for name, value in seen.items():
            gauges[name] = value.detach()
        return terms, gauges

    def _kl(self, image: Tensor, rng: Rng) -> tuple[Tensor, Terms, Terms]:
        assert isinstance(self.config, KL) and isinstance(self.network, KLAutoencoder)
        mean, logvar = self.network.encode(image)
        mean, logvar = full(mean), full(logvar)
        noise = sent(rng.normal("posterior", mean.shape[1:]), mean.device)
        recon = full(self.network.decode(mean + (0.5 * logvar).exp() * noise))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)  # eq. 10 of Kingma and Welling 2013, per latent value
        terms = {"kl": self.config.weight * kl.sum() / image.numel()}
        return recon, terms, {"kl_nats": kl.detach().mean(), "posterior_std": (0.5 * logvar.detach()).exp().mean()}

    def _vq(self, image: Tensor) -> tuple[Tensor, Terms, Terms]:
        assert isinstance(self.config, VQ) and isinstance(self.network, VQAutoencoder)
        z = full(self.network.encode(image))
        quantised, codes, distance = self.network.quantize(z)
        recon = full(self.network.decode(quantised, quantise=False))
        counts = torch.bincount(codes.flatten(), minlength=len(self.usage)).to(self.usage.dtype)
        if self.training:
            self._seen.append((z.detach().permute(0, 2, 3, 1).flatten(0, 2), counts))
        terms = {"codebook": self.config.codebook * distance["codebook"], "commitment": self.config.commitment * distance["commitment"]}
        return recon, terms, {}

    def _pixel(self, recon: Tensor, image: Tensor) -> Terms:
        weights, found = self.config.pixel, {}
        if weights.l1:
            found["l1"] = weights.l1 * F.l1_loss(recon, image)
        if weights.l2:
            found["l2"] = weights.l2 * F.mse_loss(recon, image)
        if weights.gradient:
            across = F.l1_loss(recon.diff(dim=3), image.diff(dim=3))
            down = F.l1_loss(recon.diff(dim=2), image.diff(dim=2))
            found["gradient"] = weights.gradient * (across + down)
        return found

    def _adaptive_weight(self, recon: Tensor, slope: Tensor, opinion_slope: Tensor) -> tuple[Tensor, Terms]:
        """lambda = |grad rec| / (|grad gan| + 1e-4) at the last layer, over all ranks, clamped (Esser 2021, eq. 7)."""
        last = self.network.last_layer
        norms = [self.ranks.mean(torch.autograd.grad(recon, last, s, retain_graph=True)[0]).norm() for s in (slope, opinion_slope)]
        free = norms[0] / (norms[1] + 1e-4)
        limit = self.config.adversarial.max_weight
        weight = free.clamp(0, limit) * self.config.adversarial.weight
        return weight.detach(), {"lambda": weight.detach(), "lambda_clamped": (free >= limit).float()}

    def after_step(self, step: int, rng: Rng) -> Terms:
        """Count how often codes are used, over the whole batch, and re-draw those that hardly are from its encoder outputs.

        Which outputs are taken depends on the batch alone, not on how processes and passes share it.
        """
        config = self.config
        if not isinstance(config, VQ) or not isinstance(self.network, VQAutoencoder) or not self._seen:
            return {}
        latest, counts = torch.cat([z for z, _ in self._seen]), torch.stack([n for _, n in self._seen]).sum(0)
        self._seen.clear()
        ranks = self.ranks
        with torch.no_grad():
            self.usage.lerp_(ranks.mean(counts) * ranks.world, 0.1)
        share, perplexity = code_use(self.usage)
        found = {"code_use": share, "perplexity": perplexity}
        if not config.redraw_every or (step + 1) % config.redraw_every or self.images > config.redraw_until * self.total_images:
            return found
        drawn, dead = redraw_dead(self.network.codebook, self.usage, latest, rng, ranks.rank, ranks.world)
        fresh = ranks.mean(drawn) * ranks.world
        with torch.no_grad():
            self.network.codebook.copy_(torch.where(dead[:, None], fresh, self.network.codebook))
            self.usage.masked_fill_(dead, float(self.usage.mean()))
        return found | {"codes_redrawn": dead.sum().float()}

    def averaged(self) -> list[nn.Parameter]:
        """The autoencoder's own parameters; the discriminator is never used afterwards."""
        return list(self.network.parameters())

    def preview(self, batch: ImageBatch, seed: int) -> Tensor:
        """Originals and their reconstructions in turn (N,3,H,W)."""
        return torch.stack([batch.image, self.reconstruct(batch.image).float().clamp(-1, 1)], 1).flatten(0, 1)

    def finish(self, context: Context) -> dict[str, Any]:
        """Latent statistics per channel, over training images at the stage's resolution."""
        self.statistics = measure(self.network, context.data, context.resolution, context.seed, context.device)
        return {"latents": self.statistics.to_dict()}

    def save(self, folder: Path) -> None:
        """vae/ or vqvae/ in diffusers' layout, with the latent statistics; discriminator/, with which a later stage goes on."""
        assert self.statistics is not None, "finish() measures the statistics before save()"
        save_codec(folder / ("vqvae" if isinstance(self.config, VQ) else "vae"), self.network, self.statistics)
        if self.discriminator is not None:
            save_part(plain(self.config.adversarial.discriminator), dict(self.discriminator.state_dict()), folder / DISCRIMINATOR)


@torch.no_grad()
def measure(
    network: KLAutoencoder | VQAutoencoder, data: DataSet, resolution: int, seed: int, device: torch.device, images: int = 1024
) -> Statistics:
    """Mean and deviation per latent channel over up to `images` images of `data`, posterior variance included."""
    count, total = min(images, len(data)), 0.0
    first: Tensor | float = 0.0
    second: Tensor | float = 0.0
    extra: Tensor | float
    for start in range(0, count, 64):
        index = list(range(start, min(start + 64, count)))
        image = data.load(index, index, resolution, seed, False).image.to(device)
        if isinstance(network, VQAutoencoder):
            mean, extra = network.encode(image).cpu().double(), 0.0
        else:
            posterior, logvar = network.encode(image)
            mean, extra = posterior.cpu().double(), logvar.cpu().double().exp().sum((0, 2, 3))
        first = first + mean.sum((0, 2, 3))
        second = second + mean.square().sum((0, 2, 3)) + extra
        total += mean.shape[0] * mean.shape[2] * mean.shape[3]
    assert isinstance(first, Tensor) and isinstance(second, Tensor)
    average = first / total
    deviation = (second / total - average.square()).clamp_min(1e-12).sqrt()
    return Statistics(tuple(average.tolist()), tuple(deviation.tolist()), count, resolution)
