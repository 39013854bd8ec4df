"""Metadata of a single-file checkpoint: Stability's modelspec 1.0.0, and ldm's own record to read it back by."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.formats.compvis import head_width
from ldm.formats.export_source import ExportedModel

RECIPE = "ldm.recipe"  # the metadata key (and the key of a .ckpt) of what ldm reads back
HASH = "modelspec.hash_sha256"
UNKNOWN = "0x" + "0" * 64  # in the hash's place until the file is written
PREDICTION = {"epsilon": "epsilon", "v": "v", "x0": "sample", "flow": "flow"}
STABLE = {"channels": (320, 640, 1280, 1280), "layers": 2, "attention": (True, True, True, False), "depth": 1}

XL = {"channels": (320, 640, 1280), "attention": (False, True, True), "depth": (1, 2, 10), "context_width": 2048, "pooled_width": 1280}


def recipe(source: ExportedModel, autoencoder: dict[str, Any]) -> dict[str, Any]:
    """Everything besides weights and tokenizer: configurations, latent statistics, scheduler, defaults and story.

    Args:
        source: the model.
        autoencoder: the config.json of the autoencoder as it is written, which may have a convolution more.
    """
    configs = {name: part.config for name, part in source.parts.items()} | {source.codec: autoencoder}
    latents = source.statistics.to_dict() if source.statistics else None
    pair = {"index": source.index, "padding": source.tokenizers["tokenizer_2"].pad_token} if source.pair else {}
    return {"parts": configs, "latents": latents, "source_hash": source.hash, **source.record(), **pair}


def metadata(source: ExportedModel, recipe: dict[str, Any], dtype: str) -> dict[str, str]:
    """The metadata of a single .safetensors file; the hash is a placeholder until `write_hash`."""
    height, width = source.defaults["size"]
    made = source.story.get("data")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(source),
        "modelspec.implementation": "https://github.com/CompVis/latent-diffusion",
        "modelspec.title": source.name,
        "modelspec.description": f"A latent text-to-image diffusion model trained with ldm on {made}, {dtype}"
        if made
        else f"A latent text-to-image diffusion model, converted by ldm, {dtype}",
        "modelspec.date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": PREDICTION[source.process.target],
        HASH: UNKNOWN,
        RECIPE: json.dumps(recipe, ensure_ascii=False, sort_keys=True),
    }


def architecture(source: ExportedModel) -> str:
    """modelspec's name of the architecture: Stable Diffusion's where it has its shape, otherwise latent-diffusion."""
    network = source.unet
    usual = all(getattr(network, name) == value for name, value in STABLE.items()) and network.out_channels == 4
    if usual and not network.size_channels and source.codec == "vae":
        if network.context_width == 768 and network.level_heads == (8,) * 4:
            return "stable-diffusion-v1-inpainting" if source.inpaints else "stable-diffusion-v1"
        if network.context_width == 1024 and head_width(network) == 64:
            return "stable-diffusion-v2-768-v" if source.process.target == "v" else "stable-diffusion-v2-512"
    if source.pair and source.codec == "vae" and all(getattr(network, name) == value for name, value in XL.items()):
        return "stable-diffusion-xl-v1-inpainting" if source.inpaints else "stable-diffusion-xl-v1-base"
    return "latent-diffusion"


def tensor_hash(file: Path) -> str:
    """modelspec's hash of a safetensors file: 0x and the SHA-256 sum of all bytes after the header."""
    hasher = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(8 + int.from_bytes(opened.read(8), "little"))
        while block := opened.read(2**22):
            hasher.update(block)
    return "0x" + hasher.hexdigest()


def write_hash(file: Path) -> str:
    """Put the hash of a file's tensors in the place that `metadata` left for it.

    Raises:
        UserError: if there is no such place.
    """
    found = tensor_hash(file)
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        opened.seek(0)
        header = opened.read(8 + size)
        at = header.find(f'"{HASH}":"{UNKNOWN}"'.encode())
        if at < 0:
            raise UserError(f"{file}: its header came back without {HASH}; export again")
        opened.seek(at + len(f'"{HASH}":"'))
        opened.write(found.encode())
    return found
