"""The denoising network of a model folder: which part it is, its configuration by class name, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.formats.part import CONFIG, load_module, load_weights, read_config
from ldm.models import denoiser
from ldm.models.diffusers_config import TEXTLESS_UNET


def denoiser_folder(root: Path) -> Path:
    """The part of a model or product folder that holds its denoising network; `unet` where there is none."""
    return root / next((name for name in denoiser.FOLDERS if (root / name).is_dir()), denoiser.FOLDERS[0])


def unconditional(root: Path) -> bool:
    """Whether a model folder's denoising network reads no text."""
    file = denoiser_folder(root) / CONFIG
    return file.is_file() and read_config(file.parent).get("_class_name") == TEXTLESS_UNET


def read_denoiser(root: Path) -> denoiser.Network:
    """The configuration of a model folder's denoising network, by the `_class_name` in its config.json.

    Raises:
        UserError: if it is missing, or for a network that is not known here.
    """
    folder = denoiser_folder(root)
    return denoiser.config_of(read_config(folder), str(folder / CONFIG))


def load_denoiser(root: Path, wanted: denoiser.Network | None = None) -> tuple[denoiser.Denoiser, dict[str, Any]]:
    """A model folder's denoising network with its weights, and the content of its config.json.

    Args:
        wanted: the configuration to build, where it is more than what the folder tells.

    Raises:
        UserError: naming what is missing, damaged or not known here.
    """
    folder = denoiser_folder(root)
    stored = read_config(folder)
    made = wanted or denoiser.config_of(stored, str(folder / CONFIG))
    return load_module(made.build, load_weights(folder), folder), stored
