"""Inference form of a finished model: attention kernel, half weights, torch.compile, OpenVINO, offload and tiled decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn

from ldm.families.draws import Running
from ldm.families.latent_diffusion.conditions import beside, conditioned, reads_of
from ldm.families.latent_diffusion.engine import PRECISION
from ldm.families.latent_diffusion.offload import Offload, rest
from ldm.families.latent_diffusion.on_openvino import OnOpenVINO
from ldm.formats.denoiser_folder import load_denoiser
from ldm.formats.latent_codec import LatentCodec, Network, autoencoder_folder, load_codec
from ldm.formats.model_folder import RECORD, open_model, read_record
from ldm.formats.openvino_graph import check_openvino
from ldm.models.attention import Kind, set_attention
from ldm.models.denoiser import Denoiser
from ldm.models.inference import check_compiler, prepare
from ldm.text.encoder import TextEncoder
from ldm.text.own_clip import OwnClip


class Parts(Protocol):
    """A latent diffusion model's networks; what is put in their place draws from then on."""

    denoiser: Denoiser
    text: TextEncoder
    clip: OwnClip | None
    turn: Callable[[nn.Module], None]

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        ...


def ready(family: Parts, folder: Path, running: Running, precision: str) -> None:
    """Bring a model's networks into the form that only draws; they can neither learn nor be saved then.

    Args:
        family: as `ldm.families.latent_diffusion.family.load` gave it.
        folder: where it was loaded from.
        running: what was chosen.
        precision: that it will draw with; bf16 and fp16 halve the denoising network's weights.

    Raises:
        UserError: for an attention kernel or a backend that does not run, or where nothing can compile.
    """
    device = next(family.denoiser.parameters()).device
    if running.checked().other:
        check_openvino(device, precision)
    if running.attention:
        set_attention(cast(Kind, running.attention), device)
    if running.compiled:
        check_compiler(device)
    family.codec.tile = running.tile
    if running.low_memory:
        _take_turns(family, open_model(folder).folder, device, precision)
    else:
        converted = running.other != ""  # of the network as it is; the autoencoder stays torch's, which decodes as fast
        family.denoiser = OnOpenVINO(family.denoiser) if converted else family.denoiser.for_inference(_cast(precision))
        family.codec.network = prepare(family.codec.network, channels_last=True, in_place=True)
    if running.compiled:
        family.denoiser.compile(dynamic=False)


def _cast(precision: str) -> torch.dtype | None:
    """The type of autocast at a precision; None: there is none."""
    return None if precision == "fp32" else PRECISION[precision]


def _take_turns(family: Parts, root: Path, device: torch.device, precision: str) -> None:
    """Every part is read from its file when its turn comes, or on a GPU taken from the machine's memory."""

    codec, model = family.codec, family.text.model

    def network() -> Denoiser:
        record = read_record(root)
        reads = reads_of(record, root / RECORD)
        return conditioned(load_denoiser(root)[0], reads, beside(codec, family.clip), record, root).for_inference(_cast(precision))

    def autoencoder() -> Network:
        return prepare(load_codec(autoencoder_folder(root)).network, channels_last=True, in_place=True)

    def text() -> nn.Module:
        made: nn.Module = TextEncoder.load(root).model
        return made

    family.denoiser = network().to(device)
    rest(family.denoiser)
    codec.network = autoencoder().to(device)
    turns = Offload({family.denoiser: network, codec.network: autoencoder, model: text}, keep=device.type != "cpu")
    family.turn = turns
    codec.turn = lambda: turns(codec.network)
    model.register_forward_pre_hook(lambda *_: turns(model))
