"""What a network of a CompVis checkpoint is made of, read off the shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.config.errors import UserError
from ldm.formats.compvis import PREFIX, Part
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig

SD_SCALE, XL_SCALE = 0.18215, 0.13025  # of the latents of Stable Diffusion 1 and 2, and of XL
HEAD_WIDTH = 64  # of networks with linear projections: Stable Diffusion 2 and XL
HEADS = 8  # of all others
HUGE = 1024  # width of OpenCLIP's ViT-H text tower, which Stable Diffusion 2 reads without its last layer

Weights = Mapping[str, Tensor]


def inner(part: Part, state: Weights) -> dict[str, Tensor]:
    """A part's weights without the part's prefix."""
    prefix = PREFIX[part]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def unet_config(state: Weights) -> UNetConfig:
    """Of openaimodel.UNetModel's weights, names without prefix. Heads are not in the shapes: 64 wide with linear projections, else 8.

    Raises:
        UserError: naming a weight that is missing.
    """
    first, last = _shape(state, "input_blocks.0.0.weight"), _shape(state, "out.2.weight")
    channels: list[int] = [first[0]]
    attention: list[bool] = []
    depth: list[int] = []
    blocks = [0]
    attends, deep = False, 1
    for n in range(1, 1 + max(_numbers(state, "input_blocks"))):
        if f"input_blocks.{n}.0.op.weight" in state:
            attention.append(attends)
            depth.append(deep)
            channels.append(channels[-1])
            blocks.append(0)
            attends, deep = False, 1
            continue
        channels[-1] = _shape(state, f"input_blocks.{n}.0.in_layers.2.weight")[0]
        blocks[-1] += 1
        if f"input_blocks.{n}.1.norm.weight" in state:
            attends, deep = True, 1 + max(_numbers(state, f"input_blocks.{n}.1.transformer_blocks"))
    attention.append(attends)
    depth.append(1 + max(_numbers(state, "middle_block.1.transformer_blocks"), default=0))
    if len(set(blocks)) != 1:
        raise UserError(f"unet: levels have {blocks} residual blocks; one number for all levels is needed")
    linear = state["middle_block.1.proj_in.weight"].ndim == 2
    added = state.get("label_emb.0.0.weight")
    size, pooled = (256, added.shape[1] - 6 * 256) if added is not None else (0, 0)
    return UNetConfig(
        in_channels=first[1],
        out_channels=last[0],
        channels=tuple(channels),
        layers=blocks[0],
        attention=tuple(attention),
        heads=tuple(width // HEAD_WIDTH for width in channels) if linear else HEADS,
        depth=tuple(depth),
        context_width=_shape(state, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        linear_projection=linear,
        size_channels=size,
        pooled_channels=pooled,
    )


def vae_config(state: Weights, scale: float | None = None) -> KLConfig | VQConfig:
    """Of latent diffusion's autoencoder, names without prefix.

    Args:
        scale: what latents are multiplied by; None: Stable Diffusion's 0.18215, for a codebook 1.

    Raises:
        UserError: naming a weight that is missing.
    """
    levels = 1 + max(_numbers(state, "encoder.down"))
    attention = tuple(f"encoder.down.{i}.attn.0.norm.weight" in state for i in range(levels))
    shared: dict[str, Any] = {
        "in_channels": _shape(state, "encoder.conv_in.weight")[1],
        "out_channels": _shape(state, "decoder.conv_out.weight")[0],
        "channels": tuple(_shape(state, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)),
        "layers": 1 + max(_numbers(state, "encoder.down.0.block")),
        "attention": attention if any(attention) else None,
        "middle_attention": "encoder.mid.attn_1.norm.weight" in state,
    }
    width = _shape(state, "encoder.conv_out.weight")[0]
    codebook = state.get("quantize.embedding.weight")
    if codebook is not None:
        codes, code = codebook.shape
        return VQConfig(latent_channels=width, code_channels=code, codes=codes, scaling_factor=scale or 1.0, **shared)
    convolutions: dict[str, Any] = {"quant_conv": "quant_conv.weight" in state, "post_quant_conv": "post_quant_conv.weight" in state}
    return KLConfig(latent_channels=width // 2, scaling_factor=scale or SD_SCALE, force_upcast=True, **convolutions, **shared)


def text_config(state: Weights, kind: Part) -> dict[str, Any]:
    """The config.json of a CLIPTextModel, of weights without prefix: OpenAI's naming (text) or OpenCLIP's (open_clip).

    Raises:
        UserError: naming a weight that is missing.
    """
    openai = kind == "text"
    outer = "embeddings.token_embedding.weight" if openai else "token_embedding.weight"
    places = "embeddings.position_embedding.weight" if openai else "positional_embedding"
    layers = "encoder.layers" if openai else "transformer.resblocks"
    (vocabulary, width), (length, _) = _shape(state, outer), _shape(state, places)
    count = 1 + max(_numbers(state, layers), default=-1)
    huge = not openai and width == HUGE
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(state, f"{layers}.0.mlp.{'fc1' if openai else 'c_fc'}.weight")[0],
        "num_hidden_layers": count - 1 if huge and count == 24 else count,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": length,
        "hidden_act": "quick_gelu" if openai else "gelu",
        "projection_dim": width,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if openai else 0,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }


def _numbers(state: Weights, place: str) -> set[int]:
    pattern = re.compile(re.escape(place) + r"\.(\d+)\.")
    return {int(found[1]) for name in state if (found := pattern.match(name))}


def _shape(state: Weights, name: str) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"{name} is missing; the file is damaged or of another kind of model")
    return tuple(state[name].shape)
