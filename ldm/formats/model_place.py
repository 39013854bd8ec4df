"""Where a model lies, as far as a look at its place tells: what is no model is told without loading torch."""

from __future__ import annotations

import json
from pathlib import Path

from ldm.config.files import at_home

OF_MODELS = ("model_index.json", "ldm.json", "scheduler")  # one of which every model folder has


def mistaken(name: str) -> str:
    """What is wrong with the name of a model; empty: nothing. A name on the hub may be there."""
    place = at_home(name.partition("::")[0])
    if place.suffix in (".yaml", ".yml"):
        run = f"runs/{place.stem}" if place.name != "config.yaml" else str(place.parent)
        return f"{place}: a configuration, and no model; train it, and give its run folder, such as {run}"
    words = name.split("/")
    hub = len(words) == 2 and all(words) and not name.startswith((".", "~")) and not Path(words[0]).is_dir()
    if hub or place.exists():
        return ""
    return f"{name}: no such folder or file; give a model or run folder, a weights file, or a hub name such as owner/name"


def no_model(name: str) -> str:
    """What is wrong with where a model lies; empty: nothing that a look shows."""
    place = at_home(name.partition("::")[0])
    if (said := mistaken(name)) or not place.is_dir():
        return said
    if (place / "stages").is_dir() and not (place / "model").is_dir():
        why = "its run is not finished, or its configuration has no export stage"
        return f"{place}: a run without a model: {why}: start it again, or add one to stages"
    if not any((root / file).exists() for root in (place, place / "model") for file in OF_MODELS):
        return f"{place}: no model in this folder (neither model_index.json nor ldm.json); give the folder of a model or of a run"
    return ""


def factor_of(name: str) -> int:
    """What sides of pictures are multiples of, px, as a model folder with a U-Net tells by its autoencoder; 1: it does not tell."""
    root = at_home(name)
    place = next((folder for folder in (root, root / "model") if (folder / "unet").is_dir()), None)
    if place is None:
        return 1
    try:
        said = json.loads((place / "vae" / "config.json").read_text(encoding="utf-8"))
        halved = len(said["block_out_channels"]) - 1 if said["_class_name"] in ("AutoencoderKL", "VQModel") else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 1
    return int(2**halved)
