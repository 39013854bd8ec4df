"""LoRA files in peft's, diffusers' and kohya's key formats, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.formats.atomic import sha256, write_tensors
from ldm.formats.part import read_json, read_safetensors
from ldm.formats.tensor_file import read_texts
from ldm.models.lora import TEXT_PREFIX, Lora, Pair, Part, flat, flat_prefix

Style = Literal["diffusers", "peft", "kohya"]
DIFFUSERS = "pytorch_lora_weights.safetensors"
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
KOHYA = "kohya.safetensors"
PARTS: dict[str, Part] = {
    "unet": "unet",
    "text_encoder": "text_encoder",
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
}
DOTTED = re.compile(
    r"(?:(?P<part>unet|text_encoder)\.)?(?:base_model\.model\.)?(?P<layer>.+?)"
    r"\.(?:(?P<end>lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)(?:\.default)?\.weight|alpha)"
)
PROCESSOR = re.compile(r"(?P<head>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora\.(?P<end>down|up)\.weight")  # of 2023
FLAT = re.compile(r"(?P<part>lora_unet|lora_te1?)_(?P<layer>[^.]+)\.(?:(?P<end>lora_down|lora_up)\.weight|alpha)")
UNET_STARTS = ("down_blocks", "mid_block", "up_blocks", "conv_", "time_embedding", "add_embedding", "pooled_embedding")


def read(path: str | Path) -> Lora:
    """Load the LoRA of a file, or of a folder: peft's, diffusers', a run's, or one with a single safetensors file.

    Raises:
        UserError: if there is none, or naming weights that are no part of a plain LoRA.
    """
    file = find(Path(path).expanduser())
    state, metadata = read_safetensors(file), read_texts(file)
    alphas: Callable[[str, int], float] | None = None
    if file.name == PEFT and (file.parent / PEFT_CONFIG).is_file():
        alphas = _peft_alphas(file.parent / PEFT_CONFIG)
    halves: dict[tuple[Part, str], dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        place = _place(key)
        if place is None:
            unknown.append(key)
        else:
            halves.setdefault(place[:2], {})[place[2]] = value
    unknown += [f"{layer} without its other half" for (_, layer), half in halves.items() if not {"up", "down"} <= half.keys()]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(f"{file}: {', '.join(unknown[:3])}{more}: no weights of a LoRA known here (plain ones are: up, down, alpha)")
    pairs: dict[Part, dict[str, Pair]] = {}
    for (part, layer), half in halves.items():
        rank = len(half["down"])
        alpha = float(half["alpha"]) if "alpha" in half else alphas(layer, rank) if alphas else _stated(metadata, part, layer, rank)
        pairs.setdefault(part, {})[layer] = Pair(half["down"], half["up"], alpha)
    return Lora(pairs=pairs, metadata=metadata, name=str(path), hash=sha256(file))


def find(path: Path) -> Path:
    """Locate a LoRA file: the path itself, or what a folder or a run folder has of the usual names.

    Raises:
        UserError: if there is none, or several and none of a usual name.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file; give a LoRA's .safetensors file or its folder")
    for folder in (path, path / "model"):
        for name in (DIFFUSERS, PEFT):
            if (folder / name).is_file():
                return folder / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        several = f"{len(files)} safetensors files, none of a usual name" if files else "no safetensors file"
        raise UserError(f"{path}: {several} here; give the LoRA's file itself")
    return files[0]


def _place(key: str) -> tuple[Part, str, str] | None:
    """Part, layer and role (down, up, alpha) of a weight; None: not of a plain LoRA."""
    roles = {"lora_A": "down", "lora_B": "up", None: "alpha"}
    if found := FLAT.fullmatch(key):
        return (
            PARTS[found["part"]],
            found["layer"].removeprefix(flat_prefix()),
            {"lora_down": "down", "lora_up": "up"}.get(found["end"] or "", "alpha"),
        )
    if found := PROCESSOR.fullmatch(key):
        layer = f"{found['head'].removeprefix('unet.')}.{found['layer'].replace('to_out', 'to_out.0')}"
        return "unet", layer, found["end"]
    if found := DOTTED.fullmatch(key):
        layer, end = found["layer"], found["end"]
        part = cast("Part", found["part"] or ("unet" if layer.startswith(UNET_STARTS) else "text_encoder"))
        return part, layer.removeprefix(TEXT_PREFIX), roles.get(end) or end.rsplit(".", 1)[-1]
    return None


def _peft_alphas(file: Path) -> Callable[[str, int], float]:
    """alpha of a layer by name and rank, as an adapter_config.json tells it.

    Raises:
        UserError: if it describes something else than a plain LoRA.
    """
    values = read_json(file)
    odd = [name for name in ("use_dora", "lora_bias") if values.get(name)]
    if values.get("peft_type", "LORA") != "LORA" or odd:
        raise UserError(f"{file}: describes {odd[0] if odd else values['peft_type']}, but only plain LoRA is known here")
    patterns: dict[str, float] = values.get("alpha_pattern") or {}
    usual = float(values.get("lora_alpha", 8))

    def alpha(layer: str, rank: int) -> float:
        own = next((float(v) for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", layer)), usual)
        return own * rank**0.5 if values.get("use_rslora") else own

    return alpha


def _stated(metadata: Mapping[str, str], part: Part, layer: str, rank: int) -> float:
    """alpha where no weight tells it: as diffusers' header says, else as large as the rank."""
    try:
        said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        patterns = said.get(f"{part}.alpha_pattern") or {}
        own = next((float(v) for p, v in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", layer)), None)
        return float(said.get(f"{part}.lora_alpha", rank)) if own is None else own
    except (ValueError, AttributeError, TypeError):
        return float(rank)


# Writing


def write(lora: Lora, folder: Path, style: Style = "diffusers", metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Write a LoRA with dotted names into a folder in one of the styles; returns its files.

    Args:
        metadata: texts for the header; kohya's style has `ss_*` besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = dict(metadata or {})
    if style == "peft":
        return [_write_peft(pairs, folder / part, texts) for part, pairs in lora.pairs.items()]
    tensors: dict[str, Tensor] = {}
    for part, pairs in lora.pairs.items():
        for name, pair in pairs.items():
            if style == "kohya":
                key = f"lora_unet_{flat(name)}" if part == "unet" else f"lora_te_{flat_prefix()}{flat(name)}"
                tensors |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
                tensors[f"{key}.alpha"] = torch.tensor(pair.alpha)
            else:
                key = f"unet.{name}" if part == "unet" else f"text_encoder.{TEXT_PREFIX}{name}"
                # Not every reader of this style knows alpha, so it is in the weights.
                tensors |= {f"{key}.lora_A.weight": pair.down, f"{key}.lora_B.weight": pair.up * pair.scale}
    file = folder / (KOHYA if style == "kohya" else DIFFUSERS)
    write_tensors(file, tensors, texts | (kohya_metadata(lora) if style == "kohya" else {}))
    return [file]


def kohya_metadata(lora: Lora) -> dict[str, str]:
    """Metadata (ss_*) that kohya's scripts and the programs that read their files look for."""
    pairs = [pair for part in lora.pairs.values() for pair in part.values()]
    ranks, alphas = {pair.rank for pair in pairs}, {pair.alpha for pair in pairs}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }


def _write_peft(pairs: Mapping[str, Pair], folder: Path, metadata: dict[str, str]) -> Path:
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(pairs.values()))
    config: Any = LoraConfig(
        r=first.rank,
        lora_alpha=_whole(first.alpha),
        target_modules=sorted(pairs),
        rank_pattern={_exact(name): pair.rank for name, pair in pairs.items() if pair.rank != first.rank},
        alpha_pattern={_exact(name): _whole(pair.alpha) for name, pair in pairs.items() if pair.alpha != first.alpha},
    )
    config.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": pair.down, f"base_model.model.{name}.lora_B.weight": pair.up}
    write_tensors(folder / PEFT, tensors, metadata)
    return folder / PEFT


def _exact(name: str) -> str:
    return re.escape(name)


def _whole(alpha: float) -> Any:
    """peft types alpha as a whole number, and takes any."""
    return int(alpha) if alpha == int(alpha) else alpha
