"""CompVis' checkpoint layout (latent diffusion, Stable Diffusion 1.x and 2.x, sgm's XL): names both ways, configurations by shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig

Part = Literal["unet", "vae", "text", "open_clip", "xl_text", "xl_open_clip"]
Config = UNetConfig | KLConfig | VQConfig | Mapping[str, Any]

PREFIX: dict[Part, str] = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.transformer.text_model.",
    "open_clip": "cond_stage_model.model.",
    "xl_text": "conditioner.embedders.0.transformer.text_model.",
    "xl_open_clip": "conditioner.embedders.1.model.",
}
OPEN_CLIPS = ("open_clip", "xl_open_clip")
REFINER = "conditioner.embedders.0.model."  # what only Stable Diffusion XL's refiner has
TEXT = "text_model."  # before the names of a CLIPTextModel's weights in a folder; some versions of transformers leave it out

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_OUTER = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# In checkpoints, but in no text model of diffusers: constants, and what only the contrastive loss reads, but for XL's projection.
UNREAD = ("embeddings.position_ids", "attn_mask", "text_projection", "logit_scale")
PROJECTION = ("text_projection.weight", "text_projection")  # ours and theirs, whose rows are our columns

# A place where names change: ours, theirs, and which layers inside it have other names (all others keep theirs).
Place = tuple[str, str, Mapping[str, str]]


def to_compvis(part: Part, config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's weights under their names in a CompVis checkpoint, each with the part's PREFIX.

    Args:
        part: unet, vae, text (CLIP, as in Stable Diffusion 1) or open_clip (as in 2), xl_text or xl_open_clip (XL's two).
        config: of the network; of a text model the content of its config.json, of which num_hidden_layers is read.
        state: under diffusers' names; a text model's with or without "text_model." before them.

    Raises:
        UserError: for what CompVis' code has no name for.
    """
    if isinstance(config, Mapping):
        state = {name.removeprefix(TEXT): value for name, value in state.items() if not name.endswith("position_ids")}
    if part in OPEN_CLIPS:
        state = _joined(state, _layers(config))
    places = {ours: (theirs, inside) for ours, theirs, inside in places_of(part, config)}
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if part == "xl_open_clip" and name == PROJECTION[0]:
            found[PREFIX[part] + PROJECTION[1]] = value.T
            continue
        renamed = _renamed(name, places)
        if renamed is None:
            raise UserError(f"{part}: CompVis' checkpoints have no name for {name}; keep this model as a diffusers folder")
        new, place = renamed
        found[PREFIX[part] + new] = value[:, :, None, None] if place[1] is VAE_ATTENTION and value.ndim == 2 else value
    return found


def from_compvis(part: Part, config: Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's weights under diffusers' names, out of a CompVis checkpoint; all names without the part's PREFIX are left out.

    Args:
        part: as in `to_compvis`.
        config: of the network, as in `to_compvis`. Of an OpenCLIP, layers beyond num_hidden_layers are left out: Stable
            Diffusion 2 reads the states after the last layer but one.
        state: of the whole checkpoint.

    Returns:
        All weights of the part, a text model's with "text_model." before their names. A name that `config` has no place
        for is kept as it is, so that whoever loads the weights finds it left over.
    """
    prefix = PREFIX[part]
    inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    projection = {PROJECTION[0]: inner[PROJECTION[1]].t()} if part == "xl_open_clip" and _matrix(inner.get(PROJECTION[1])) else {}
    if isinstance(config, Mapping):
        inner = {name: value for name, value in inner.items() if name not in UNREAD and not _beyond(name, config)}
    places = {theirs: (ours, inside) for ours, theirs, inside in places_of(part, config)}
    found: dict[str, Tensor] = {}
    for name, value in inner.items():
        renamed = _renamed(name, places, back=True)
        if renamed is not None:
            name, place = renamed
            value = value[:, :, 0, 0] if place[1] is VAE_ATTENTION and value.shape[2:] == (1, 1) else value
        found[name] = value
    if part in OPEN_CLIPS:
        found = _parted(found, _layers(config))
    return ({TEXT + name: value for name, value in found.items()} | projection) if isinstance(config, Mapping) else found


def places_of(part: Part, config: Config) -> Iterator[Place]:
    """Where the names of a part differ, as (ours, theirs, names inside)."""
    if part == "unet" and isinstance(config, UNetConfig):
        return _unet(config)
    if part == "vae" and isinstance(config, KLConfig | VQConfig):
        return _vae(config)
    if part in OPEN_CLIPS and isinstance(config, Mapping):
        return _open_clip(config)
    if part in ("text", "xl_text") and isinstance(config, Mapping):
        return iter([(name, name, {}) for name in ("embeddings", "encoder", "final_layer_norm")])
    raise TypeError(f"{part} has no {type(config).__name__}")


def _unet(config: UNetConfig) -> Iterator[Place]:
    """openaimodel.UNetModel's lists: input blocks, the middle, output blocks, counted through all levels."""
    if config.middle != "attention":
        raise UserError(f"unet: middle is {config.middle!r}, which CompVis' code has not; keep this model as a diffusers folder")
    last = len(config.channels) - 1
    yield "conv_in", "input_blocks.0.0", {}
    yield from _pairs("time_embedding", "time_embed")
    if config.size_channels:
        yield from _pairs("add_embedding", "label_emb.0")
    number = 1
    for i in range(last + 1):
        for j in range(config.layers):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0", UNET_RESNET
            if config.attention[i]:
                yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1", {}
            number += 1
        if i < last:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{number}.0.op", {}
            number += 1
    yield "mid_block.resnets.0", "middle_block.0", UNET_RESNET
    yield "mid_block.attentions.0", "middle_block.1", {}
    yield "mid_block.resnets.1", "middle_block.2", UNET_RESNET
    number = 0
    for i in range(last + 1):
        attends = config.attention[last - i]
        for j in range(config.layers + 1):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0", UNET_RESNET
            if attends:
                yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1", {}
            if i < last and j == config.layers:
                yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{number}.{1 + attends}.conv", {}
            number += 1
    yield "conv_norm_out", "out.0", {}
    yield "conv_out", "out.2", {}


def _pairs(ours: str, theirs: str) -> Iterator[Place]:
    yield f"{ours}.linear_1", f"{theirs}.0", {}
    yield f"{ours}.linear_2", f"{theirs}.2", {}


def _vae(config: KLConfig | VQConfig) -> Iterator[Place]:
    """The encoder and decoder of latent diffusion; the decoder counts its levels from the full resolution too."""
    if isinstance(config, VQConfig):
        if config.norm == "spatial":
            raise UserError("vae: norm is 'spatial', which CompVis' code has not; keep this model as a diffusers folder")
        yield "quantize.embedding", "quantize.embedding", {}
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name, {}
    last = len(config.channels) - 1
    for coder, layers in (("encoder", config.layers), ("decoder", config.layers + 1)):
        for ours, theirs in (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out")):
            yield f"{coder}.{ours}", f"{coder}.{theirs}", {}
        for j in range(2):
            yield f"{coder}.mid_block.resnets.{j}", f"{coder}.mid.block_{j + 1}", VAE_RESNET
        if config.middle_attention:
            yield f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1", VAE_ATTENTION
        way, scale = ("down", "downsample") if coder == "encoder" else ("up", "upsample")
        for i in range(last + 1):
            ours, theirs = f"{coder}.{way}_blocks.{i}", f"{coder}.{way}.{i if way == 'down' else last - i}"
            for j in range(layers):
                yield f"{ours}.resnets.{j}", f"{theirs}.block.{j}", VAE_RESNET
                if config.levels[i if way == "down" else last - i]:
                    yield f"{ours}.attentions.{j}", f"{theirs}.attn.{j}", VAE_ATTENTION
            if i < last:
                yield f"{ours}.{scale}rs.0.conv", f"{theirs}.{scale}.conv", {}


def _open_clip(config: Mapping[str, Any]) -> Iterator[Place]:
    for ours, theirs in OPEN_CLIP_OUTER.items():
        yield ours, theirs, {}
    for layer in range(_layers(config)):
        yield f"encoder.layers.{layer}", f"transformer.resblocks.{layer}", OPEN_CLIP_LAYER


def _layers(config: Config) -> int:
    assert isinstance(config, Mapping)
    values = config.get("text_config") or config
    return int(values["num_hidden_layers"])


def _beyond(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a weight is of an OpenCLIP layer that is not read."""
    words = name.split(".")
    return words[:2] == ["transformer", "resblocks"] and len(words) > 2 and words[2].isdigit() and int(words[2]) >= _layers(config)


def _matrix(value: Tensor | None) -> bool:
    return value is not None and value.ndim == 2


def _joined(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Queries, keys and values of each layer as one matrix, as in OpenCLIP."""
    found = dict(state)
    for layer in range(layers):
        for kind in ("weight", "bias"):
            names = [f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            if all(name in found for name in names):
                found[f"encoder.layers.{layer}.attn.in_proj_{kind}"] = torch.cat([found.pop(name) for name in names])
    return found


def _parted(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of joining."""
    found = dict(state)
    for layer in range(layers):
        for kind in ("weight", "bias"):
            joined = found.pop(f"encoder.layers.{layer}.attn.in_proj_{kind}", None)
            if joined is not None:
                names = [f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
                found |= dict(zip(names, joined.chunk(3), strict=True))
    return found


Found = tuple[str, Mapping[str, str]]  # of a place: the other name, and the names inside


def _renamed(name: str, places: Mapping[str, Found], back: bool = False) -> tuple[str, Found] | None:
    """The new name and the place that it was found in; None where there is no place for it."""
    words = name.split(".")
    for cut in range(len(words), 0, -1):
        place = places.get(".".join(words[:cut]))
        if place is None:
            continue
        inside = {theirs: ours for ours, theirs in place[1].items()} if back else place[1]
        layer, _, kind = ".".join(words[cut:]).rpartition(".")
        rest = [inside.get(layer, layer), kind]
        return ".".join(word for word in (place[0], *rest) if word), place
    return None


def head_width(network: UNetConfig) -> int | None:
    """Channels of every attention head; None where levels differ."""
    widths = {channels // heads for channels, heads in zip(network.channels, network.level_heads, strict=True)}
    return widths.pop() if len(widths) == 1 else None


def departures(config: UNetConfig | KLConfig | VQConfig) -> list[str]:
    """What CompVis' code would compute otherwise, whatever the weights, as `field is value`; empty where it can run the network."""
    usual: dict[str, object] = {"norm_groups": 32}
    if isinstance(config, UNetConfig):
        usual |= {"norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "middle": "attention"}
        usual |= {"coordinates": False, "pooled_text": False, "mask_padding": False}
    else:
        usual |= (
            {"norm": "group"}
            if isinstance(config, VQConfig)
            else {"quant_conv": True, "post_quant_conv": True, "shift_factor": None, "latents_std": None}
        )
    return [f"{name} is {getattr(config, name)!r}" for name, value in usual.items() if getattr(config, name) != value]


SD_SCALE, XL_SCALE = 0.18215, 0.13025  # of the latents of Stable Diffusion 1 and 2, and of XL
HEAD_WIDTH = 64  # of networks with linear projections: Stable Diffusion 2 and XL
HEADS = 8  # of all others
HUGE = 1024  # width of OpenCLIP's ViT-H text tower, which Stable Diffusion 2 reads without its last layer

Weights = Mapping[str, Tensor]


SHORT_TEXT = re.compile(r"(cond_stage_model|conditioner\.embedders\.\d{1,3})\.transformer\.(?=embeddings\.|encoder\.|final_layer_norm\.)")


def usual_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with a CLIP's usual names, where it leaves `text_model.` out, as NovelAI's file does and all that was merged from it."""
    short = {SHORT_TEXT.sub(rf"\1.transformer.{TEXT}", name): value for name, value in state.items() if SHORT_TEXT.match(name)}
    return short | {name: value for name, value in state.items() if not SHORT_TEXT.match(name)}


def inner(part: Part, state: Weights) -> dict[str, Tensor]:
    """A part's weights without the part's prefix."""
    prefix = PREFIX[part]
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def unet_config(state: Weights) -> UNetConfig:
    """Of openaimodel.UNetModel's weights, names without prefix. Heads are not in the shapes: 64 wide with linear projections, else 8.

    Raises:
        UserError: naming a weight that is missing.
    """
    first, last = _shape(state, "input_blocks.0.0.weight", 4), _shape(state, "out.2.weight", 4)
    channels: list[int] = [first[0]]
    attention: list[bool] = []
    depth: list[int] = []
    blocks = [0]
    attends, deep = False, 1
    for n in range(1, 1 + max(_numbers(state, "input_blocks"), default=0)):
        if f"input_blocks.{n}.0.op.weight" in state:
            attention.append(attends)
            depth.append(deep)
            channels.append(channels[-1])
            blocks.append(0)
            attends, deep = False, 1
            continue
        channels[-1] = _shape(state, f"input_blocks.{n}.0.in_layers.2.weight", 4)[0]
        blocks[-1] += 1
        if f"input_blocks.{n}.1.norm.weight" in state:
            attends, deep = True, 1 + max(_numbers(state, f"input_blocks.{n}.1.transformer_blocks"), default=0)
    attention.append(attends)
    depth.append(1 + max(_numbers(state, "middle_block.1.transformer_blocks"), default=0))
    if len(set(blocks)) != 1:
        raise UserError(f"unet: levels have {blocks} residual blocks; one number for all levels is needed")
    linear = len(_shape(state, "middle_block.1.proj_in.weight")) == 2
    size, pooled = (256, _shape(state, "label_emb.0.0.weight", 2)[1] - 6 * 256) if "label_emb.0.0.weight" in state else (0, 0)
    found = dict(
        in_channels=first[1],
        out_channels=last[0],
        channels=tuple(channels),
        layers=blocks[0],
        attention=tuple(attention),
        heads=tuple(max(1, width // HEAD_WIDTH) for width in channels) if linear else HEADS,
        depth=tuple(depth),
        context_width=_shape(state, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1],
        linear_projection=linear,
        size_channels=size,
        pooled_channels=pooled,
    )
    return typed(found, UNetConfig, "unet")


def vae_config(state: Weights, scale: float | None = None) -> KLConfig | VQConfig:
    """Of latent diffusion's autoencoder, names without prefix.

    Args:
        scale: what latents are multiplied by; None: Stable Diffusion's 0.18215, for a codebook 1.

    Raises:
        UserError: naming a weight that is missing.
    """
    levels = 1 + max(_numbers(state, "encoder.down"), default=0)
    attention = tuple(f"encoder.down.{i}.attn.0.norm.weight" in state for i in range(levels))
    shared: dict[str, Any] = {
        "in_channels": _shape(state, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(state, "decoder.conv_out.weight", 4)[0],
        "channels": tuple(_shape(state, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)),
        "layers": 1 + max(_numbers(state, "encoder.down.0.block"), default=0),
        "attention": attention if any(attention) else None,
        "middle_attention": "encoder.mid.attn_1.norm.weight" in state,
    }
    width = _shape(state, "encoder.conv_out.weight", 4)[0]
    if "quantize.embedding.weight" in state:
        codes, code = _shape(state, "quantize.embedding.weight", 2)
        own = {"latent_channels": width, "code_channels": code, "codes": codes, "scaling_factor": scale or 1.0}
        return typed({**own, **shared}, VQConfig, "autoencoder")
    convolutions: dict[str, Any] = {"quant_conv": "quant_conv.weight" in state, "post_quant_conv": "post_quant_conv.weight" in state}
    said = {"latent_channels": width // 2, "scaling_factor": scale or SD_SCALE, "force_upcast": scale == XL_SCALE}
    return typed({**said, **convolutions, **shared}, KLConfig, "autoencoder")


def text_config(state: Weights, kind: Part) -> dict[str, Any]:
    """The config.json of a CLIPTextModel, of weights without prefix: OpenAI's naming (text, xl_text) or OpenCLIP's (the others).

    Raises:
        UserError: naming a weight that is missing.
    """
    openai, projection = kind not in OPEN_CLIPS, state.get(PROJECTION[1]) if kind == "xl_open_clip" else None
    outer = "embeddings.token_embedding.weight" if openai else "token_embedding.weight"
    places = "embeddings.position_embedding.weight" if openai else "positional_embedding"
    layers = "encoder.layers" if openai else "transformer.resblocks"
    (vocabulary, width), (length, _) = _shape(state, outer, 2), _shape(state, places, 2)
    count = 1 + max(_numbers(state, layers), default=-1)
    huge = not openai and width == HUGE
    if projection is not None and not _matrix(projection):
        raise UserError(f"{PREFIX[kind]}{PROJECTION[1]}: has shape {list(projection.shape)}; a matrix is needed; the file is damaged")
    return {
        "architectures": ["CLIPTextModel" if projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(state, f"{layers}.0.mlp.{'fc1' if openai else 'c_fc'}.weight", 2)[0],
        "num_hidden_layers": count - 1 if huge and count == 24 else count,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": length,
        "hidden_act": "quick_gelu" if openai else "gelu",
        "projection_dim": width if projection is None else projection.shape[1],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1 if openai else 0,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "torch_dtype": "float32",
    }


def _numbers(state: Weights, place: str) -> set[int]:
    pattern = re.compile(re.escape(place) + r"\.([0-9]{1,3})\.")
    return {int(found[1]) for name in state if (found := pattern.match(name))}


def _shape(state: Weights, name: str, sides: int = 0) -> tuple[int, ...]:
    """A weight's shape, which has so many sides, if that is told."""
    if name not in state:
        raise UserError(f"{name} is missing; the file is damaged or of another kind of model")
    shape = tuple(state[name].shape)
    if sides and len(shape) != sides:
        raise UserError(f"{name} has shape {list(shape)}, not {sides} sides; the file is damaged or of another kind of model")
    return shape


WORDS = re.compile(
    "input_blocks|output_blocks|middle_block|transformer_blocks|in_layers|out_layers|emb_layers|skip_connection|time_embed|label_emb"
    "|proj_in|proj_out|to_out|to_q|to_k|to_v|attn1|attn2|norm1|norm2|norm3|norm|ff|net|proj|conv|op|out|weight|bias|qkv|[0-9]+"
)


def with_dots(name: str) -> str:
    """The name of a U-Net's weight out of that of its average, which has no dots: `input_blocks10op` is `input_blocks.1.0.op`."""
    words: list[str] = []
    for word in WORDS.findall(name):
        # Inside a block there are at most three modules, and two in label_emb: the last digit is a number of its own.
        inner = word.isdigit() and words and words[-1] in ("input_blocks", "output_blocks", "label_emb")
        words += [word[:-1], word[-1]] if inner else [word]
    return ".".join(words)
