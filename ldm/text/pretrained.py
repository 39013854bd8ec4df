"""Pretrained text encoders: Stable Diffusion's, transformers' CLIP or T5, OpenCLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.config.errors import UserError
from ldm.formats.model_folder import INDEX, OWN_CLIP, hub_folder
from ldm.formats.open_clip import from_open_clip, open_clip_tokenizer
from ldm.formats.part import content_hash, load_module, read_json, read_safetensors
from ldm.formats.text_folder import TEXT_PARTS, load_text_model, tower_state
from ldm.formats.tokenizer_files import load_tokenizer
from ldm.models.text_tower import TextTower, TowerPair
from ldm.text.encoder import TextEncoder, zeros_in

OPEN_CLIP = "open_clip_config.json"
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
    elif (folder / OPEN_CLIP).is_file() and not (folder / "config.json").is_file():
        encoder = load_open_clip(folder)
    else:
        encoder = TextEncoder.of(load_text_model(folder), load_tokenizer(folder), folder)
    if skip_last:
        _skip_last(encoder.model, skip_last)
    encoder.tokenizer.model_max_length = min(max_tokens, encoder.max_tokens)
    return encoder


def text_folder(path: str) -> Path:
    """Where a text encoder lies: a model's folder, a run's model, the encoder's own folder, or the hub's copy.

    Raises:
        UserError: if it is none of them.
    """
    folder = Path(path).expanduser()
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
        how = "two text encoders are read before their last layer" if isinstance(model, TowerPair) else "T5 is read after its last layer"
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
    width, layers = int(text.get("width", 512)), int(text.get("layers", 12))
    tokenizer = load_tokenizer(folder) if (folder / "vocab.json").is_file() else open_clip_tokenizer()
    made = dict(
        vocab_size=int(text.get("vocab_size", 49408)),
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=int(width * text.get("mlp_ratio", 4)),
        num_attention_heads=int(text.get("heads", 8)),
        max_position_embeddings=int(text.get("context_length", 77)),
        projection_dim=int(values.get("embed_dim", width)),
        hidden_act="quick_gelu" if values.get("quick_gelu") else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    state = from_open_clip(_weights(folder), layers)
    model = load_module(lambda: TextTower(made), tower_state(state), folder)
    return TextEncoder.of(model.float().eval().requires_grad_(False), tokenizer, folder)


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("open_clip*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no open_clip_model.safetensors here; pickled weights (.bin, .pt) are not read, convert them")
    state = read_safetensors(files[0])
    if any(name.startswith("text.transformer.") for name in state):  # OpenCLIP's towers apart
        return {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    return state
