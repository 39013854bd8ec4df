"""Text encoders (CLIP, T5, Gemma, Qwen) in transformers' layout, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import short, typed
from ldm.config.schema import Codes, Depth, PositiveFloat, Width, config, plain
from ldm.formats.causal_text import causal_builder, causal_state, model_class
from ldm.formats.part import AGAIN, CONFIG, load_module, load_weights, read_config, save_part
from ldm.models.text_tower import TextConfig, TextTower, TowerPair

TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")  # of a model folder, those with _2 of a pair alone
PROJECTING = "CLIPTextModelWithProjection"
CLIPS = ("CLIPTextModel", PROJECTING, "CLIPModel")
T5S = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model")
PROJECTION = "text_projection.weight"


@config
class T5Shape:
    """What a T5's config.json says, with transformers' defaults for what it does not."""

    vocab_size: Codes = 32128
    d_model: Width = 512
    d_kv: Width = 64
    d_ff: Width = 2048
    num_layers: Depth = 6
    num_heads: Width = 8
    relative_attention_num_buckets: Width = 32
    relative_attention_max_distance: Codes = 128
    layer_norm_epsilon: PositiveFloat = 1e-6
    feed_forward_proj: Literal["relu", "gelu", "silu", "gated-relu", "gated-gelu", "gated-silu"] = "relu"
    eos_token_id: int = 1
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.relative_attention_num_buckets < 4:
            raise UserError(f"relative_attention_num_buckets is {self.relative_attention_num_buckets}; it should be 4 or more")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise UserError(
                f"relative_attention_max_distance is {self.relative_attention_max_distance}; it should be more than a quarter of"
                f" relative_attention_num_buckets ({self.relative_attention_num_buckets})"
            )


def load_text_model(part: Path, state: dict[str, Tensor] | None = None) -> Any:
    """The frozen CLIPTextModel, T5EncoderModel, Gemma or Qwen in a folder; of a whole CLIP or T5 its text encoder.

    Only named fields of config.json are read, and weights from safetensors alone, so that a stranger's folder is data.

    Args:
        state: the weights of the whole folder, where they are read already.

    Raises:
        UserError: naming what is missing, damaged or something else.
    """
    build = text_builder(part)
    model = load_module(build, _own_names(load_weights(part) if state is None else state), part)
    return model.float().eval().requires_grad_(False)


def text_builder(part: Path) -> Callable[[], Any]:
    """What builds the text model that a folder's config.json describes.

    Raises:
        UserError: naming the field that makes no sense, or a model of another kind.
    """
    values, file = read_config(part), str(part / CONFIG)
    said = values.get("architectures") or ["CLIPTextModel"]
    kind = said[0] if isinstance(said, list) else said
    if kind in CLIPS:
        inner = values.get("text_config", values)
        if not isinstance(inner, dict):
            raise UserError(f"{file}: text_config is {short(inner)}; an object is needed; {AGAIN}")
        TextConfig(inner, file)
        return lambda: TextTower(inner, file)
    if isinstance(kind, str) and (causal := model_class(kind)):
        return causal_builder(causal, values, file)
    if kind not in T5S:
        raise UserError(f"{part}: a CLIPTextModel or T5EncoderModel was expected, but its config.json says {short(kind)}")
    shape = typed({f.name: values[f.name] for f in fields(T5Shape) if f.name in values}, T5Shape, file)

    def build() -> Any:
        from transformers import T5Config, T5EncoderModel

        return T5EncoderModel(T5Config(**plain(shape)))

    return build


def _own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if any(name.endswith("embed_tokens.weight") and not name.startswith("encoder.") for name in state) and "shared.weight" not in state:
        return causal_state(state)
    return _t5_state(state) if "shared.weight" in state or "encoder.embed_tokens.weight" in state else tower_state(state)


PREFIX = "text_model."  # of a CLIP text model's weights in files; `TextTower` leaves it out


def tower_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text model's weights, out of a whole CLIP's too, under the names of `TextTower`."""
    if any(name.startswith(PREFIX) for name in state):
        state = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def _t5_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("shared.weight", "encoder.embed_tokens.weight")  # one table under two names
    table = next((state[name] for name in names if name in state), None)
    found = {name: value for name, value in state.items() if name.startswith("encoder.")}
    return found if table is None else {**found, **dict.fromkeys(names, table)}


def text_projection(part: Path, state: dict[str, Tensor]) -> nn.Linear:
    """The projection of a CLIPTextModelWithProjection's pooled state into the space shared with images, frozen, (B,D) to (B,E).

    Args:
        part: its folder, or a whole CLIP's.
        state: the weights in it.

    Raises:
        UserError: naming what is missing or damaged.
    """
    values = read_config(part)
    if isinstance(inner := values.get("text_config"), dict):
        values = {**inner, **{name: values[name] for name in ("projection_dim",) if name in values}}
    shape = TextConfig(values, str(part / CONFIG))
    sides = (shape.hidden_size, shape.projection_dim)
    found = {name.removeprefix("text_projection."): value for name, value in state.items() if name == PROJECTION}
    return load_module(lambda: nn.Linear(*sides, bias=False), found, part).float().eval().requires_grad_(False)


def load_pair(folder: Path, padding: int) -> TowerPair:
    """The frozen text encoders of Stable Diffusion XL in text_encoder/ and text_encoder_2/, as one model.

    Args:
        padding: the id that the second one is padded with.

    Raises:
        UserError: naming what is missing, damaged or something else.
    """
    part = folder / "text_encoder_2"
    first, state = load_text_model(folder / "text_encoder"), load_weights(part)
    second = load_module(text_builder(part), _own_names(state), part).float().eval().requires_grad_(False)
    for model, name in ((first, "text_encoder"), (second, part.name)):
        if not isinstance(model, TextTower):
            raise UserError(f"{folder / name}: of two text encoders both must be CLIP's, but this is a {model.config.model_type}")
    return TowerPair(first, second, text_projection(part, state), padding).eval().requires_grad_(False)


def save_text_model(model: Any, part: Path, projection: nn.Linear | None = None) -> None:
    """Write a CLIPTextModel or T5EncoderModel as any version of transformers reads it; with a projection, a CLIPTextModelWithProjection."""
    save_part(*text_part(model, projection), part, "model")


def text_parts(model: Any, state: dict[str, Tensor] | None = None) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """The parts of a text model in a model folder, text_encoder and of a pair text_encoder_2 too, each as `text_part` has it.

    Args:
        state: other weights under the model's own names; None: its own.
    """
    if not isinstance(model, TowerPair):
        return {"text_encoder": text_part(model, state=state)}
    own = dict(model.state_dict()) if state is None else state
    inner = [{n.removeprefix(f"{name}."): v for n, v in own.items() if n.startswith(f"{name}.")} for name in TEXT_PARTS[:2]]
    projection = own[PROJECTION]
    return {
        "text_encoder": text_part(model.text_encoder, state=inner[0]),
        "text_encoder_2": text_part(model.text_encoder_2, projection, inner[1]),
    }


def text_part(
    model: Any, projection: nn.Linear | Tensor | None = None, state: dict[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights of a CLIPTextModel or T5EncoderModel as any version of transformers reads them.

    Args:
        projection: of the pooled state, which makes it a CLIPTextModelWithProjection.
        state: other weights; None: its own.
    """
    clip = model.config.model_type == "clip_text_model"
    name = "CLIPTextModel" if clip else type(model).__name__
    config = {**json.loads(model.config.to_json_string()), "architectures": [name]}
    state = dict(model.state_dict() if state is None else state)
    if config["model_type"] == "t5":
        del state["encoder.embed_tokens.weight"]  # the same table as shared.weight
    elif clip:
        state = {PREFIX + name.removeprefix(PREFIX): value for name, value in state.items()}
        config["vocab_size"] = len(state[f"{PREFIX}embeddings.token_embedding.weight"])
    if projection is not None:
        weight = projection.weight if isinstance(projection, nn.Linear) else projection
        config |= {"architectures": [PROJECTING], "projection_dim": len(weight)}
        state[PROJECTION] = weight
    return config, state


SPECIAL = ("<|startoftext|>", "<|endoftext|>")
