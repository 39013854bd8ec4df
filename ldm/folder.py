"""A model's parts as diffusers keeps them: a folder with config.json and safetensors, both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.checkpoint import sha256
from ldm.errors import UserError

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model", "model")  # file stems, diffusers' first, then transformers'
M = TypeVar("M", bound=nn.Module)


def save_part(config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors into `folder`."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    # Through Python's own files, whose errors say what the disk said.
    tensors = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    (folder / f"{WEIGHTS[0]}.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def load_part(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of a part; single files, `.fp16` variants and sharded files with an index.

    Files are read into memory, not mapped, so that a later rewrite cannot kill the reader.

    Raises:
        UserError: naming the file that is missing or damaged, and the fix.
    """
    return read_config(folder), _read_weights(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The part's config.json.

    Raises:
        UserError: if it is missing or not JSON.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a model folder has the parts unet, vae, text_encoder and tokenizer")
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text())
    except OSError:
        raise UserError(f"{file} is missing; copy the whole model folder again") from None
    except ValueError as error:
        raise UserError(f"{file} is not readable JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: a JSON object was expected")
    return values


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = _weight_files(folder)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_safetensors(file)
    return state


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory.

    Raises:
        UserError: if it is missing, truncated or something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; copy the whole model folder again") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file}: truncated or not a safetensors file ({error}); copy it again") from None


def _weight_files(folder: Path) -> list[Path]:
    for stem in WEIGHTS:
        for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
            if (folder / name).is_file():
                return [folder / name]
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index}: damaged ({error}); copy it again") from None
            return [folder / name for name in names]
    if pickles := sorted(folder.glob("*.bin")):
        raise UserError(f"{pickles[0]}: pickled weights can run code and are not read; convert the model to safetensors")
    raise UserError(f"{folder}: no weights here; {WEIGHTS[0]}.safetensors was expected. Copy the whole model folder again")


def load_module(build: Callable[[], M], state: dict[str, Tensor], where: Path) -> M:
    """The module that `build` makes, with exactly the weights of `state`.

    Raises:
        UserError: naming weights that are missing, left over or of another shape.
    """
    with torch.device("meta"):
        module = build()
    wanted = module.state_dict()
    problems = _named("missing", wanted.keys() - state.keys()) + _named("left over", state.keys() - wanted.keys())
    for name in sorted(wanted.keys() & state.keys()):
        if wanted[name].shape != state[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, not {list(wanted[name].shape)}")
    if problems:
        raise UserError(f"{where}: the weights do not fit config.json: {'; '.join(problems[:4])}")
    module = build()
    module.load_state_dict(state)
    return module


def _named(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{what}: {', '.join(found[:3])}{more}"]


def content_hash(folder: Path) -> str:
    """One hash of the files below a folder, by name and content; model cards and manifests do not count."""
    hasher = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.endswith(".md") or path.name.startswith(".") or path.name == "manifest.json":
            continue
        hasher.update(f"{name}\0{sha256(path)}\n".encode())
    return hasher.hexdigest()


@dataclass(frozen=True)
class Model:
    """A model folder that has been found, and the parts in it."""

    folder: Path
    parts: tuple[str, ...]


def open_model(name: Path | str) -> Model:
    """A model by folder, by run folder (its model/), or by a name on the Hugging Face Hub.

    Raises:
        UserError: saying what was looked for and where.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name))
    if (folder / "model").is_dir() and not (folder / "unet").is_dir():
        folder = folder / "model"
    parts = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    if missing := [part for part in ("unet", "text_encoder", "tokenizer", "scheduler") if part not in parts]:
        unfinished = "; its run is not finished: start it again" if (folder / "stages").is_dir() else ""
        raise UserError(f"{folder}: not a whole model folder, {', '.join(missing)} missing{unfinished}")
    return Model(folder, parts)


def _download(name: str) -> Path:
    words = name.split("/")
    if len(words) != 2 or not all(words) or name.startswith((".", "~")):
        raise UserError(f"{name}: no such folder. Give a model folder, a run folder, or a hub name such as owner/name")
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.txt", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such folder, and it could not be had from the hub ({reason[:200]})") from None
