"""What a model folder says: schedule, target, defaults and the network to continue, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.foreign import short
from ldm.config.schema import build
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.process import Process
from ldm.diffusion.schedules import DISTILLED
from ldm.families.family import Product
from ldm.families.latent_diffusion import conditions
from ldm.families.latent_diffusion.conditions import Read
from ldm.families.latent_diffusion.distillation import SAMPLER, STEPS
from ldm.families.latent_diffusion.engine import Defaults
from ldm.formats.denoiser_folder import load_denoiser, read_denoiser
from ldm.formats.latent_codec import LatentCodec
from ldm.formats.model_folder import RECORD, read_record
from ldm.formats.part import AGAIN, read_json
from ldm.models import denoiser
from ldm.models.unet import UNetConfig
from ldm.text.encoder import TextEncoder


def fits(network: denoiser.Network, text: TextEncoder, where: Path) -> None:
    """Refuse a text encoder whose states are not as wide as a network expects.

    Raises:
        UserError: naming both widths.
    """
    if text.width != network.context_width:
        raise UserError(f"{where}: the text encoder is {text.width} wide, but the UNet expects {network.context_width}")
    if network.reads_pooled and text.pooled_width != network.pooled_width:
        said = f"the text encoder's pooled state is {text.pooled_width} wide, but the UNet expects {network.pooled_width}"
        raise UserError(f"{where}: {said}; a refiner, which is told an aesthetic score, is not known here")


def process_of(root: Path) -> Process:
    """The noise schedule and the target of a model folder, from its scheduler's configuration, and its offset noise, where ldm.json tells.

    Raises:
        UserError: naming the file and the value that is not known here.
    """
    file = root / "scheduler" / "scheduler_config.json"
    values = read_json(file)
    offset = read_record(root).get("offset_noise")
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int | float) or not 0 <= offset < float("inf")):
        raise UserError(f"{root / RECORD}: offset_noise: got {offset!r}, not a number from 0 on; {AGAIN}")
    return replace(Process.from_scheduler_config(values, str(file)), offset_noise=offset)


def variance_of(root: Path) -> LearnedVariance | None:
    """Whether the network of a model folder says the variance of ddpm's steps, by its scheduler's configuration."""
    said = read_json(root / "scheduler" / "scheduler_config.json").get("variance_type")
    return LearnedVariance() if said == "learned_range" else None


def defaults_of(record: dict[str, Any], root: Path) -> tuple[Defaults, int | None]:
    """How a model wants to be sampled, and its side in px; Stable Diffusion's usual numbers where it does not say."""
    values = record.get("defaults")
    if values is None and str(read_json(root / "scheduler" / "scheduler_config.json").get("_class_name")) == DISTILLED:
        told = read_denoiser(root).reads_guidance
        return Defaults(steps=STEPS, guidance=8.0 if told else 1.0, sampler=SAMPLER, chunk=1), None
    if values is None:
        return Defaults(guidance=5.0 if read_denoiser(root).reads_size else 7.5, chunk=1), None
    size = values.get("size") if isinstance(values, dict) else values
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**16 for side in size)):
        raise UserError(f"{root / RECORD}: defaults.size: got {short(size)}, not [height, width] in px; {AGAIN}")
    return build({name: value for name, value in values.items() if name != "size"}, Defaults, str(root / RECORD)), size[0]


def continued_network(
    init: Product, network: denoiser.Network, codec: LatentCodec, reads: Sequence[Read], beside: conditions.Shape
) -> denoiser.Denoiser:
    """The network of a model folder, to be learned on: widened, and with further conditions, where these ask for it.

    Raises:
        UserError: naming what does not fit: another autoencoder, other conditions, another shape.
    """
    record = read_record(init.folder)
    if record.get("autoencoder") not in (None, codec.hash):
        raise UserError(
            f"{init.folder}: this UNet was trained on the latents of another autoencoder "
            f"({record['autoencoder'][:12]}, not {codec.hash[:12]}); train it anew or bring that autoencoder"
        )
    theirs = read_denoiser(init.folder)
    had = conditions.reads_of(record, init.folder / RECORD)
    if list(had) != list(reads[: len(had)]):
        told = ", ".join(f"{{view: {read.view}, port: {read.condition.port.kind}}}" for read in had)
        raise UserError(f"init: {init.folder} was trained with the conditions [{told}]; name these first, as they are, then further ones")
    wide = theirs.in_channels < network.in_channels and (theirs.in_channels == codec.channels or bool(had))
    like = replace(network, in_channels=theirs.in_channels) if wide else network
    if isinstance(like, UNetConfig) and isinstance(theirs, UNetConfig):  # what ports bring
        like = replace(like, gated=theirs.gated, class_embedding=theirs.class_embedding, class_width=theirs.class_width)
    shape = denoiser.continued(like, theirs)  # dropout and the like are this configuration's
    if shape.to_diffusers() != like.to_diffusers():
        raise UserError(f"{init.folder}: the UNet to continue has another shape than diffusion.network; make them equal")
    found, _ = load_denoiser(init.folder, like)
    return conditions.conditioned(found.widened(network.in_channels) if wide else found, reads, beside, record, init.folder)
