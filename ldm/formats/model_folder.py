"""Model resolution: a folder, run folder, single-file checkpoint or Hugging Face Hub name becomes a model folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.foreign import short
from ldm.formats.denoiser_folder import denoiser_folder, unconditional
from ldm.formats.integrity import COUNTED
from ldm.formats.model_place import mistaken
from ldm.formats.part import AGAIN, CONFIG, PARTS, read_json
from ldm.formats.single_file import REFUSED, named, open_single


@dataclass(frozen=True)
class Model:
    """Resolved model folder, and the components in it."""

    folder: Path
    parts: tuple[str, ...]


def say(text: str) -> None:
    """A notice on standard error."""
    print(f"note: {text}", file=sys.stderr)


def root_of(name: Path | str, note: Callable[[str], None] = say) -> Path:
    """The folder that a model's name means: itself, a run's model/, a single file's opened folder, or the hub's copy.

    Raises:
        UserError: saying what was looked for and where.
    """
    folder = at_home(name)
    if said := mistaken(str(name)):
        raise UserError(said)
    if file := named(str(name)):
        folder = open_single(*file, note=note)
        if "kind" not in read_record(folder) and (missing := _missing(folder)):
            held = ", ".join(_present(folder)) or "nothing that is known"
            raise UserError(f"{file[0]}: holds {held} alone; {', '.join(missing)} missing; give a whole checkpoint")
    elif not folder.is_dir():
        folder = hub_folder(str(name), [f"{part}/*" for part in (*PARTS, OWN_CLIP)] + [INDEX, RECORD])
    return whole_of(folder / "model" if (folder / "model").is_dir() and not denoiser_folder(folder).is_dir() else folder)


def whole_of(folder: Path) -> Path:
    """A model folder, unless it is one that only draws on from another's pictures.

    Raises:
        UserError: for Stable Diffusion XL's refiner.
    """
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    if index.get("requires_aesthetics_score"):
        raise UserError(f"{folder}: {REFUSED}")
    return folder


def open_model(name: Path | str, note: Callable[[str], None] = say) -> Model:
    """A model by folder, by run folder (its model/), by a file in CompVis' naming, or by a name on the Hugging Face Hub.

    Behind a file's name may stand what the file leaves open: `sd.ckpt::ema=no,prediction=v`.

    The network is asked only where LDM_HUB=1; otherwise what the hub's cache on this machine holds is all there is.

    Raises:
        UserError: saying what was looked for and where.
    """
    folder = root_of(name, note)
    if missing := _missing(folder):
        if any(folder.glob("unet/model.onnx")) or any(folder.glob("unet/openvino_model.xml")):
            raise UserError(f"{folder}: an ONNX or OpenVINO export, which ldm writes and does not open; give the model that it was made of")
        unfinished = "its run is not finished, or its configuration has no export stage: start it again, or add one to stages"
        fix = unfinished if (folder / "stages").is_dir() else AGAIN
        raise UserError(f"{folder}: not a whole model folder, {', '.join(missing)} missing; {fix}")
    return Model(folder, _present(folder))


def _present(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name in PARTS))


def _missing(folder: Path) -> list[str]:
    """The parts that a model needs to draw, and that a folder has not."""
    parts, wanted = _present(folder), [denoiser_folder(folder).name, "scheduler"]
    if unconditional(folder):
        return [part for part in wanted if part not in parts]
    wanted += ["vae", "text_encoder", "tokenizer"]
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    if any(name in parts or (isinstance(index.get(name), list) and all(index[name])) for name in PAIRED):
        wanted += PAIRED
    return [part for part in wanted if part not in parts and not (part == "vae" and "vqvae" in parts)]


def online() -> bool:
    """Whether the network was asked for."""
    return os.environ.get("LDM_HUB", "") not in ("", "0")


def hub_folder(name: str, patterns: list[str]) -> Path:
    """Where the Hugging Face Hub's copy of `owner/name` lies on this machine, after fetching what is not there yet.

    Args:
        name: owner/name.
        patterns: which files of the repository; of these only configurations, vocabularies and safetensors.

    Raises:
        UserError: if it is no such name, or cannot be had.
    """
    if said := mistaken(name):
        raise UserError(said)
    try:
        from huggingface_hub import snapshot_download

        wanted = [p if p.endswith(COUNTED) else p + suffix for p in patterns for suffix in COUNTED]
        left_out = ["*.fp16.*", "*non_ema*"]
        found = snapshot_download(name, allow_patterns=sorted(set(wanted)), ignore_patterns=left_out, local_files_only=not online())
        return Path(found)
    except Exception as error:  # of the network, of the hub, of the disk: each library has its own
        if not online():
            raise UserError(
                f"{name}: no such folder, and the hub's cache on this machine has no such model. The network is used only when it is"
                " asked for: --hub, or LDM_HUB=1"
            ) from None
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: no such folder, and it could not be had from the hub ({lines[0][:200]})") from None


PAIRED = ("text_encoder_2", "tokenizer_2")  # of a model with two text encoders, besides those of one with one
RECORD, INDEX = "ldm.json", "model_index.json"
OWN_CLIP, IMAGE_TOWER = "clip", "image_tower"  # the CLIP that the run has trained, which diffusers passes over; in it a convolutional tower


def own_clip(folder: Path) -> Path | None:
    """Where the CLIP of a product's or model's own run lies, both towers of it; None: there is none."""
    clip = folder / OWN_CLIP
    return clip if (clip / IMAGE_TOWER).is_dir() or whole_clip(clip) else None


def clip_in(folder: Path) -> Path | None:
    """The same, where the folder may be a CLIP of both towers itself."""
    return own_clip(folder) or (folder if (folder / IMAGE_TOWER).is_dir() or whole_clip(folder) else None)


def whole_clip(folder: Path) -> bool:
    """Whether a folder is what transformers' CLIPModel opens, a text and an image tower in one."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == "clip"


def read_record(folder: Path) -> dict[str, Any]:
    """What ldm.json of a product or model folder says; nothing where there is none.

    Raises:
        UserError: if it is not JSON, or says something of another type than it should.
    """
    file = folder / RECORD
    found = read_json(file) if file.exists() else {}
    for name, kind in {"kind": str, "autoencoder": str, "config": dict, "story": dict, "defaults": dict, "scheduler": dict}.items():
        if name in found and not isinstance(found[name], kind):
            raise UserError(f"{file}: {name} is {short(found[name])}; {'a text' if kind is str else 'an object'} is needed; {AGAIN}")
    return found
