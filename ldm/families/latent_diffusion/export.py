"""A finished text-to-image model as the parts that files are written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ldm.diffusion.process import Process
from ldm.formats.export_source import CARD, ExportedModel, ExportedNetwork
from ldm.formats.latent_codec import Codec, LatentCodec, Statistics
from ldm.formats.model_folder import own_clip, read_record
from ldm.formats.part import read_json
from ldm.formats.text_folder import text_parts
from ldm.models.autoencoder import KLConfig, VQConfig, fold_latent_stats
from ldm.models.conditioned import base_of
from ldm.models.denoiser import Denoiser
from ldm.text.encoder import ZEROS, TextEncoder


class Exportable(Protocol):
    """What is asked of the family that is exported."""

    denoiser: Denoiser
    text: TextEncoder
    process: Process
    resolution: int
    content_hash: str

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        ...

    @property
    def defaults(self) -> dict[str, Any]:
        """How it wants to be sampled."""
        ...


def exported(family: Exportable, root: Path, path: Path) -> ExportedModel:
    """A finished model's networks and records, as files are written from.

    Args:
        root: its model folder.
        path: what it was named by, for titles.
    """
    record = read_record(root)
    autoencoder, state, statistics = _autoencoder(family)
    parts = {
        family.denoiser.config.folder: ExportedNetwork(_network_config(family), dict(base_of(family.denoiser).state_dict())),
        "vqvae" if isinstance(autoencoder, VQConfig) else "vae": ExportedNetwork(autoencoder.to_diffusers(), state),
        **{name: ExportedNetwork(*part) for name, part in (text_parts(family.text.model) if family.text.width else {}).items()},
    }
    # As it stands in the folder: how others like to sample it is said there too.
    scheduler = read_json(root / "scheduler" / "scheduler_config.json")
    card = (root / CARD).read_text(encoding="utf-8") if (root / CARD).is_file() and not record else ""
    left = [name for name in ("safety_checker", "feature_extractor", "image_encoder") if (root / name).is_dir()]
    notices = (f"left out, because ldm has no use for it: {', '.join(left)}",) if left else ()
    return ExportedModel(
        name=record.get("story", {}).get("name") or _name(path),
        parts=parts,
        network=family.denoiser.config,
        autoencoder=autoencoder,
        statistics=statistics,
        tokenizers=family.text.tokenizers(),
        process=family.process,
        scheduler=scheduler,
        defaults=family.defaults,
        story=record.get("story", {}),
        card=card,
        notices=notices,
        hash=family.content_hash,
        own_clip=own_clip(root),
        index={ZEROS: family.text.zeros} if len(family.text.tokenizers()) == 2 else {},
    )


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.stem


def _network_config(family: Exportable) -> dict[str, Any]:
    values = family.denoiser.config.to_diffusers()
    return values | {"sample_size": values.get("sample_size") or family.resolution // family.codec.factor}


def _autoencoder(family: Exportable) -> tuple[Codec, dict[str, Tensor], Statistics | None]:
    """The autoencoder; statistics that were measured are folded into a KL one, and told beside a VQ one."""
    network, statistics = family.codec.network, family.codec.statistics
    config, state = network.config, dict(network.state_dict())
    if not isinstance(config, KLConfig):
        return config, state, statistics if statistics.images else None
    if not (statistics.images or config.shift_factor or config.latents_mean):  # a scaling factor, which every pipeline reads
        return config, state, None
    return *fold_latent_stats(config, state, statistics.mean, statistics.std), None
