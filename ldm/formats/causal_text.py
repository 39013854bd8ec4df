"""Language models as text encoders (Gemma, Qwen): transformers' own networks of the fields that a config.json names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Codes, Count, Depth, PositiveFloat, Width, config, plain

# By what config.json calls its architecture, with or without the head that predicts words: transformers' class without it.
MODELS = {
    "Gemma": "GemmaModel",
    "Gemma2": "Gemma2Model",
    "Gemma3": "Gemma3TextModel",
    "Gemma3Text": "Gemma3TextModel",
    "Qwen2": "Qwen2Model",
    "Qwen3": "Qwen3Model",
}
ENDINGS = ("ForCausalLM", "Model")


@config
class CausalShape:
    """What the config.json of a Gemma or Qwen says; null: as transformers has it where the file does not say."""

    vocab_size: Codes
    hidden_size: Width
    intermediate_size: Codes
    num_hidden_layers: Depth
    num_attention_heads: Width
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    max_position_embeddings: Codes = 32768
    rms_norm_eps: PositiveFloat | None = None
    rope_theta: PositiveFloat | None = None
    rope_local_base_freq: PositiveFloat | None = None
    rope_parameters: dict[str, Any] | None = None
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] | None = None
    hidden_activation: Literal["silu", "gelu", "gelu_pytorch_tanh"] | None = None
    attention_bias: bool | None = None
    query_pre_attn_scalar: Codes | None = None
    attn_logit_softcapping: PositiveFloat | None = None
    final_logit_softcapping: PositiveFloat | None = None
    sliding_window: Codes | None = None
    sliding_window_pattern: Depth | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Count | None = None
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    pad_token_id: Count | None = None
    bos_token_id: Count | None = None
    eos_token_id: Count | tuple[Count, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise UserError(f"layer_types has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise UserError(f"pad_token_id is {self.pad_token_id}; it should be less than vocab_size {self.vocab_size}")


def model_class(architecture: str) -> str:
    """transformers' class for an architecture; empty where it is no Gemma or Qwen."""
    return next((MODELS[architecture.removesuffix(end)] for end in ENDINGS if architecture.removesuffix(end) in MODELS), "")


def causal_builder(kind: str, values: Mapping[str, Any], where: str) -> Callable[[], Any]:
    """What builds transformers' class `kind` of a config.json, the file `where`.

    Raises:
        UserError: naming the field that makes no sense.
    """
    known = {f.name for f in fields(CausalShape)}
    said = {name: _tuple(value) for name, value in values.items() if name in known and value is not None}
    shape = {name: value for name, value in plain(typed(said, CausalShape, where)).items() if value is not None}
    rope = shape.get("rope_parameters", {})
    for name, value in [*rope.items(), *(pair for inner in rope.values() if isinstance(inner, dict) for pair in inner.items())]:
        if not isinstance(value, dict) and not _plain(value):
            raise UserError(f"{where}: rope_parameters.{name} is {ascii(value)[:60]}; a finite number or a word is needed")

    def build() -> Any:
        import transformers

        network = getattr(transformers, kind)
        try:
            return network(network.config_class(**shape))
        except Exception as error:  # of transformers, on fields that do not suit one another
            raise UserError(f"{where}: describes no {kind} ({(str(error).splitlines() or ['?'])[0][:200]})") from None

    return build


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 256 and all(map(_plain, value))
    return len(value) < 64 if isinstance(value, str) else isinstance(value, int | float) and abs(value) < 1e12


def causal_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A language model's weights without the head that predicts words, under the names of the model alone."""
    inside = {name.removeprefix("model.").removeprefix("language_model."): value for name, value in state.items()}
    return {name: value for name, value in inside.items() if name.startswith(("embed_tokens.", "layers.", "norm."))}
