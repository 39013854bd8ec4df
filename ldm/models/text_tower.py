"""CLIP's text tower (Radford 2021, arXiv 2103.00020): the network of transformers' CLIPTextModel under its parameter names.

transformers takes three seconds to import on a fast machine; a prompt needs a hundred lines of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import Codes, Depth, PositiveFloat, Width, config
from ldm.models.diffusers_config import CONFIG

CLIPS = ("clip_text_model", "clip_text_pair")  # model types of a `TextTower` and of a `TowerPair`
OLD_EOS = 2  # what the first published configurations say of the end token, whose id it is not


class TextStates(NamedTuple):
    """What a tower, or two of them, say of captions."""

    last_hidden_state: Tensor  # (B,L,D), after the last norm; of a pair before the last layer, both side by side
    pooler_output: Tensor  # (B,P), of the end token; of a pair the second's, projected


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), as OpenAI's CLIP has it."""
    return x * torch.sigmoid(1.702 * x)


Activation = Literal["quick_gelu", "gelu", "relu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu, "relu": F.relu}


@config
class TextTowerShape:
    """What a CLIPTextModel's config.json says, with transformers' defaults for what it does not."""

    vocab_size: Codes = 49408
    hidden_size: Width = 512
    intermediate_size: Width = 2048
    projection_dim: Width = 512
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 8
    max_position_embeddings: Codes = 77
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: PositiveFloat = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}")


class TextConfig:
    """The same as an object whose fields can be set, as transformers has it.

    Raises:
        UserError: naming the field of the file `where` that makes no sense.
    """

    model_type = "clip_text_model"

    def __init__(self, values: Mapping[str, Any], where: str = CONFIG) -> None:
        said = typed({f.name: values[f.name] for f in fields(TextTowerShape) if f.name in values}, TextTowerShape, where)
        self.vocab_size, self.hidden_size, self.intermediate_size = said.vocab_size, said.hidden_size, said.intermediate_size
        self.projection_dim, self.num_hidden_layers = said.projection_dim, said.num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = said.num_attention_heads, said.max_position_embeddings
        self.hidden_act, self.layer_norm_eps = said.hidden_act, said.layer_norm_eps
        self.bos_token_id, self.eos_token_id, self.pad_token_id = said.bos_token_id, said.eos_token_id, said.pad_token_id

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return {**vars(self), "model_type": self.model_type, "architectures": ["CLIPTextModel"], "dtype": "float32"}

    def to_json_string(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict())


class Sizes(Protocol):
    """What either tower's configuration says of its blocks."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


class Embeddings(nn.Module):
    """Of tokens and of their places."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.token_embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """(B,L) to (B,L,D)."""
        words: Tensor = self.token_embedding(ids)
        return words + self.position_embedding.weight[: ids.shape[1]].to(words)


class Attention(nn.Module):
    """Each token looks at all, or in causal order at those before it."""

    def __init__(self, config: Sizes, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, width = config.num_attention_heads, causal, config.hidden_size
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,D) to the same."""
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two layers on each token."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,D) to the same."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Layer(nn.Module):
    """A transformer's block with its norms before."""

    def __init__(self, config: Sizes, causal: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,D) to the same."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Stack(nn.Module):
    """The blocks of a CLIP's tower; its text side's are causal."""

    def __init__(self, config: Sizes, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.num_hidden_layers))


class TextTower(nn.Module):
    """Token ids to states, each of which depends on the tokens before it alone."""

    def __init__(self, values: Mapping[str, Any], where: str = CONFIG) -> None:
        super().__init__()
        self.config = TextConfig(values, where)
        self.embeddings = Embeddings(self.config)
        self.encoder = Stack(self.config, causal=True)
        self.final_layer_norm = nn.LayerNorm(self.config.hidden_size, eps=self.config.layer_norm_eps)

    def forward(self, ids: Tensor, clip_skip: int = 1) -> TextStates:
        """(B,L) ids, at most `max_position_embeddings` a row, to states.

        Args:
            clip_skip: the layer whose states are told, counted from the last one, which is 1; the pooled state is always the last one's.
        """
        read = len(self.encoder.layers) + 1 - clip_skip
        told = self.hidden(ids, read)
        done = self.finished(self.further(told, read), ids)
        return done if clip_skip == 1 else TextStates(self.final_layer_norm(told), done.pooler_output)

    def hidden(self, ids: Tensor, layers: int | None = None) -> Tensor:
        """States (B,L,D) of ids (B,L) after so many layers, without the last norm; None: after all."""
        x: Tensor = self.embeddings(ids)
        return self.further(x, 0, layers)

    def further(self, x: Tensor, start: int, layers: int | None = None) -> Tensor:
        """States (B,L,D) after layers `start` to `layers`."""
        for layer in self.encoder.layers[start:layers]:
            x = layer(x)
        return x

    def finished(self, x: Tensor, ids: Tensor) -> TextStates:
        """The last norm of states (B,L,D), and the one of the end token in ids (B,L)."""
        x = self.final_layer_norm(x)
        # The first configurations name a wrong end token; the right one has the largest id there.
        end = ids.argmax(1) if self.config.eos_token_id == OLD_EOS else (ids == self.config.eos_token_id).int().argmax(1)
        return TextStates(x, x[torch.arange(x.shape[0], device=x.device), end.to(x.device)])

    def get_input_embeddings(self) -> nn.Module:
        """Of tokens."""
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Other ones."""
        self.embeddings.token_embedding = value


class PairConfig:
    """What others ask of two towers that are read as one."""

    model_type = "clip_text_pair"

    def __init__(self, first: TextConfig, second: TextConfig, pooled: int) -> None:
        self.hidden_size = first.hidden_size + second.hidden_size
        self.pooled_size = pooled
        self.num_hidden_layers = min(first.num_hidden_layers, second.num_hidden_layers)
        self.max_position_embeddings = min(first.max_position_embeddings, second.max_position_embeddings)

    def to_dict(self) -> dict[str, Any]:
        """The same."""
        return dict(vars(self))


class TowerPair(nn.Module):
    """The two text towers of Stable Diffusion XL (Podell 2023, arXiv 2307.01952), read as one.

    Its states are those of both towers before their last layer, side by side, without a norm; its pooled state is the second tower's,
    projected. Both know the same words; what stands behind a caption's end differs.

    Args:
        text_encoder: CLIP's, in the published model ViT-L/14.
        text_encoder_2: OpenCLIP's, ViT-bigG/14.
        text_projection: of the second tower's pooled state, without bias.
        padding: the id that the second tower is padded with.
    """

    usual_skip = 2  # the layer that is read unless an earlier one is asked for, counted from the last one, which is 1

    def __init__(self, text_encoder: TextTower, text_encoder_2: TextTower, text_projection: nn.Linear, padding: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2, self.text_projection = text_encoder, text_encoder_2, text_projection
        self.padding = padding
        self.config = PairConfig(text_encoder.config, text_encoder_2.config, text_projection.out_features)

    def forward(self, ids: Tensor, mask: Tensor, clip_skip: int = 1) -> TextStates:
        """(B,L) ids as the first tower has them, and which are no padding (B,L), to states.

        Args:
            clip_skip: the layer whose states are told, counted from the last one, which is 1 and is never read: 1 and 2 are the same.
        """
        left_out = max(clip_skip, self.usual_skip) - 1
        second, read = self.text_encoder_2, len(self.text_encoder_2.encoder.layers) - left_out
        other = ids.masked_fill(~mask, self.padding)
        states = second.hidden(other, read)
        pooled = second.finished(second.further(states, read), other).pooler_output
        first = self.text_encoder.hidden(ids, len(self.text_encoder.encoder.layers) - left_out)
        return TextStates(torch.cat([first, states], dim=2), self.text_projection(pooled))


def towers(model: nn.Module) -> tuple[Any, ...]:
    """The towers of a text model: itself, or both of a pair."""
    return (model.text_encoder, model.text_encoder_2) if isinstance(model, TowerPair) else (model,)
