"""A model written as one file under CompVis' names: .safetensors, or the .ckpt that older tools want."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.diffusion.process import Process
from ldm.diffusion.schedules import Flow
from ldm.formats.atomic import write_json, write_tensors
from ldm.formats.compvis import Part, from_compvis, to_compvis
from ldm.formats.compvis_yaml import inference_yaml, needs_folder, obstacles, text_kind
from ldm.formats.export_source import Source, with_quant_convolutions
from ldm.formats.modelspec import HASH, RECIPE, metadata, recipe, tensor_hash, write_hash
from ldm.formats.part import CONFIG, WEIGHTS
from ldm.formats.pipeline_folder import write_tokenizer
from ldm.formats.rounding import Compared, compared, mapped, rounded
from ldm.models.autoencoder import KLConfig
from ldm.models.unet import UNetConfig

SUFFIX = {"single-file": ".safetensors", "compvis-ckpt": ".ckpt"}
FOLDER = "keep it as a folder: --to diffusers"


@dataclass(frozen=True)
class Sayable:
    """A model as CompVis' names can say it."""

    source: Source
    names: dict[str, Part]  # of each part of the source, what `ldm.formats.compvis` calls it
    configs: dict[str, Any]  # of each part, what `ldm.formats.compvis` asks for
    states: dict[str, dict[str, Tensor]]  # of each part, float32 under diffusers' names
    buffers: dict[str, Tensor]  # the schedule and the scale factor, float32
    obstacles: tuple[str, ...]  # why CompVis' own code cannot draw with it


def sayable(source: Source) -> Sayable:
    """What of a model goes into the file.

    Raises:
        UserError: for a model that CompVis' names cannot say.
    """
    if not isinstance(source.network, UNetConfig):
        raise UserError(f"network: {source.network.kind} has no place in a CompVis file, only a U-Net has; {FOLDER}")
    unet, text = source.parts["unet"].config, source.parts["text_encoder"].config
    if not source.network.stock:
        own = [name for name in ("coordinates", "pooled_text", "mask_padding") if getattr(source.network, name)]
        raise UserError(f"unet: {' and '.join(own)} make it ldm's own ({unet['_class_name']}), which no CompVis file can say; {FOLDER}")
    if source.network.size_channels:
        raise UserError(f"unet: size_channels is {source.network.size_channels}, but CompVis' LatentDiffusion is told no sizes; {FOLDER}")
    if not source.clip:
        raise UserError(f"text_encoder: {text['model_type']} has no place in a CompVis file, only CLIP has; {FOLDER}")
    config, state = source.autoencoder, source.parts[source.codec].state
    if isinstance(config, KLConfig):
        config, state = with_quant_convolutions(config, state)
    names: dict[str, Part] = {"unet": "unet", source.codec: "vae", "text_encoder": "text"}
    if text_kind(text) == "open_clip":
        names["text_encoder"] = "open_clip"
    return Sayable(
        source=source,
        names=names,
        configs={"unet": source.network, source.codec: config, "text_encoder": text},
        states={name: part.state for name, part in source.parts.items()} | {source.codec: state},
        buffers={**schedule_buffers(source.process), "scale_factor": torch.tensor(float(config.scaling_factor))},
        obstacles=tuple(obstacles(source, config)),
    )


def schedule_buffers(process: Process) -> dict[str, Tensor]:
    """The tables of LatentDiffusion.register_schedule (steps,), computed in float64; none for a flow.

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


def write_file(model: Sayable, file: Path, dtype: str, say: Callable[[str], None]) -> list[Compared]:
    """Write NAME.safetensors or NAME.ckpt with NAME.tokenizer/ and, where CompVis' code can build the model, NAME.yaml beside it.

    The .ckpt is the only pickle that ldm ever writes, because the tools that ask for one read nothing else; it holds
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
    write_tokenizer(source, tokenizer)
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
        _save_pickle({"state_dict": tensors, "global_step": 0, RECIPE: json.dumps(said, ensure_ascii=False)}, file)
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


def _check(model: Sayable, back: dict[str, Tensor], dtype: str, where: str, say: Callable[[str], None]) -> list[Compared]:
    done = []
    for name, part in model.names.items():
        found = from_compvis(part, model.configs[name], back)
        done.append(compared(name, model.states[name], found, dtype, where))
        say(str(done[-1]))
    for name, value in model.buffers.items():
        if name not in back or not torch.equal(back[name], value):
            raise UserError(f"{where}: {name} came back different; nothing was kept, export again")
    known = len(model.buffers) + sum(name.startswith(("model.", "first_stage_model.", "cond_stage_model.")) for name in back)
    if known != len(back):
        raise UserError(f"{where}: {len(back) - known} tensors more than were written; nothing was kept, export again")
    return done


def _save_pickle(values: dict[str, Any], file: Path) -> None:
    """torch.save through Python's own file, whose errors say what the disk said."""
    problems: list[OSError] = []
    with file.open("wb") as opened:
        try:
            torch.save(values, cast(IO[bytes], _Reporting(opened, problems)))
        except RuntimeError:
            if problems:
                raise problems[0] from None
            raise


class _Reporting:
    """A file that remembers what went wrong, because torch.save only says that something did."""

    def __init__(self, file: Any, problems: list[OSError]) -> None:
        self.file, self.problems = file, problems

    def write(self, data: Any) -> int:
        """As the file's."""
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.problems.append(error)
            raise

    def flush(self) -> None:
        """As the file's."""
        self.file.flush()
