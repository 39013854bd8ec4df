"""Benchmarks of the autoencoder: decoding and encoding beside diffusers' AutoencoderKL, adversarial training beside CompVis' code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.cli.benchmarks.models import KL_SD, KL_SMALL, TINY, count, distance, twin_autoencoder
from ldm.cli.benchmarks.rows import Case, Setup
from ldm.cli.benchmarks.training import DTYPE, LR, Precision, gradients, our_update
from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL, Adversarial, AutoencoderFamily
from ldm.families.family import Context
from ldm.models.discriminator import DiscriminatorConfig
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.inference import prepare
from ldm.models.perceptual import FeatureDistance
from ldm.training.optim import AdamW

Way = Literal["decode", "encode"]
ERROR = "relative error of the result"


def decode(setup: Setup) -> Iterator[Case]:
    """B11."""
    yield from _cases(setup, "decode")


def encode(setup: Setup) -> Iterator[Case]:
    """B12."""
    yield from _cases(setup, "encode")


def _cases(setup: Setup, way: Way) -> Iterator[Case]:
    yield _case(setup, way, "equal", torch.float32, torch.float32, 1e-4)
    yield _case(setup, way, "equal", torch.bfloat16, torch.bfloat16, 5e-2)
    yield _case(setup, way, "default", torch.bfloat16, torch.float32, 5e-2)


def _case(setup: Setup, way: Way, kind: Literal["equal", "default"], ours: torch.dtype, theirs: torch.dtype, tolerance: float) -> Case:
    config = TINY.autoencoder if setup.tiny else KL_SD
    pixels = 32 if setup.tiny else 512 if setup.device == "cuda" else 128
    torch.manual_seed(0)
    network = config.build().eval().to(setup.device)
    peer = twin_autoencoder(network).eval().to(theirs)
    network = prepare(network.to(ours), channels_last=True)  # as drawing and encoding use it
    image = torch.rand(1, 3, pixels, pixels, device=setup.device) * 2 - 1
    latent = torch.randn(1, config.latent_channels, pixels // network.factor, pixels // network.factor, device=setup.device)

    @torch.no_grad()
    def our_side() -> Tensor:
        return network.decode(latent.to(ours)) if way == "decode" else network.encode(image.to(ours))[0]

    @torch.no_grad()
    def their_side() -> Tensor:
        if way == "decode":
            return peer.decode(latent.to(theirs), return_dict=False)[0]
        return peer.encode(image.to(theirs)).latent_dist.mean

    said = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    name = f"{way}, {pixels} px, {said[ours]}" if ours == theirs else f"{way}, {pixels} px, ours {said[ours]}, theirs {said[theirs]}"
    call: Callable[[], Any] = our_side
    return Case(
        name=name,
        kind=kind,
        ours=call,
        theirs=their_side,
        check=lambda: distance([our_side()], [their_side()]),
        tolerance=tolerance,
        error=ERROR,
        notes={"ours": said[ours], "theirs": said[theirs], "pixels": pixels, "parameters": count(config)},
    )


BETAS = (0.5, 0.9)  # of CompVis' optimisers
KL_WEIGHT = 1e-6


def adversarial(setup: Setup) -> Iterator[Case]:
    """B13. In float64 the two sides' gradients agree to 1e-14 (`tests/families/test_autoencoder.py`).

    Rounding turns slopes of L1 and of hinges that are near nothing, and the adaptive weight passes it on, hence the errors allowed.
    """
    yield game(setup, "equal", "fp32", "fp32", 3e-3)
    yield game(setup, "equal", "bf16", "bf16", 3e-1)
    yield game(setup, "default", "bf16", "fp32", 3e-1)


def game(setup: Setup, kind: Literal["equal", "default"], ours: Precision, theirs: Precision, tolerance: float) -> Case:
    """One step of both players with a perceptual distance, after the discriminator's start."""
    config, pixels, batch = (TINY.autoencoder, 32, 2) if setup.tiny else (KL_SMALL, 128, 4)
    discriminator = DiscriminatorConfig(channels=8, layers=1, norm_groups=4) if setup.tiny else DiscriminatorConfig()
    torch.manual_seed(0)
    nothing: Any = None
    made = KL(network=config, weight=KL_WEIGHT, adversarial=Adversarial(start=0.0, discriminator=discriminator))
    family = AutoencoderFamily(made, Context(data=nothing, val=nothing, resolution=pixels, seed=0, total_images=10**12))
    network: Any = family.network
    tower = ImageTowerConfig(channels=(8, 16) if setup.tiny else (64, 128, 256)).build()
    perceptual = FeatureDistance(tower)
    family._frozen = (perceptual,)
    for module in (family, perceptual):
        module.to(setup.device)
    image = torch.rand(batch, 3, pixels, pixels) * 2 - 1
    row = [pixels, pixels, 0, 0, pixels, pixels]
    seen = ImageBatch(image=image, caption=("",) * batch, size=torch.tensor([row] * batch).float(), position=torch.arange(batch))
    peer = TwoPasses(family, perceptual, image.to(setup.device), theirs, setup.device)
    update = our_update(family, seen, ours, setup, pixels, part="autoencoder", optim=AdamW(lr=LR, betas=BETAS, weight_decay=0.0, clip=0.0))

    def check() -> float:
        rng = Rng(0, seen.position)
        side = pixels // network.factor
        peer.generator_loss(rng.normal("posterior", (config.latent_channels, side, side)).to(setup.device)).backward()
        expected = gradients(peer.vae)
        peer.discriminator.zero_grad()
        with torch.autocast(setup.device, DTYPE[ours], enabled=ours != "fp32"):
            terms, _ = family.loss(seen.to(setup.device), rng)
        torch.stack([value.float() for value in terms.values()]).sum().backward()
        error = distance(gradients(network), expected)
        family.zero_grad(set_to_none=True)
        return error

    said = f"both {ours}" if ours == theirs else f"ours {ours}, theirs {theirs}"
    return Case(
        name=f"{pixels} px, batch {batch}, {said}",
        kind=kind,
        ours=update,
        theirs=peer.step,
        check=check,
        tolerance=tolerance,
        error="relative error of the autoencoder's gradients",
        per_call=batch,
        notes={
            "ours": ours,
            "theirs": theirs,
            "parameters": count(config),
            "discriminator": sum(p.numel() for p in peer.discriminator.parameters()),
        },
    )


class TwoPasses:
    """A step of CompVis' AutoencoderKL with LPIPSWithDiscriminator, in its order of work, written anew.

    The autoencoder runs once for each player, the perceptual distance too, and the adaptive weight is found by two more
    backward passes through the last layer's side. Sums are means here, as on our side; that changes no work.
    """

    def __init__(self, family: AutoencoderFamily, perceptual: nn.Module, image: Tensor, precision: Precision, device: str) -> None:
        self.device, self.dtype, self.image, self.perceptual = device, DTYPE[precision], image, perceptual
        self.vae: Any = twin_autoencoder(family.network).train()  # type: ignore[arg-type]
        discriminator: nn.Module | None = copy.deepcopy(family.discriminator)
        assert discriminator is not None
        self.discriminator = discriminator
        self.weight = family.config.adversarial.weight
        self.players: tuple[nn.Module, ...] = (self.vae, self.discriminator)
        self.optimizers = [torch.optim.Adam(part.parameters(), lr=LR, betas=BETAS) for part in self.players]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def _reconstruct(self, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The picture, and the two terms that both players' losses compute before they part."""
        posterior = self.vae.encode(self.image).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn_like(mean) if noise is None else noise
        recon = self.vae.decode(mean + (0.5 * logvar).exp() * noise, return_dict=False)[0].float()
        judged = F.l1_loss(recon, self.image) + self.perceptual(recon, self.image).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / self.image.numel()
        return recon, judged, kl

    def generator_loss(self, noise: Tensor | None = None) -> Tensor:
        """The first player's loss, with the adaptive weight of Esser 2021, eq. 7."""
        with self._autocast():
            recon, judged, kl = self._reconstruct(noise)
            opinion = -self.discriminator(recon).float().mean()
            last = self.vae.decoder.conv_out.weight
            norms = [torch.autograd.grad(value, last, retain_graph=True)[0].norm() for value in (judged, opinion)]
            weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach() * self.weight
            return judged + KL_WEIGHT * kl + weight * opinion

    def discriminator_loss(self) -> Tensor:
        """The second player's loss, from a reconstruction of its own."""
        with self._autocast():
            recon, _, _ = self._reconstruct(None)
            real, fake = self.discriminator(self.image).float(), self.discriminator(recon.detach()).float()
            return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

    def step(self) -> None:
        """Both players in turn; the other one's parameters want no gradient meanwhile, as Lightning sees to it."""
        for number, loss in enumerate((self.generator_loss, self.discriminator_loss)):
            for other, part in enumerate(self.players):
                part.requires_grad_(other == number or (number == 0 and other == 0))
            value = loss()
            value.backward()
            self.optimizers[number].step()
            self.optimizers[number].zero_grad()
        for part in self.players:
            part.requires_grad_(True)
