"""The YAML file from which CompVis' code builds a model: LatentDiffusion with its U-Net, autoencoder and text encoder."""

from __future__ import annotations

from typing import Any

import yaml

from ldm.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear
from ldm.formats.compvis import departures
from ldm.formats.export_source import ExportedModel
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig

BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "cosine": "cosine"}  # CompVis' names of the schedules
PARAMETERIZATION = {"epsilon": "eps", "v": "v", "x0": "x0"}
CLIP_L = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
CLIP_H = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "hidden_act": "gelu", "vocab_size": 49408}
CLIP_H_LAYERS = {23: "penultimate", 24: "last"}


def text_kind(config: dict[str, Any]) -> str:
    """Under which names CompVis' checkpoints keep a CLIP: open_clip for OpenCLIP's ViT-H (Stable Diffusion 2), text for others."""
    huge = all(config[name] == value for name, value in CLIP_H.items()) and config["num_hidden_layers"] in CLIP_H_LAYERS
    return "open_clip" if huge else "text"


def needs_folder(config: dict[str, Any]) -> bool:
    """Whether CompVis' code must be given the text encoder as a folder, because it is not one that it knows by name."""
    return text_kind(config) == "text" and any(config[name] != value for name, value in CLIP_L.items())


def obstacles(source: ExportedModel, autoencoder: KLConfig | VQConfig) -> list[str]:
    """Why CompVis' code cannot build this model, or would draw something else with it; empty where it can."""
    found = [f"unet: {text}" for text in departures(source.network)] + [f"{source.codec}: {text}" for text in departures(autoencoder)]
    found += [f"unet: {text}" for text in _multiples(source.network.channels)]
    found += [f"{source.codec}: {text}" for text in _multiples(autoencoder.channels)]
    if not autoencoder.middle_attention and any(autoencoder.levels):
        found.append(f"{source.codec}: levels attend without the middle")
    if len(set(source.network.level_depth)) > 1:
        found.append(f"unet: depth is {list(source.network.level_depth)}, one number for all levels is needed")
    if len(set(source.network.level_heads)) > 1 and head_width(source.network) is None:
        found.append(f"unet: heads is {list(source.network.level_heads)}, one number, or heads of one width, are needed")
    if isinstance(source.process.schedule, Flow):
        found.append("schedule: flow, which has no betas")
    if source.statistics:
        found.append("vqvae: every channel of its latents has its own mean and deviation, one scale_factor cannot say them")
    return found


def _multiples(channels: tuple[int, ...]) -> list[str]:
    odd = [width for width in channels if width % channels[0]]
    return [f"channels is {list(channels)}, multiples of {channels[0]} are needed"] if odd else []


def head_width(network: UNetConfig) -> int | None:
    """Channels of every attention head; None where levels differ."""
    widths = {channels // heads for channels, heads in zip(network.channels, network.level_heads, strict=True)}
    return widths.pop() if len(widths) == 1 else None


def inference_yaml(source: ExportedModel, autoencoder: KLConfig | VQConfig, tokenizer: str) -> str:
    """The text of the YAML file of a model without `obstacles`.

    Args:
        source: the model.
        autoencoder: as it is written.
        tokenizer: the name of the folder beside the file, from which CompVis' code reads a text encoder that it does not know.
    """
    params: dict[str, Any] = {
        **_schedule(source),
        "num_timesteps_cond": 1,
        "log_every_t": 200,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": source.defaults["size"][0] // 2 ** (len(autoencoder.channels) - 1),
        "channels": source.network.out_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if source.inpaints else "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": float(autoencoder.scaling_factor),
        "use_ema": False,
        "unet_config": _unet(source.network),
        "first_stage_config": _autoencoder(source, autoencoder),
        "cond_stage_config": _text(source, tokenizer),
    }
    kind = "LatentDiffusion"
    if source.inpaints:
        kind, params = "LatentInpaintDiffusion", {**params, "finetune_keys": None}
    said = {"model": {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}}
    beside = f"; version is the path of the folder {tokenizer}" if needs_folder(source.parts["text_encoder"].config) else ""
    return f"# From this the code of CompVis builds the model{beside}.\n" + yaml.safe_dump(said, sort_keys=False)


def _schedule(source: ExportedModel) -> dict[str, Any]:
    schedule = source.process.schedule
    assert isinstance(schedule, Linear | ScaledLinear | Cosine)
    values: dict[str, Any] = {"timesteps": schedule.steps, "beta_schedule": BETAS[schedule.kind]}
    if not isinstance(schedule, Cosine):
        values |= {"linear_start": schedule.beta_start, "linear_end": schedule.beta_end}
    return {**values, "parameterization": PARAMETERIZATION[source.process.target]}


def _unet(network: UNetConfig) -> dict[str, Any]:
    equal = len(set(network.level_heads)) == 1
    heads = {"num_heads": network.level_heads[0]} if equal else {"num_head_channels": head_width(network)}
    params = {
        "image_size": network.sample_size or 32,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "model_channels": network.channels[0],
        "attention_resolutions": [2**i for i, on in enumerate(network.attention) if on],
        "num_res_blocks": network.layers,
        "channel_mult": [width // network.channels[0] for width in network.channels],
        **heads,
        "use_spatial_transformer": True,
        "transformer_depth": network.level_depth[0],
        "context_dim": network.context_width,
        "use_checkpoint": False,
        "legacy": False,
    }
    if network.linear_projection:
        params["use_linear_in_transformer"] = True  # the code of Stable Diffusion 2 knows it
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _autoencoder(source: ExportedModel, config: KLConfig | VQConfig) -> dict[str, Any]:
    side = source.defaults["size"][0]
    coder: dict[str, Any] = {
        "double_z": isinstance(config, KLConfig),
        "z_channels": config.latent_channels,
        "resolution": side,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": config.channels[0],
        "ch_mult": [width // config.channels[0] for width in config.channels],
        "num_res_blocks": config.layers,
        "attn_resolutions": [side // 2**i for i, on in enumerate(config.levels) if on],
        "dropout": 0.0,
    }
    if not config.middle_attention:
        coder["attn_type"] = "none"
    loss = {"target": "torch.nn.Identity"}
    if isinstance(config, VQConfig):
        params = {"embed_dim": config.code_width, "n_embed": config.codes, "ddconfig": coder, "lossconfig": loss}
        return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}
    params = {"embed_dim": config.latent_channels, "monitor": "val/rec_loss", "ddconfig": coder, "lossconfig": loss}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def _text(source: ExportedModel, tokenizer: str) -> dict[str, Any]:
    config = source.parts["text_encoder"].config
    if text_kind(config) == "open_clip":
        params = {"arch": "ViT-H-14", "freeze": True, "layer": CLIP_H_LAYERS[config["num_hidden_layers"]]}
        return {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
    found: dict[str, Any] = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    if needs_folder(config):
        found["params"] = {"version": tokenizer, "max_length": source.tokenizer.model_max_length}
    return found
