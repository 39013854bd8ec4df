"""Pretrained text encoders: Stable Diffusion's, transformers' CLIP or T5, OpenCLIP."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.foreign import short, typed
from ldm.config.schema import Codes, Depth, PositiveFloat, Width, config
from ldm.formats.atomic import commit, write_tensors
from ldm.formats.clip_folder import tower_shape
from ldm.formats.integrity import cache_folder, check, checksums, is_whole
from ldm.formats.model_folder import INDEX, OWN_CLIP, clip_in, hub_folder
from ldm.formats.open_clip import architectures, check_architecture, from_open_clip, open_clip_tokenizer, tower_size, vision_from_open_clip
from ldm.formats.part import content_hash, load_module, read_json
from ldm.formats.text_folder import TEXT_PARTS, load_text_model, tower_state
from ldm.formats.tokenizer_files import load_tokenizer
from ldm.formats.weights_file import read_weights
from ldm.models.text_tower import TextTower, TowerPair
from ldm.models.vision_tower import Pixels, TowerShape, VisionShape
from ldm.text.encoder import TextEncoder, zeros_in
from ldm.text.own_clip import OwnClip

OPEN_CLIP = "open_clip_config.json"


@config
class OpenClipShape:
    """What an open_clip_config.json says of a text tower, with OpenCLIP's defaults for what it does not."""

    context_length: Codes = 77
    vocab_size: Codes = 49408
    width: Width = 512
    heads: Width = 8
    layers: Depth = 12
    mlp_ratio: PositiveFloat = 4.0
    embed_dim: Width | None = None


@config
class OpenClipVision:
    """What an open_clip_config.json says of an image tower that is a vision transformer, with OpenCLIP's defaults for what it does not."""

    image_size: Width = 224
    patch_size: Width = 16
    width: Width = 768
    head_width: Width = 64
    layers: Depth = 12
    mlp_ratio: PositiveFloat = 4.0


WORDS = ["*.json", "merges.txt", "spiece.model"]  # on the hub: configurations and vocabularies


def load_pretrained(path: str, max_tokens: int = 77, skip_last: int = 0) -> TextEncoder:
    """A text encoder that others have trained, frozen.

    Args:
        path: a model folder, the folder of a CLIP, T5 or OpenCLIP, or its name on the hub as owner/name.
        max_tokens: longer prompts are cut.
        skip_last: CLIP's layers left out at the end.

    Raises:
        UserError: naming what is missing, damaged or of another kind.
    """
    folder = text_folder(path)
    if (folder / "text_encoder").is_dir():
        encoder = TextEncoder.load(folder)
    elif is_open_clip(folder):
        encoder = load_open_clip(folder)
    else:
        encoder = TextEncoder.of(load_text_model(folder), load_tokenizer(folder), folder)
    if skip_last:
        _skip_last(encoder.model, skip_last)
    encoder.tokenizer.model_max_length = min(max_tokens, encoder.max_tokens)
    return encoder


def is_open_clip(folder: Path) -> bool:
    """Whether a folder holds an OpenCLIP, and nothing that transformers would open."""
    return (folder / OPEN_CLIP).is_file() and not (folder / "config.json").is_file()


def both_towers(folder: Path) -> Path | None:
    """Where the CLIP of both towers lies that a text encoder's folder offers: a run's own beside it, or itself; None: there is none."""
    return clip_in(folder) or (folder if is_open_clip(folder) else None)


def vision_shape(clip: Path) -> TowerShape:
    """What builds the image tower of a CLIP of both towers.

    Raises:
        UserError: naming the field that makes no sense, or a tower of another kind.
    """
    if not is_open_clip(clip):
        return tower_shape(clip)
    file, values = clip / OPEN_CLIP, read_json(clip / OPEN_CLIP)
    model, pixels = values.get("model_cfg"), values.get("preprocess_cfg")
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vision, dict):
        raise UserError(f"{file}: no model_cfg with a vision_cfg in it; copy the whole folder again")
    known = {f.name for f in fields(OpenClipVision)}
    usual = {"pool_type": "tok", "pos_embed_type": "learnable", "output_tokens": True, "patch_dropout": vision.get("patch_dropout")}
    if foreign := [name for name, value in vision.items() if name not in known and value not in (None, False, usual.get(name))]:
        raise UserError(f"{file}: vision_cfg.{foreign[0]} is not supported; only CLIP's own vision transformers are")
    said = typed({name: value for name, value in vision.items() if name in known}, OpenClipVision, str(file))
    made = {
        "hidden_size": said.width,
        "intermediate_size": int(said.width * said.mlp_ratio),
        "num_hidden_layers": said.layers,
        "num_attention_heads": max(1, said.width // said.head_width),
        "image_size": said.image_size,
        "patch_size": said.patch_size,
        "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "projection_dim": model.get("embed_dim", 512),
    }
    seen = {f"image_{name}": pixels[name] for name in ("mean", "std") if name in pixels} if isinstance(pixels, dict) else {}
    return VisionShape.from_dict(made, Pixels.from_dict(seen, str(file)), str(file))


def load_clip(clip: Path) -> OwnClip:
    """A CLIP of both towers that others have trained, or a run's own, frozen.

    Raises:
        UserError: naming what is missing, damaged or of another kind.
    """
    if not is_open_clip(clip):
        return OwnClip.load(clip)
    shape, text, state = vision_shape(clip), load_open_clip(clip), _weights(clip)
    assert isinstance(shape, VisionShape)
    tower = load_module(shape.build, vision_from_open_clip(state, shape.num_hidden_layers), clip).float()
    found = next((state[name] for name in ("text_projection", "text.text_projection") if name in state), None)
    if found is None or "logit_scale" not in state:
        raise UserError(f"{clip}: text_projection or logit_scale is missing; copy the whole folder again")
    projection = load_module(lambda: nn.Linear(text.width, shape.embedding, bias=False), {"weight": found.T}, clip).float()
    for network in (tower, projection):
        network.eval().requires_grad_(False)
    return OwnClip(text, projection, tower, state["logit_scale"].float(), shape.image_size)


def text_folder(path: str) -> Path:
    """Where a text encoder lies: a model's folder, a run's model, the encoder's own folder, or the hub's copy.

    Raises:
        UserError: if it is none of them.
    """
    folder = at_home(path)
    if not folder.is_dir():
        return _fetch(path)
    return folder / "model" if (folder / "model" / "text_encoder").is_dir() else folder


def text_hash(folder: Path) -> str:
    """Of the files of a text encoder's own folder, or of those in a model's folder."""
    if not (folder / "text_encoder").is_dir():
        return content_hash(folder)
    parts = [content_hash(folder / part) for part in ("text_encoder", "tokenizer")]
    if (folder / "text_encoder_2").is_dir():
        parts += [content_hash(folder / part) for part in ("text_encoder_2", "tokenizer_2")] + [str(zeros_in(folder))]
    return "".join(parts)


def _fetch(name: str) -> Path:
    folder = hub_folder(name, WORDS)
    if (folder / "text_encoder").is_dir():
        return hub_folder(name, [f"{part}/*" for part in (*TEXT_PARTS, OWN_CLIP)] + [INDEX])
    weights = "model*.safetensors" if (folder / "config.json").is_file() else "open_clip*.safetensors"
    return hub_folder(name, [*WORDS, weights])


def _skip_last(model: Any, layers: int) -> None:
    if not isinstance(model, TextTower):
        kind = "T5" if model.config.model_type == "t5" else type(model).__name__
        pair = isinstance(model, TowerPair)
        how = "two text encoders are read before their last layer" if pair else f"{kind} is read after its last layer"
        raise UserError(f"skip_last: got {layers}, but {how}; write skip_last=0")
    if layers >= model.config.num_hidden_layers:
        raise UserError(f"skip_last: got {layers}, but this text encoder has only {model.config.num_hidden_layers} layers")
    model.config.num_hidden_layers -= layers
    encoder: Any = model.get_submodule("encoder")
    encoder.layers = encoder.layers[: model.config.num_hidden_layers]


def load_open_clip(folder: Path) -> TextEncoder:
    """An OpenCLIP's text tower as a CLIPTextModel: the same function, so a model folder with it opens in diffusers.

    Raises:
        UserError: naming what is missing, damaged or cannot be said in a CLIPTextModel.
    """
    values = read_json(folder / OPEN_CLIP).get("model_cfg")
    text = values.get("text_cfg") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(text, dict):
        raise UserError(f"{folder / OPEN_CLIP}: no model_cfg with a text_cfg in it; copy the whole folder again")
    known = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
    usual = {"pool_type": "argmax", "proj_type": "linear", "pad_id": 0, "output_tokens": True}
    foreign = [name for name, value in text.items() if name not in known and value not in (None, False, usual.get(name))]
    if foreign:
        raise UserError(f"{folder / OPEN_CLIP}: text_cfg.{foreign[0]} is not supported; only CLIP's own text towers are")
    given = {name: value for name, value in text.items() if name in known} | (
        {"embed_dim": values["embed_dim"]} if "embed_dim" in values else {}
    )
    shape = typed(given, OpenClipShape, str(folder / OPEN_CLIP))
    tokenizer = load_tokenizer(folder) if (folder / "vocab.json").is_file() else open_clip_tokenizer()
    made = dict(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        intermediate_size=int(shape.width * shape.mlp_ratio),
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.context_length,
        projection_dim=shape.embed_dim or shape.width,
        hidden_act="quick_gelu" if values.get("quick_gelu") else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    state = _weights(folder)
    if odd := [f"{side} {getattr(shape, side)} (the weights: {n})" for side, n in tower_size(state).items() if n != getattr(shape, side)]:
        raise UserError(f"{folder / OPEN_CLIP}: text_cfg says {', '.join(odd)}; copy the whole folder again")
    if any(name.startswith("text.transformer.") for name in state):  # OpenCLIP's towers apart
        state = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    state = from_open_clip(state, shape.layers)
    model = load_module(lambda: TextTower(made, str(folder / OPEN_CLIP)), tower_state(state), folder)
    return TextEncoder.of(model.float().eval().requires_grad_(False), tokenizer, folder)


def open_clip_folder(path: str, architecture: str) -> Path:
    """The folder, kept in the cache, of the text tower in a file of weights of one of OpenCLIP's architectures.

    Args:
        path: .safetensors, or a pickle (.bin, .pt), which a process of its own reads.
        architecture: such as ViT-H-14.

    Raises:
        UserError: for a name that OpenCLIP has not, or naming what is wrong with the file.
    """
    check_architecture(architecture)
    file = at_home(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; beside architecture={architecture} path is a file of weights (.safetensors, .bin, .pt)")
    said = json.dumps({"model_cfg": read_json(architectures()[architecture])}, sort_keys=True)
    key = hashlib.sha256(f"{checksums([file])[0]} {said}".encode()).hexdigest()
    target = cache_folder() / "models" / f"{file.stem}-{key[:24]}"
    if is_whole(target):
        return target

    def write(folder: Path) -> None:
        state = {name.removeprefix("module."): value for name, value in read_weights(file)[0].items()}
        text = {name: value for name, value in state.items() if not name.startswith("visual.")}
        if not any("token_embedding" in name for name in text):
            raise UserError(f"{file}: holds {short(min(state, default='nothing'))} and no text tower of an OpenCLIP")
        _fits(file, tower_size(text), architecture)
        write_tensors(folder / "open_clip_model.safetensors", text)
        (folder / OPEN_CLIP).write_text(said)

    commit(target, write)
    return target


def _fits(file: Path, size: dict[str, int], architecture: str) -> None:
    """Refuse a file whose text tower is another architecture's, and name those that have one of its size."""
    known = architectures()

    def odd(name: str) -> list[str]:
        text = read_json(known[name])["text_cfg"]
        usual = {"vocab_size": 49408, "width": 512, "context_length": 77, "layers": 12} | text
        return [f"{side} {value} ({name}: {usual[side]})" for side, value in size.items() if usual[side] != value]

    if found := odd(architecture):
        likely = [name for name in known if not odd(name)]
        way = f"one of {', '.join(likely[:6])}{', ...' if len(likely) > 6 else ''} has this size" if likely else "none known has this size"
        raise UserError(f"architecture: the text tower of {file} has {', '.join(found)}; {way}")


def _weights(folder: Path) -> dict[str, Tensor]:
    files = [*sorted(folder.glob("open_clip*.safetensors")), *sorted(folder.glob("open_clip*.bin"))]
    if not files:
        raise UserError(f"{folder}: no open_clip_model.safetensors here, nor open_clip_pytorch_model.bin")
    state = read_weights(files[0])[0]
    check(folder)
    return state
