"""Generators of the published pix2pix and CycleGAN code (latest_net_G.pth): recognised, opened as a model folder, and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config.schema import plain
from ldm.formats import atomic
from ldm.formats.part import compare, save_part
from ldm.formats.pickles import save_pickle
from ldm.formats.rounding import Comparison, compared, rounded
from ldm.models.translation import Norm, ResNetGeneratorConfig, UNetGeneratorConfig

SIDE = 256  # px, that such files mostly draw


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights of a published generator as they are named today; None: these are others.

    What DataParallel puts before every name goes, and so do statistics of InstanceNorm, which older versions stored and nothing reads.
    """
    bare = {name.removeprefix("module."): value for name, value in state.items()}
    if "model.model.0.weight" not in bare and not ("model.1.weight" in bare and any(".conv_block." in name for name in bare)):
        return None
    tracked = (".running_mean", ".running_var", ".num_batches_tracked")
    own = {name.rpartition(".")[0] for name, value in bare.items() if name.endswith(".weight") and value.ndim == 1}
    return {name: value for name, value in bare.items() if not name.endswith(tracked) or name.rpartition(".")[0] in own}


def config_of(state: Mapping[str, Tensor]) -> tuple[UNetGeneratorConfig | ResNetGeneratorConfig, int, int]:
    """The generator that weights were made for, and the channels of what it reads and draws."""
    norm: Norm = "batch" if any(name.endswith(".running_mean") for name in state) else "none"
    if "model.model.0.weight" in state:
        first, last = state["model.model.0.weight"], state["model.model.3.weight"]
        if norm == "none" and "model.model.0.bias" in state:
            norm = "instance"
        downs = max(name.split(".").count("model") for name in state) - 1
        made = UNetGeneratorConfig(channels=len(first), downs=downs, norm=norm, skips=len(last) == 2 * len(first))
        return made, first.shape[1], last.shape[1]
    blocks = {name.split(".")[1] for name in state if ".conv_block." in name}
    layers = {int(name.split(".")[1]) for name in state if name.endswith(".weight")}
    first, last = state["model.1.weight"], state[f"model.{max(layers)}.weight"]
    if norm == "none" and "model.1.bias" in state:
        norm = "instance"
    dropout = 0.5 if any(name.endswith(".conv_block.6.weight") and value.ndim == 4 for name, value in state.items()) else 0.0
    return ResNetGeneratorConfig(channels=len(first), blocks=len(blocks), norm=norm, dropout=dropout), first.shape[1], len(last)


def write_folder(state: Mapping[str, Tensor], file: Path, folder: Path, note: Callable[[str], None]) -> None:
    """A model folder of kind pix2pix with a published file's generator.

    Raises:
        UserError: naming the weight that is missing or left over.
    """
    config, read, drawn = config_of(state)
    with torch.device("meta"):
        compare(config.build(read, drawn).state_dict(), dict(state), file)
    size = max(SIDE, config.step)
    note(f"{file}: a published generator ({config.kind}, {read} to {drawn} channels); drawn at {size}x{size} px where no size is said")
    save_part({**plain(config), "size": size, "shown": {"form": "map", "channels": read}}, dict(state), folder / "generator")
    said: dict[str, Any] = {"kind": "pix2pix", "view": "source", "generator": plain(config)}
    atomic.write_json(folder / "ldm.json", {"kind": "pix2pix", "config": said, "story": {"from": file.name}})


def write_file(state: Mapping[str, Tensor], file: Path, dtype: str) -> Comparison:
    """Write a generator as torch's pickle of tensors alone, as the published code reads it, and compare what is read back.

    Raises:
        UserError: naming the weight that the precision cannot hold.
    """
    save_pickle({name: value.contiguous() for name, value in rounded(file.name, dict(state), dtype).items()}, file)
    back = torch.load(file, map_location="cpu", weights_only=True)
    return compared(file.name, dict(state), back, dtype, str(file))
