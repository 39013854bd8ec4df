"""A finished text-to-image model, taken up again from its folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.diffusion.process import Process
from ldm.families.latent_diffusion.family import Defaults, LatentDiffusion, LatentDiffusionFamily
from ldm.families.latent_diffusion.offload import rest
from ldm.formats.latent_codec import autoencoder_folder, load_codec
from ldm.formats.model_folder import RECORD, open_model, read_record
from ldm.formats.part import AGAIN, content_hash, load_module, load_part, read_json
from ldm.models.unet import UNetConfig
from ldm.text.encoder import TextEncoder


def load(folder: str | Path, device: str | torch.device = "cpu", low_memory: bool = False) -> LatentDiffusionFamily:
    """A finished text-to-image model: a diffusers folder of ours or of a Stable Diffusion, or a run folder with one in model/.

    With `low_memory` every part is emptied as soon as it is found whole; `ldm.families.latent_diffusion.runtime.ready` makes them take turns.

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
    codec = load_codec(autoencoder_folder(root))
    if record.get("autoencoder") not in (None, codec.hash):
        raise UserError(f"{root}: its autoencoder is not the one its UNet was trained with; put that one back")
    text = TextEncoder.load(root)
    if low_memory:
        rest(codec.network)
        rest(text.model)
    stored, state = load_part(root / "unet")
    network = UNetConfig.from_diffusers(stored)
    unet = load_module(network.build, state, root / "unet")
    process = process_of(root)
    defaults, size = defaults_of(record, root)
    if not text.width == network.context_width:
        raise UserError(f"{root}: the text encoder is {text.width} wide, but the UNet expects {network.context_width}")
    made = LatentDiffusion(network=network, process=process, defaults=defaults)
    family = LatentDiffusionFamily(made, unet, codec, text)
    sample_size = stored.get("sample_size") or 64
    family.resolution = size or sample_size * codec.factor
    if low_memory:
        rest(unet)
    for module in (family, *family.frozen()):
        module.to(device)
    return family.eval()


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
    try:
        return replace(Process.from_scheduler_config(values), offset_noise=offset)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}; {AGAIN}") from None


def defaults_of(record: dict[str, Any], root: Path) -> tuple[Defaults, int | None]:
    """How a model wants to be sampled, and its side in px; Stable Diffusion's usual numbers where it does not say."""
    values = record.get("defaults")
    if values is None:
        return Defaults(guidance=7.5, chunk=1), None
    size = values.get("size") if isinstance(values, dict) else values
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size)):
        raise UserError(f"{root / RECORD}: defaults.size: got {size!r}, not [height, width] in px; {AGAIN}")
    return build({name: value for name, value in values.items() if name != "size"}, Defaults, str(root / RECORD)), size[0]
