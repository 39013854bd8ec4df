"""diffusers' config.json of U-Nets and autoencoders, both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ldm.config.errors import UserError
from ldm.config.foreign import short

Plain = tuple[tuple[str, str, object], ...]

CONFIG = "config.json"
LEVELS, BLOCKS = 16, 1024  # of a network, at most

STOCK_UNET = "UNet2DConditionModel"
OWN_UNET = "LDMUNet"  # the class name of a U-Net that diffusers does not have
TEXTLESS_UNET = "UNet2DModel"  # of one that reads no text

# What our U-Net always is. Any other value in a config.json is refused by name.
UNET_FIXED: dict[str, object] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# diffusers' name of a field, ours, and what diffusers takes when config.json does not say.
UNET_PLAIN: Plain = (
    ("in_channels", "in_channels", 4),
    ("out_channels", "out_channels", 4),
    ("block_out_channels", "channels", (320, 640, 1280, 1280)),
    ("layers_per_block", "layers", 2),
    ("attention_head_dim", "heads", 8),  # diffusers' name is wrong: it counts heads
    ("transformer_layers_per_block", "depth", 1),
    ("cross_attention_dim", "context_width", 1280),
    ("use_linear_projection", "linear_projection", False),
    ("upcast_attention", "upcast_attention", False),
    ("norm_num_groups", "norm_groups", 32),
    ("norm_eps", "norm_eps", 1e-5),
    ("dropout", "dropout", 0.0),
    ("flip_sin_to_cos", "flip_sin_to_cos", True),
    ("freq_shift", "freq_shift", 0),
    ("time_cond_proj_dim", "guidance_channels", 0),
    ("sample_size", "sample_size", None),
)
# The same for a U-Net without text, whose class has other fields and other defaults.
TEXTLESS_FIXED: dict[str, object] = {
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
TEXTLESS_PLAIN: Plain = (
    ("in_channels", "in_channels", 3),
    ("out_channels", "out_channels", 3),
    ("block_out_channels", "channels", (224, 448, 672, 896)),
    ("layers_per_block", "layers", 2),
    ("norm_num_groups", "norm_groups", 32),
    ("norm_eps", "norm_eps", 1e-5),
    ("dropout", "dropout", 0.0),
    ("flip_sin_to_cos", "flip_sin_to_cos", True),
    ("freq_shift", "freq_shift", 0),
    ("sample_size", "sample_size", None),
)
CLASS_EMBEDDINGS = {"none": None, "table": None, "timestep": "timestep", "projection": "projection"}  # our names, diffusers' types
ATTENDS = ("AttnDownBlock2D", "DownBlock2D")
UNET_OWN = ("coordinates", "pooled_text", "mask_padding", "pooled_channels")
UNET_MIDDLES = {"attention": "UNetMidBlock2DCrossAttn", "plain": "UNetMidBlock2D", "none": None}


# The same for the autoencoders; diffusers' defaults are those of its classes, not of Stable Diffusion's files.
KL_FIXED: dict[str, object] = {"act_fn": "silu"}
KL_PLAIN: Plain = (
    ("in_channels", "in_channels", 3),
    ("out_channels", "out_channels", 3),
    ("block_out_channels", "channels", (64,)),
    ("layers_per_block", "layers", 1),
    ("mid_block_add_attention", "middle_attention", True),
    ("latent_channels", "latent_channels", 4),
    ("norm_num_groups", "norm_groups", 32),
    ("use_quant_conv", "quant_conv", True),
    ("use_post_quant_conv", "post_quant_conv", True),
    ("scaling_factor", "scaling_factor", 0.18215),
    ("shift_factor", "shift_factor", None),
    ("latents_mean", "latents_mean", None),
    ("latents_std", "latents_std", None),
    ("force_upcast", "force_upcast", False),  # diffusers' class takes True, but its pipelines of files that do not say it never ask
    ("sample_size", "sample_size", 32),
)
VQ_FIXED: dict[str, object] = {"act_fn": "silu"}
VQ_PLAIN: Plain = (
    ("in_channels", "in_channels", 3),
    ("out_channels", "out_channels", 3),
    ("block_out_channels", "channels", (64,)),
    ("layers_per_block", "layers", 1),
    ("mid_block_add_attention", "middle_attention", True),
    ("latent_channels", "latent_channels", 3),
    ("vq_embed_dim", "code_channels", None),
    ("num_vq_embeddings", "codes", 256),
    ("norm_type", "norm", "group"),
    ("norm_num_groups", "norm_groups", 32),
    ("scaling_factor", "scaling_factor", 0.18215),
    ("sample_size", "sample_size", 32),
)
# How diffusers' own pipelines call it: nothing in the weights or in what `decode` does here depends on them.
VQ_IGNORED = {"lookup_from_codebook", "force_upcast"}


def unet_to_diffusers(config: Any) -> dict[str, Any]:
    """A `UNetConfig`'s config.json."""
    if not config.context_width:
        return _textless_to_diffusers(config)
    values: dict[str, object] = {
        "_class_name": STOCK_UNET if config.stock else OWN_UNET,
        **UNET_FIXED,
        **{theirs: _plain(getattr(config, ours)) for theirs, ours, _ in UNET_PLAIN},
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in config.attention],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(config.attention)],
        "mid_block_type": UNET_MIDDLES[config.middle],
        "time_cond_proj_dim": config.guidance_channels or None,
        "attention_type": "gated" if config.gated else "default",
        "addition_embed_type": "text_time" if config.size_channels else None,
        "addition_time_embed_dim": config.size_channels or None,
        "projection_class_embeddings_input_dim": 6 * config.size_channels + config.pooled_width if config.size_channels else None,
        "class_embed_type": CLASS_EMBEDDINGS[config.class_embedding],
        "num_class_embeds": config.class_width if config.class_embedding == "table" else None,
    }
    if config.class_embedding == "projection":
        values["projection_class_embeddings_input_dim"] = config.class_width
    if not config.stock:
        values |= {name: getattr(config, name) for name in UNET_OWN}
    return values


def _textless_to_diffusers(config: Any) -> dict[str, Any]:
    return {
        **renamed_to_diffusers(TEXTLESS_UNET, config, TEXTLESS_FIXED, TEXTLESS_PLAIN),
        "attention_head_dim": None if config.single_headed else config.channels[0] // config.level_heads[0],
        "down_block_types": ["AttnDownBlock2D" if on else "DownBlock2D" for on in config.attention],
        "up_block_types": ["AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(config.attention)],
        "downsample_padding": 0 if config.padded_at_end else 1,
    }


def _textless_from_diffusers(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    said, special = f"{where} of {TEXTLESS_UNET}", {"attention_head_dim", "down_block_types", "up_block_types", "downsample_padding"}
    _check_fields(said, values, TEXTLESS_FIXED, TEXTLESS_PLAIN, special)
    fields = {ours: _tuple(values.get(theirs, default)) for theirs, ours, default in TEXTLESS_PLAIN}
    levels = _attention(said, "down_block_types", values.get("down_block_types", ["DownBlock2D"] + 3 * ["AttnDownBlock2D"]), *ATTENDS)
    mirrored = ["AttnUpBlock2D" if on else "UpBlock2D" for on in reversed(levels)]
    _check_mirror(said, values.get("up_block_types", 3 * ["AttnUpBlock2D"] + ["UpBlock2D"]), mirrored)
    padding, width, channels = values.get("downsample_padding", 1), values.get("attention_head_dim", 8), fields["channels"]
    if padding not in (0, 1) or isinstance(padding, bool):
        raise _refusal(said, "downsample_padding", padding, "0 or 1")
    if not isinstance(channels, tuple) or not all(type(one) is int and one > 0 for one in channels):
        raise _refusal(said, "block_out_channels", channels, "whole numbers")
    if width is not None and (type(width) is not int or width < 1 or any(one % width for one in channels)):
        raise _refusal(said, "attention_head_dim", width, "null, or a divisor of block_out_channels,")
    heads = tuple(1 if width is None else one // width for one in channels)
    return fields | {"attention": levels, "heads": heads, "context_width": 0, "padded_at_end": padding == 0}


def names_of(plain: Plain) -> dict[str, str]:
    """diffusers' names of fields by ours."""
    return {ours: theirs for theirs, ours, _ in plain}


LEVEL_NAMES = {"attention": "down_block_types"}  # besides them, of U-Nets and autoencoders


def require_buildable(channels: Sequence[int], blocks: int) -> None:
    """Refuse a network of so many blocks that building it would take minutes.

    Raises:
        UserError: if it has more than 16 levels or 1024 blocks, counted as if each level had the most.
    """
    if not 1 <= len(channels) <= LEVELS:
        raise UserError(f"channels has {len(channels)} levels; there are 1 to {LEVELS}")
    if len(channels) * blocks > BLOCKS:
        raise UserError(f"layers: {len(channels)} levels of channels with {blocks} blocks each are more than {BLOCKS} blocks")


def require_width(width: int, what: str) -> None:
    """Refuse a layer that is wider than any network's.

    Raises:
        UserError: for more than 65536 channels.
    """
    if width > 2**16:
        raise UserError(f"{what} is {width}; a layer has at most {2**16} channels")


def unet_from_diffusers(values: Mapping[str, Any], where: str = CONFIG) -> dict[str, Any]:
    """The fields of the UNetConfig behind a config.json; private keys (with a leading underscore) are ignored.

    Raises:
        UserError: for a field that is unknown, or whose value this U-Net does not have.
    """
    if values.get("_class_name") == TEXTLESS_UNET:
        return _textless_from_diffusers(values, where)
    own = values.get("_class_name") == OWN_UNET
    _check_class(values, (STOCK_UNET, OWN_UNET), where)
    special = {"down_block_types", "up_block_types", "mid_block_type", "attention_type", "addition_embed_type", "addition_time_embed_dim"}
    special |= {"class_embed_type", "num_class_embeds"}
    special |= {"projection_class_embeddings_input_dim", *(UNET_OWN if own else ())}
    said = f"{where} of {STOCK_UNET}"
    _check_fields(said, values, UNET_FIXED, UNET_PLAIN, special)
    # XL's own file has null for what it leaves as usual.
    fields = {ours: _tuple(default if values.get(theirs) is None else values[theirs]) for theirs, ours, default in UNET_PLAIN}
    for ours, theirs in (("layers", "layers_per_block"), ("context_width", "cross_attention_dim")):
        given = fields[ours]
        if isinstance(given, tuple):
            if not given or any(value != given[0] for value in given):
                raise _refusal(said, theirs, list(given), "one number for all levels")
            fields[ours] = given[0]
    usual = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    down = values.get("down_block_types", usual)
    levels = _attention(said, "down_block_types", down, "CrossAttnDownBlock2D", "DownBlock2D")
    mirrored = ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(levels)]
    usual = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    _check_mirror(said, values.get("up_block_types", usual), mirrored)
    fields["attention"] = levels
    middles = {theirs: ours for ours, theirs in UNET_MIDDLES.items()}
    middle = values.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if not isinstance(middle, str | None) or middle not in middles:
        raise _refusal(said, "mid_block_type", middle, ", ".join(map(str, middles)))
    fields["middle"] = middles[middle]
    kind = values.get("attention_type", "default")
    if kind not in ("default", "gated"):
        raise _refusal(said, "attention_type", kind, "default or gated")
    fields["gated"] = kind == "gated"
    fields |= _added(said, values) | _classed(said, values)
    if own:
        fields |= {name: values[name] for name in UNET_OWN if name in values}
    return fields


def kl_to_diffusers(config: Any) -> dict[str, Any]:
    """A `KLConfig`'s config.json."""
    return {"_class_name": "AutoencoderKL", **KL_FIXED, **_coder_to_diffusers(config, KL_PLAIN)}


def kl_from_diffusers(values: Mapping[str, object], where: str = CONFIG) -> dict[str, Any]:
    """The fields of the KLConfig behind a config.json; raises as `unet_from_diffusers`."""
    return _coder_from_diffusers("AutoencoderKL", values, where, KL_FIXED, KL_PLAIN)


def vq_to_diffusers(config: Any) -> dict[str, Any]:
    """A `VQConfig`'s config.json."""
    values = {"_class_name": "VQModel", **VQ_FIXED, **_coder_to_diffusers(config, VQ_PLAIN)}
    return values | {"vq_embed_dim": config.code_channels or None}


def vq_from_diffusers(values: Mapping[str, object], where: str = CONFIG) -> dict[str, Any]:
    """The fields of the VQConfig behind a config.json; raises as `unet_from_diffusers`."""
    used = {name: value for name, value in values.items() if name not in VQ_IGNORED}
    fields = _coder_from_diffusers("VQModel", used, where, VQ_FIXED, VQ_PLAIN)
    return fields | {"code_channels": fields["code_channels"] or 0}


def renamed_to_diffusers(name: str, config: Any, fixed: Mapping[str, object], plain: Plain) -> dict[str, Any]:
    """The config.json of diffusers' class `name`: what is `fixed` here, and the `plain` fields under their names there."""
    return {"_class_name": name, **fixed, **{theirs: _plain(getattr(config, ours)) for theirs, ours, _ in plain}}


def renamed_from_diffusers(
    name: str, values: Mapping[str, object], fixed: Mapping[str, object], plain: Plain, ignored: Iterable[str] = ()
) -> dict[str, Any]:
    """The `plain` fields behind a config.json of diffusers' class `name`; raises as `unet_from_diffusers`."""
    _check_class(values, (name,), CONFIG)
    _check_fields(f"{CONFIG} of {name}", values, fixed, plain, set(ignored))
    return {ours: _tuple(values.get(theirs, default)) for theirs, ours, default in plain}


def _coder_to_diffusers(config: Any, plain: Plain) -> dict[str, Any]:
    return {
        **{theirs: _plain(getattr(config, ours)) for theirs, ours, _ in plain},
        "down_block_types": ["AttnDownEncoderBlock2D" if on else "DownEncoderBlock2D" for on in config.levels],
        "up_block_types": ["AttnUpDecoderBlock2D" if on else "UpDecoderBlock2D" for on in reversed(config.levels)],
    }


def _coder_from_diffusers(name: str, values: Mapping[str, object], where: str, fixed: Mapping[str, object], plain: Plain) -> dict[str, Any]:
    _check_class(values, (name,), where)
    name = f"{where} of {name}"
    _check_fields(name, values, fixed, plain, {"down_block_types", "up_block_types"})
    fields = {ours: _tuple(values.get(theirs, default)) for theirs, ours, default in plain}
    if not isinstance(fields["channels"], tuple) or not fields["channels"]:
        raise _refusal(name, "block_out_channels", values.get("block_out_channels"), "a list of whole numbers, one for each level,")
    down = values.get("down_block_types", ["DownEncoderBlock2D"])
    levels = _attention(name, "down_block_types", down, "AttnDownEncoderBlock2D", "DownEncoderBlock2D")
    mirrored = ["AttnUpDecoderBlock2D" if on else "UpDecoderBlock2D" for on in reversed(levels)]
    _check_mirror(name, values.get("up_block_types", ["UpDecoderBlock2D"]), mirrored)
    if len(levels) != len(fields["channels"]):
        raise _refusal(name, "down_block_types", down, f"one for each of block_out_channels ({short(fields['channels'])})")
    scale = fields["scaling_factor"]
    return fields | {"attention": levels if any(levels) else None, "scaling_factor": 1.0 if scale is None else scale}


def _added(name: str, values: Mapping[str, object]) -> dict[str, Any]:
    """The micro-conditioning of Stable Diffusion XL."""
    kind = values.get("addition_embed_type")
    if kind is None:
        return {}
    if kind != "text_time":
        raise _refusal(name, "addition_embed_type", kind, "text_time or null")
    size, total = values.get("addition_time_embed_dim"), values.get("projection_class_embeddings_input_dim")
    if type(size) is not int or not 0 < size < 2**16:
        raise _refusal(name, "addition_time_embed_dim", size, f"a whole number from 1 to {2**16 - 1}")
    if type(total) is not int or not 6 * size < total <= 2**20:
        raise _refusal(
            name, "projection_class_embeddings_input_dim", total, f"more than 6 x addition_time_embed_dim ({size}), at most {2**20},"
        )
    return {"size_channels": size, "pooled_channels": total - 6 * size}


def _classed(name: str, values: Mapping[str, object]) -> dict[str, Any]:
    """What joins the time embedding besides: a number's waves, a row of a table, or a vector."""
    kind, count = values.get("class_embed_type"), values.get("num_class_embeds")
    if kind not in (None, "timestep", "projection"):
        raise _refusal(name, "class_embed_type", kind, "timestep, projection or null")
    if kind is None and count is None:
        return {}
    if kind == "timestep":
        return {"class_embedding": kind}
    key = "num_class_embeds" if kind is None else "projection_class_embeddings_input_dim"
    width = values.get(key)
    if type(width) is not int or not 0 < width <= 2**20:
        raise _refusal(name, key, width, f"a whole number from 1 to {2**20}")
    return {"class_embedding": kind or "table", "class_width": width}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _check_class(values: Mapping[str, object], names: tuple[str, ...], where: str) -> None:
    found = values.get("_class_name", names[0])
    if found not in names:
        raise UserError(f"{where}: _class_name is {short(found)}, but a {names[0]} is needed here")


def _check_fields(name: str, values: Mapping[str, object], fixed: Mapping[str, object], plain: Plain, special: set[str]) -> None:
    known = {theirs for theirs, _, _ in plain} | special
    for key, value in values.items():
        if key in fixed:
            if _tuple(value) != fixed[key]:
                raise _refusal(name, key, value, repr(fixed[key]))
        elif key not in known and not key.startswith("_") and value is not None:
            raise UserError(f"{name}: the field {ascii(key)[:80]} (value {short(value)}) is not known here")


def _check_mirror(name: str, up: object, mirrored: list[str]) -> None:
    if not isinstance(up, list | tuple) or list(up) != mirrored:
        raise _refusal(name, "up_block_types", up, f"{mirrored}, the mirror of down_block_types,")


def _attention(name: str, key: str, types: object, attends: str, plain: str) -> tuple[bool, ...]:
    if not isinstance(types, list | tuple) or not 0 < len(types) <= LEVELS:
        raise _refusal(name, key, types, f"a list of 1 to {LEVELS}")
    for block in types:
        if block not in (attends, plain):
            raise _refusal(name, key, block, f"{attends} or {plain}")
    return tuple(block == attends for block in types)


def _refusal(name: str, key: str, value: object, allowed: str) -> UserError:
    return UserError(f"{name}: {key} is {short(value)}; this network has {allowed} only")
