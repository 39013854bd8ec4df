"""Export as one CompVis checkpoint: .safetensors or .ckpt, with the YAML from which CompVis' code builds the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.process import Process
from ldm.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear
from ldm.formats.atomic import write_json, write_tensors
from ldm.formats.compvis import PREFIX, Part, departures, from_compvis, head_width, to_compvis
from ldm.formats.export_source import ExportedModel, with_quant_convolutions
from ldm.formats.modelspec import HASH, RECIPE, metadata, recipe, tensor_hash, write_hash
from ldm.formats.part import CONFIG, WEIGHTS
from ldm.formats.pickles import save_pickle
from ldm.formats.pipeline_folder import write_tokenizer
from ldm.formats.rounding import Comparison, compared, mapped, rounded
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
    found = [f"unet: {text}" for text in departures(source.unet)] + [f"{source.codec}: {text}" for text in departures(autoencoder)]
    found += [f"unet: {text}" for text in _multiples(source.unet.channels)]
    found += [f"{source.codec}: {text}" for text in _multiples(autoencoder.channels)]
    if not autoencoder.middle_attention and any(autoencoder.levels):
        found.append(f"{source.codec}: levels attend without the middle")
    if len(set(source.unet.level_depth)) > 1:
        found.append(f"unet: depth is {list(source.unet.level_depth)}, one number for all levels is needed")
    if len(set(source.unet.level_heads)) > 1 and head_width(source.unet) is None:
        found.append(f"unet: heads is {list(source.unet.level_heads)}, one number, or heads of one width, are needed")
    if source.unet.out_channels != autoencoder.latent_width:
        found.append("unet: it says the variance of the steps, too")
    if isinstance(source.process.schedule, Flow):
        found.append("schedule: flow, which has no betas")
    if source.pair:
        found.append("unet: it is told sizes and two texts, which Stability's code for XL does")
    if source.statistics:
        found.append("vqvae: every channel of its latents has its own mean and deviation, one scale_factor cannot say them")
    return found


def _multiples(channels: tuple[int, ...]) -> list[str]:
    odd = [width for width in channels if width % channels[0]]
    return [f"channels is {list(channels)}, multiples of {channels[0]} are needed"] if odd else []


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
        "channels": source.unet.out_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if source.inpaints else "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": float(autoencoder.scaling_factor),
        "use_ema": False,
        "unet_config": _unet(source.unet),
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
        found["params"] = {"version": tokenizer, "max_length": source.tokenizers["tokenizer"].model_max_length}
    return found


SUFFIX = {"single-file": ".safetensors", "compvis-ckpt": ".ckpt"}
FOLDER = "keep it as a folder: --to diffusers"


@dataclass(frozen=True)
class CompVisModel:
    """A model in CompVis' terms: its parts, their names there, and the schedule's buffers."""

    source: ExportedModel
    names: dict[str, Part]  # of each part of the source, what `ldm.formats.compvis` calls it
    configs: dict[str, Any]  # of each part, what `ldm.formats.compvis` asks for
    states: dict[str, dict[str, Tensor]]  # of each part, float32 under diffusers' names
    buffers: dict[str, Tensor]  # the schedule and the scale factor, float32
    obstacles: tuple[str, ...]  # why CompVis' own code cannot draw with it


def sayable(source: ExportedModel) -> CompVisModel:
    """Convert a model for export under CompVis' names.

    Raises:
        UserError: for a model that CompVis' names cannot say.
    """
    if not isinstance(source.network, UNetConfig):
        raise UserError(f"network: {source.network.kind} has no place in a CompVis file, only a U-Net has; {FOLDER}")
    unet, text = source.parts["unet"].config, source.parts["text_encoder"].config
    if not source.network.stock:
        own = [name for name in ("coordinates", "pooled_text", "mask_padding") if getattr(source.network, name)]
        raise UserError(f"unet: {' and '.join(own)} make it ldm's own ({unet['_class_name']}), which no CompVis file can say; {FOLDER}")
    if source.pair != source.network.reads_size:
        said = f"size_channels is {source.network.size_channels} and there are {1 + source.pair} text encoders"
        raise UserError(f"unet: {said}, but files know sizes and two text encoders together only (XL); {FOLDER}")
    if not source.clip:
        raise UserError(f"text_encoder: {text['model_type']} has no place in a CompVis file, only CLIP has; {FOLDER}")
    config, state = source.autoencoder, source.parts[source.codec].state
    if not isinstance(config, KLConfig | VQConfig):
        raise UserError(f"vae: {config.to_diffusers()['_class_name']} has no place in a CompVis file; {FOLDER}")
    if isinstance(config, KLConfig):
        config, state = with_quant_convolutions(config, state)
    names: dict[str, Part] = {"unet": "unet", source.codec: "vae", "text_encoder": "text"}
    if source.pair:
        names |= {"text_encoder": "xl_text", "text_encoder_2": "xl_open_clip"}
    elif text_kind(text) == "open_clip":
        names["text_encoder"] = "open_clip"
    return CompVisModel(
        source=source,
        names=names,
        configs={name: part.config for name, part in source.parts.items()} | {"unet": source.network, source.codec: config},
        states={name: part.state for name, part in source.parts.items()} | {source.codec: state},
        buffers={**schedule_buffers(source.process), "scale_factor": torch.tensor(float(config.scaling_factor))},
        obstacles=tuple(obstacles(source, config)),
    )


def schedule_buffers(process: Process) -> dict[str, Tensor]:
    """Noise schedule buffers of LatentDiffusion.register_schedule (steps,), computed in float64; none for a flow.

    Ho 2020 (arXiv 2006.11239), eqs. 4 and 7. At a last step of pure noise the tables that divide by alpha are infinite, as
    they are there.
    """
    if isinstance(process.schedule, Flow):
        return {}
    alpha, sigma = (value.numpy() for value in process.alpha_sigma(torch.arange(process.schedule.steps)))
    bar = alpha**2
    before = np.append(1.0, bar[:-1])
    betas = 1 - bar / before
    posterior = betas * (1 - before) / (1 - bar)
    with np.errstate(divide="ignore"):
        tables = {
            "betas": betas,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": alpha,
            "sqrt_one_minus_alphas_cumprod": sigma,
            "log_one_minus_alphas_cumprod": np.log(1 - bar),
            "sqrt_recip_alphas_cumprod": 1 / alpha,
            "sqrt_recipm1_alphas_cumprod": sigma / alpha,
            "posterior_variance": posterior,
            "posterior_log_variance_clipped": np.log(np.maximum(posterior, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
            "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
        }
    return {name: torch.from_numpy(np.ascontiguousarray(table)).float() for name, table in tables.items()}


def write_file(model: CompVisModel, file: Path, dtype: str, say: Callable[[str], None]) -> list[Comparison]:
    """Write NAME.safetensors or NAME.ckpt with NAME.tokenizer/ and, where CompVis' code can build the model, NAME.yaml beside it.

    The .ckpt and published generators are the only pickles that ldm writes, because the tools that ask for one read nothing else; it holds
    tensors, numbers and texts alone and loads with weights_only=True.

    Args:
        model: what is written.
        file: where to; nothing of these names is there yet.
        dtype: fp32, fp16 or bf16; the schedule stays float32.
        say: told of each part as it is done.

    Raises:
        UserError: naming the weight that the precision cannot hold, or that was read back different.
    """
    source = model.source
    tokenizer = file.with_name(f"{file.stem}.tokenizer")
    write_tokenizer(source.tokenizers["tokenizer"], source.name, tokenizer)
    text = source.parts["text_encoder"]
    write_json(tokenizer / CONFIG, text.config)
    if needs_folder(text.config) and not model.obstacles:
        write_tensors(tokenizer / f"{WEIGHTS[1]}.safetensors", rounded("text_encoder", text.state, dtype))
    config = model.configs[source.codec]
    if not model.obstacles:
        file.with_suffix(".yaml").write_text(inference_yaml(source, config, tokenizer.name), encoding="utf-8")
    said = recipe(source, config.to_diffusers())
    tensors = dict(model.buffers)
    for name, part in model.names.items():
        tensors |= to_compvis(part, model.configs[name], rounded(name, model.states[name], dtype))
    tensors = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    if file.suffix == SUFFIX["compvis-ckpt"]:
        save_pickle({"state_dict": tensors, "global_step": 0, RECIPE: json.dumps(said, ensure_ascii=False)}, file)
        del tensors
        back = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    else:
        write_tensors(file, tensors, metadata(source, said, dtype))
        del tensors
        found = write_hash(file)
        back = mapped([file])
        if tensor_hash(file) != found:
            raise UserError(f"{file}: its bytes changed between two readings, so {HASH} would be wrong; nothing was kept, export again")
    return _check(model, back, dtype, str(file), say)


def _check(model: CompVisModel, back: dict[str, Tensor], dtype: str, where: str, say: Callable[[str], None]) -> list[Comparison]:
    done = []
    for name, part in model.names.items():
        found = from_compvis(part, model.configs[name], back)
        done.append(compared(name, model.states[name], found, dtype, where))
        say(str(done[-1]))
    for name, value in model.buffers.items():
        if name not in back or not torch.equal(back[name], value):
            raise UserError(f"{where}: {name} came back different; nothing was kept, export again")
    prefixes = tuple(PREFIX[part] for part in model.names.values())
    known = len(model.buffers) + sum(name.startswith(prefixes) for name in back)
    if known != len(back):
        raise UserError(f"{where}: {len(back) - known} tensors more than were written; nothing was kept, export again")
    return done
