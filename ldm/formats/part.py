"""Model components in diffusers' layout (config.json and safetensors), read and written."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.config.errors import UserError
from ldm.config.files import read_bounded
from ldm.formats.atomic import MANIFEST
from ldm.formats.integrity import COUNTED, check, checksums
from ldm.formats.signature import instead
from ldm.formats.tensor_file import read_tensors

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model", "model")  # file stems, diffusers' first, then transformers'
PARTS = ("unet", "transformer", "vae", "vqvae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
JSON_BYTES = 2**26  # at most; the tokenizer.json of a large vocabulary has 35 MB
AGAIN = "copy the whole model folder again"
M = TypeVar("M", bound=nn.Module)


def save_part(config: dict[str, Any], state: dict[str, Tensor], folder: Path, stem: str = WEIGHTS[0]) -> None:
    """Save a component: config.json and `stem`.safetensors in `folder`, each file written atomically."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous().cpu() for name, value in state.items()}
    # Through Python's own files, whose errors say what the disk said.
    write_whole(folder / f"{stem}.safetensors", save(tensors, metadata={"format": "pt"}))
    write_whole(folder / CONFIG, json.dumps(config, indent=2).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Atomic file write: a temporary name, fsync, one rename."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_part(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load a component: config.json and weights; single files, `.fp16` variants and sharded files with an index.

    Raises:
        UserError: naming the file that is missing or damaged, and the fix.
    """
    return read_config(folder), load_weights(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The part's config.json.

    Raises:
        UserError: if it is missing or not JSON.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a model folder has the parts unet, vae, text_encoder and tokenizer")
    return read_json(folder / CONFIG)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
        UserError: if it is missing or holds something else.
    """
    try:
        values = json.loads(read_bounded(file, JSON_BYTES).decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON ({error}); {AGAIN}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: a JSON object was expected; {AGAIN}")
    return values


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a component whose configuration is known to make sense, compared with the manifest.

    Files are read into memory, not mapped, so that a later rewrite cannot kill the reader.

    Raises:
        UserError: naming the file that is missing, damaged or changed.
    """
    state: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        part = read_safetensors(file)
        if twice := state.keys() & part.keys():
            raise UserError(f"{file}: {min(twice)} is in another file of this part too; {AGAIN}")
        state |= part
    check(folder)
    return _modern(state)


def _modern(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention weights under diffusers' present names; the autoencoders of Stable Diffusion 1.x still have those of 2022."""
    if not any(".proj_attn." in name for name in state):
        return state
    today = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        words = name.split(".")
        if "attentions" in words and len(words) > 1 and words[-2] in today:
            words[-2] = today[words[-2]]
            value = value[:, :, 0, 0] if value.ndim == 4 else value  # older still: 1x1 convolutions
        found[".".join(words)] = value
    return found


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in memory.

    Raises:
        UserError: if it is missing, truncated or something else.
    """
    try:
        return read_tensors(file)[0]
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {AGAIN}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        if found := instead(file):
            raise UserError(f"{file}: {found}") from None
        raise UserError(f"{file}: truncated or not a safetensors file ({error}); copy it again") from None


def _weight_files(folder: Path) -> list[Path]:
    for stem in WEIGHTS:
        for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
            if (folder / name).is_file():
                return [folder / name]
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"):
            if (folder / name).is_file():
                return _shards(folder / name)
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")]):
        raise UserError(f"{pickles[0]}: pickled weights can run code and are not read; convert the model to safetensors")
    raise UserError(f"{folder}: no weights here; {WEIGHTS[0]}.safetensors was expected; {AGAIN}")


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: has no weight_map from names to files; {AGAIN}")
    for name in names.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: names {name!r}, which is no safetensors file beside it; {AGAIN}")
    return [index.parent / name for name in sorted(set(names.values()))]


class SkipInit(TorchFunctionMode):
    """Context that skips weight initialisation of meta tensors and parameters, whose values would be lost.

    On the meta device some of these functions are written in Python, and importing what they are written in takes seconds.
    """

    FILLS = re.compile(r"(kaiming_|xavier_|trunc_)?(normal|uniform)_|(zero|one|constant|fill|orthogonal)s?_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The call, or the tensor as it is."""
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        replaced = isinstance(tensor, nn.Parameter) or (isinstance(tensor, Tensor) and tensor.is_meta)
        if replaced and self.FILLS.fullmatch(getattr(func, "__name__", "")):
            return tensor
        return func(*args, **kwargs)


def load_module(build: Callable[[], M], state: dict[str, Tensor], where: Path) -> M:
    """Build a module and load exactly the weights of `state` (strict), in the data types that `build` chose.

    Tensors of the right type that alone fill their storage become the module's own, others are copied: storage begins at an
    aligned address, and the bits of results may depend on that. PyTorch's global random state is left as it was.

    Raises:
        UserError: naming weights that are missing, left over, of another shape or no floating-point numbers.
    """
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"), SkipInit():
            module = build()
        wanted = module.state_dict()
        compare(wanted, state, where)
        if {name for name, _ in module.named_buffers()} - wanted.keys():
            with SkipInit():
                module = build()  # buffers that are not stored exist only where they were computed
    module.load_state_dict({name: _own(state[name], value.dtype) for name, value in wanted.items()}, assign=True)
    return module


def _own(value: Tensor, kind: torch.dtype) -> Tensor:
    alone = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value.to(kind, copy=not alone)


def compare(wanted: dict[str, Tensor], state: dict[str, Tensor], where: Path) -> None:
    """Strict state dict check: names, shapes and floating-point types.

    Raises:
        UserError: naming weights that are missing, left over, of another shape or no floating-point numbers.
    """
    problems = _named("missing", wanted.keys() - state.keys()) + _named("left over", state.keys() - wanted.keys())
    for name in sorted(wanted.keys() & state.keys()):
        if wanted[name].shape != state[name].shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, not {list(wanted[name].shape)}")
        elif wanted[name].is_floating_point() and not state[name].is_floating_point():
            problems.append(f"{name} is {state[name].dtype}".replace("torch.", ""))
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        known = " config.json" if where.is_dir() else ""
        raise UserError(f"{where}: the weights do not fit{known}: {'; '.join(problems[:4])}{more}")


def _named(what: str, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [f"{what}: {', '.join(found[:3])}{more}"]


def content_hash(folder: Path) -> str:
    """Content hash of a component or model: of the names and contents of its configurations, vocabularies and weights.

    Model cards, pictures, hidden files and manifests do not count.

    Raises:
        UserError: naming a file that differs from the manifest it was written with.
    """
    check(folder)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix in COUNTED and path.is_file()]
    names = [name for name in names if name.name != MANIFEST and not any(word.startswith(".") for word in name.parts)]
    hasher = hashlib.sha256()
    for name, found in zip(names, checksums(folder / name for name in names), strict=True):
        hasher.update(f"{name.as_posix()}\0{found}\n".encode())
    return hasher.hexdigest()
