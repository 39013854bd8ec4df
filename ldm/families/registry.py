"""Registry of model kinds: the union of configurations, and opening a finished model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.introspection import members_of, without_annotation
from ldm.config.schema import BY_KIND
from ldm.families.autoencoder import KL, VQ
from ldm.families.chain import BEFORE, chained
from ldm.families.clip import Clip
from ldm.families.cvae import CVAE
from ldm.families.cyclegan import CycleGAN
from ldm.families.draws import PLAIN, Draws, Running
from ldm.families.family import ModelConfig
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.families.palette import PaletteAutoencoder
from ldm.families.pix2pix import Pix2Pix
from ldm.families.pixels import PixelAutoencoder
from ldm.families.pretrained import PretrainedAutoencoder, PretrainedText
from ldm.families.prior import Prior
from ldm.families.text_gan import TextGAN
from ldm.families.tokens.family import Tokens
from ldm.formats.export_source import ExportedModel
from ldm.formats.model_folder import read_record, root_of

# A new system is one file in this room and one name here.
Model = Annotated[
    Clip
    | PretrainedText
    | KL
    | VQ
    | PixelAutoencoder
    | PaletteAutoencoder
    | PretrainedAutoencoder
    | LatentDiffusion
    | Prior
    | Tokens
    | TextGAN
    | CVAE
    | Pix2Pix
    | CycleGAN,
    BY_KIND,
]
USUAL = "latent_diffusion"  # the kind of a model folder that names none


def kinds() -> dict[str, type[ModelConfig]]:
    """The members of the union by their kind."""
    return members_of(without_annotation(Model))


def open_finished(folder: str | Path, device: str | torch.device = "cpu", low_memory: bool = False) -> Draws:
    """A finished model by folder, run folder, single file or hub name, opened by the kind that its ldm.json names.

    Raises:
        UserError: naming what is missing, damaged or of an unknown kind.
    """
    root = root_of(folder)
    kind = read_record(root).get("kind", USUAL)
    known = {name: member for name, member in kinds().items() if member.exports}
    if kind not in known:
        raise UserError(f"{root}: a model of kind {kind!r}; this version opens {', '.join(known)}")
    found = known[kind].open(root, device, low_memory)
    return chained(open_finished(root / BEFORE, device, low_memory), found) if (root / BEFORE).is_dir() else found


def load(folder: str | Path, device: str | torch.device = "cpu", running: Running = PLAIN) -> Draws:
    """A finished model, ready to draw."""
    family = open_finished(folder, device, running.low_memory)
    family.ready(Path(folder), running, "fp32")
    return family


def exported(model: str) -> ExportedModel:
    """A model by folder, run folder or any other name that `load` takes, as files of other programs are written from.

    Raises:
        UserError: naming what is missing, damaged or does not belong together, or that its kind has no other form.
    """
    path = at_home(model)
    return open_finished(model).exported(root_of(path if path.exists() else model), path)
