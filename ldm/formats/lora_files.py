"""Adapter files in peft's, diffusers', kohya's, LyCORIS' and OneTrainer's formats, read; LoRA, DoRA, LoHa and LoKr written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.formats.atomic import sha256, write_tensors
from ldm.formats.embedding_files import embedding_of
from ldm.formats.lora_keys import BUNDLED, LONGEST, PARTS, place_of
from ldm.formats.lora_scales import Stated, in_header
from ldm.formats.part import read_json
from ldm.formats.weights_file import read_weights
from ldm.models.layer_adapters import Difference, Hadamard, Kronecker, LayerAdapter, Pair, Whole
from ldm.models.lora import TEXT_PREFIX, Lora, Part, exact, flat, flat_prefix

Style = Literal["diffusers", "peft", "kohya"]
DIFFUSERS = "pytorch_lora_weights.safetensors"
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
KOHYA = "kohya.safetensors"
CUSTOM, CUSTOM_BIN = "pytorch_custom_diffusion_weights.safetensors", "pytorch_custom_diffusion_weights.bin"
UNCHANGED = ".processor"  # the end of a key, and an empty tensor: an attention that Custom Diffusion has not changed
ENDINGS = (".safetensors", ".pt", ".bin")
KNOWN = "LoRA, LoCon, LoHa, LoKr, DoRA, whole differences and Custom Diffusion's keys and values are"


def read(path: str | Path) -> Lora:
    """Load the adapters of a file, or of a folder: peft's, diffusers', a run's, or one with a single file.

    Raises:
        UserError: if there is none, or naming weights that are no part of an adapter known here, or scales that cannot be applied.
    """
    file = find(at_home(path))
    state, metadata = read_weights(file)
    stated: Mapping[str, Stated] = in_header(metadata, str(file))
    if file.name == PEFT and (file.parent / PEFT_CONFIG).is_file():
        whole = Stated(read_json(file.parent / PEFT_CONFIG), str(file.parent / PEFT_CONFIG))
        stated = dict.fromkeys(PARTS.values(), whole)
    layers: dict[tuple[Part, str], dict[str, Tensor]] = {}
    names: dict[tuple[Part, str], str] = {}
    bundled: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in state.items():
        if key.endswith(UNCHANGED) and not value.numel():
            continue
        if key.startswith(BUNDLED) and len(key) <= LONGEST:
            word, _, rest = key.removeprefix(BUNDLED).partition(".")
            bundled.setdefault(word, {})[rest] = value
        elif (place := place_of(key, PARTS.get(file.parent.name))) is None:
            unknown.append(key)
        elif layers.setdefault(place[:2], {}).setdefault(place.role, value) is not value:
            raise UserError(f"{file}: {key[:100]}: this weight is in it twice, under two names; give another file")
        else:
            names[place[:2]] = place.written
    pairs: dict[Part, dict[str, LayerAdapter]] = {}
    for (part, layer), weights in layers.items():
        made = _adapter(weights, stated.get(part), names[part, layer], f"{file}: {layer}")
        if made is None:
            unknown.append(f"{layer} with {', '.join(sorted(weights)) or 'alpha'} alone")
        else:
            pairs.setdefault(part, {})[layer] = made
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        shown = ", ".join(key[:100] for key in unknown[:3])
        raise UserError(f"{file}: {shown}{more}: no weights of an adapter known here ({KNOWN})")
    words = tuple(embedding_of(word, parts, str(file), "") for word, parts in bundled.items())
    notes = [f"{path} brings the words {', '.join(bundled)}, which prompts may have now"] if bundled else []
    if (said := metadata.get("ss_network_alpha")) and not any(key.endswith(".alpha") for key in state):
        notes.append(f"{path}: its header tells alpha {said[:20]}, but its weights none; it is drawn at a scale of 1, as other programs do")
    notes += _unmoved([one for part in pairs.values() for one in part.values()], str(path))
    return Lora(pairs=pairs, metadata=metadata, name=str(path), hash=sha256(file), words=words, notes=tuple(notes))


def _unmoved(adapters: list[LayerAdapter], name: str) -> list[str]:
    """What is told of a file where a scale of 0, or nothing but zeros, leaves the model as it is."""
    if adapters and all(one.idle for one in adapters):
        return [f"{name} changes nothing: in each of its layers alpha or a whole matrix is 0; it has not learned, or was saved wrong"]
    still = sum(not one.scale for one in adapters)
    have = "has" if still == 1 else "have"
    return [f"{name}: {still} of its {plural(len(adapters), 'layer')} {have} the alpha 0 and so no effect"] if still else []


def _adapter(weights: dict[str, Tensor], stated: Stated | None, name: str, where: str) -> LayerAdapter | None:
    """The adapter of a layer from its weights by role; None: they are not all that one has.

    Raises:
        UserError: for tensors or scales that cannot be.
    """
    for role, value in weights.items():
        _check(role, value, where)
    get = weights.pop
    alpha, bias = get("alpha", None), get("bias", None)
    magnitude = get("magnitude", None)
    if (theirs := get("peft_magnitude", None)) is not None:
        magnitude = theirs.flatten()  # of a convolution (1,out,1,1)
    if stated is not None and stated.dora and magnitude is None:
        raise UserError(f"{where}: {stated.where} describes DoRA, but there is no magnitude of this layer; copy the file again")

    def scale(rank: int) -> float:
        """alpha of a rank: as the weights say, else as it is stated, else as large as the rank."""
        if alpha is not None:
            return float(alpha)
        if stated is None:
            return float(rank)
        if (told := stated.rank_of(name)) not in (None, rank):
            said = f"{stated.where} says rank {told:g} of it"
            raise UserError(f"{where}: its rank is {rank}, but {said}; its scale is not known")
        return stated.alpha_of(name, rank)

    more: dict[str, Any] = {"magnitude": magnitude, "bias": bias}
    match frozenset(weights):
        case roles if {"down", "up"} <= roles <= {"down", "up", "mid", "up_bias"}:
            own = scale(len(weights["down"]))
            if (added := weights.get("up_bias")) is not None:
                more["bias"] = added * (own / len(weights["down"]))
            return Pair(weights["down"], weights["up"], own, weights.get("mid"), **more)
        case roles if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} == roles - {"hada_t1", "hada_t2"} and len(roles) != 5:
            kernels = (weights["hada_t1"], weights["hada_t2"]) if "hada_t1" in roles else None
            first, second = (weights["hada_w1_a"], weights["hada_w1_b"]), (weights["hada_w2_a"], weights["hada_w2_b"])
            return Hadamard(first, second, scale(len(first[1])), kernels, **more)
        case roles if _factor("lokr_w1", roles) and _factor("lokr_w2", roles) and all(role.startswith("lokr") for role in roles):
            one, other = (tuple(weights[role] for role in _factor(factor, roles)) for factor in ("lokr_w1", "lokr_w2"))
            kernel = weights.get("lokr_t2")
            if len(one) == len(other) == 1:
                # LyCORIS scales no product of two whole matrices; peft does, by the rank that it states.
                by_peft = stated is not None and stated.kind == "LOKR"
                rank = int(stated.rank_of(name) or 1) if by_peft and stated is not None else 1
                return Kronecker(one, other, scale(rank) if by_peft else 1.0, rank, kernel, **more)
            rank = len(other[1] if len(other) == 2 else one[1])
            return Kronecker(one, other, scale(rank), rank, kernel, **more)
        case roles if roles == {"whole"} and bias is None and magnitude is None:
            return Whole(weights["whole"])
        case roles if roles == {"diff"} or (not roles and bias is not None):
            return Difference(weight=weights.get("diff"), **more)
    return None


def _factor(name: str, roles: frozenset[str]) -> tuple[str, ...]:
    """The roles that make a factor of LoKr; none: they do not make one."""
    parts = (f"{name}_a", f"{name}_b")
    if name in roles:
        return () if roles & set(parts) else (name,)
    return parts if roles >= set(parts) else ()


def _check(role: str, value: Tensor, where: str) -> None:
    """Refuse tensors that are no numbers, and shapes that no adapter has.

    Raises:
        UserError: naming the tensor and its shape.
    """
    got = f"{where}: {role} of shape {list(value.shape)}"
    if not value.is_floating_point() and role != "alpha":
        raise UserError(f"{got} is of {str(value.dtype).removeprefix('torch.')}, not of floating-point numbers")
    least, most = {"alpha": (0, 4), "bias": (1, 1), "up_bias": (1, 1), "magnitude": (1, 4), "peft_magnitude": (1, 4)}.get(role, (2, 4))
    least = 1 if role == "diff" else least
    if not least <= value.ndim <= most or not value.numel() or (role == "alpha" and value.numel() != 1):
        raise UserError(f"{got}: no such weight is known of an adapter; the file is damaged")
    if not bool(value.float().isfinite().all()):
        raise UserError(f"{got} has values that are no finite numbers; the training went wrong, or the file is damaged")


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
        for name in (DIFFUSERS, PEFT, CUSTOM, CUSTOM_BIN):
            if (folder / name).is_file():
                return folder / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        several = f"{len(files)} safetensors files, none of a usual name" if files else "no safetensors file"
        raise UserError(f"{path}: {several} here; give the LoRA's file itself")
    return files[0]


# Writing


def write(
    lora: Lora, folder: Path, style: Style = "diffusers", metadata: Mapping[str, str] | None = None, sgm: Mapping[str, str] | None = None
) -> list[Path]:
    """Write adapters with dotted names into a folder in one of the styles; returns its files, none where the style has no such adapters.

    Args:
        metadata: texts for the header; kohya's style has `ss_*` besides.
        sgm: the denoising network's layers by their flat names in sgm's code, which kohya's style then has, as of Stable Diffusion XL.
    """
    theirs = {layer: name for name, layer in (sgm or {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    texts = dict(metadata or {})
    if style == "peft":
        return [_write_peft(pairs, folder / (lora.network if part == "unet" else part), texts) for part, pairs in lora.pairs.items()]
    if style == "diffusers" and not all(isinstance(pair, Pair) for pairs in lora.pairs.values() for pair in pairs.values()):
        return []
    tensors: dict[str, Tensor] = {}
    for part, pairs in lora.pairs.items():
        for name, pair in pairs.items():
            own = _in_kohya(pair) if style == "kohya" else _in_diffusers(pair)
            head = _kohya_name(part, name, lora, theirs) if style == "kohya" else _diffusers_name(part, name, lora)
            tensors |= {f"{head}.{end}": value for end, value in own.items()}
    file = folder / (KOHYA if style == "kohya" else DIFFUSERS)
    write_tensors(file, tensors, texts | (kohya_metadata(lora) if style == "kohya" else {}))
    return [file]


def write_custom(lora: Lora, folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write whole keys and values of the text as diffusers' `load_attn_procs` reads Custom Diffusion's; returns the file.

    Each attention to places has an empty tensor, by which that knows that it stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, pair in lora.pairs["unet"].items():
        assert isinstance(pair, Whole)
        layer, _, projection = name.rpartition(".")
        tensors[f"{layer}.processor.{projection}_custom_diffusion.weight"] = pair.weight
        tensors[f"{layer.removesuffix('attn2')}attn1{UNCHANGED}"] = torch.empty(0)
    write_tensors(folder / CUSTOM, tensors, dict(metadata))
    return folder / CUSTOM


def _kohya_name(part: Part, name: str, lora: Lora, theirs: Mapping[str, str]) -> str:
    if part == "unet":
        return f"lora_unet_{theirs.get(name) or flat(name)}"
    number = "" if "text_encoder_2" not in lora.pairs else "2" if part == "text_encoder_2" else "1"
    return f"lora_te{number}_{flat_prefix()}{flat(name)}"


def _diffusers_name(part: Part, name: str, lora: Lora) -> str:
    return f"{lora.network}.{name}" if part == "unet" else f"{part}.{TEXT_PREFIX}{name}"


def _in_kohya(pair: LayerAdapter) -> dict[str, Tensor]:
    """A layer's weights by the ends of kohya's and LyCORIS' keys."""
    weights = {end: value.contiguous() for end, value in _weights(pair).items()}
    if isinstance(pair, Kronecker) and len(pair.first) == len(pair.second) == 1:
        weights["lokr_w1"] = weights["lokr_w1"] * pair.scale  # LyCORIS scales no product of two whole matrices
    if isinstance(pair, Pair | Hadamard | Kronecker):
        weights["alpha"] = torch.tensor(pair.alpha)
    if pair.magnitude is not None:
        weights["dora_scale"] = pair.magnitude.view(-1, *[1] * (weights["lora_down.weight"].ndim - 1))
    return weights


def _in_diffusers(pair: LayerAdapter) -> dict[str, Tensor]:
    """A layer's LoRA by the ends of diffusers' keys; not every reader of this style knows alpha, so it is in the weights."""
    assert isinstance(pair, Pair)
    dora = {} if pair.magnitude is None else {"lora_magnitude_vector": _as_peft(pair.magnitude, pair)}
    return {"lora_A.weight": pair.down, "lora_B.weight": pair.up * pair.scale, **dora}


def _as_peft(magnitude: Tensor, pair: Pair) -> Tensor:
    return magnitude if pair.down.ndim == 2 else magnitude.view(1, -1, 1, 1)


def _weights(pair: LayerAdapter) -> dict[str, Tensor]:
    """What it is made of, by the ends of LyCORIS' keys, which are peft's too but for LoRA's."""
    match pair:
        case Pair():
            return {"lora_down.weight": pair.down, "lora_up.weight": pair.up}
        case Hadamard():
            return dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), (*pair.first, *pair.second), strict=True))
        case Kronecker():
            parts = (("lokr_w1", pair.first), ("lokr_w2", pair.second))
            return {(name if len(own) == 1 else f"{name}_{'ab'[i]}"): own[i] for name, own in parts for i in range(len(own))}
    raise TypeError(f"{type(pair).__name__} is not written")


def kohya_metadata(lora: Lora) -> dict[str, str]:
    """Metadata (ss_*) that kohya's scripts and the programs that read their files look for."""
    pairs: list[Any] = [pair for part in lora.pairs.values() for pair in part.values()]
    ranks, alphas = {pair.rank for pair in pairs}, {pair.alpha for pair in pairs}
    algorithm = "loha" if isinstance(pairs[0], Hadamard) else "lokr" if isinstance(pairs[0], Kronecker) else "lora"
    plain = algorithm == "lora" and pairs[0].magnitude is None
    lycoris = {"algo": algorithm} | ({"dora_wd": "True"} if pairs[0].magnitude is not None else {})
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        **({} if plain else {"ss_network_args": json.dumps(lycoris)}),
    }


def _write_peft(pairs: Mapping[str, Any], folder: Path, metadata: dict[str, str]) -> Path:
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(pairs.values()))
    kind: Any = LoHaConfig if isinstance(first, Hadamard) else LoKrConfig if isinstance(first, Kronecker) else LoraConfig
    config = kind(
        r=first.rank,
        target_modules=sorted(pairs),
        rank_pattern={exact(name): pair.rank for name, pair in pairs.items() if pair.rank != first.rank},
        alpha_pattern={exact(name): _whole(pair.alpha) for name, pair in pairs.items() if pair.alpha != first.alpha},
        **({"lora_alpha": _whole(first.alpha), "use_dora": first.magnitude is not None} if isinstance(first, Pair) else {}),
        **({} if isinstance(first, Pair) else {"alpha": _whole(first.alpha)}),
    )
    config.save_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        own = _weights(pair)
        if isinstance(pair, Pair):
            own = {"lora_A.weight": pair.down, "lora_B.weight": pair.up}
            if pair.magnitude is not None:
                own["lora_magnitude_vector"] = _as_peft(pair.magnitude, pair)
        tensors |= {f"base_model.model.{name}.{end}": value.contiguous() for end, value in own.items()}
    write_tensors(folder / PEFT, tensors, metadata)
    return folder / PEFT


def _whole(alpha: float) -> Any:
    """peft types alpha as a whole number, and takes any."""
    return int(alpha) if alpha == int(alpha) else alpha
