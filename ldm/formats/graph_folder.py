"""Export as graphs: a pipeline folder whose parts are ONNX or OpenVINO files, under the names that optimum's pipelines read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond, Text
from ldm.formats.atomic import write_json
from ldm.formats.export_source import ExportedModel, with_quant_convolutions
from ldm.formats.model_folder import INDEX
from ldm.formats.openvino_graph import load_openvino
from ldm.formats.part import CONFIG
from ldm.formats.pipeline_folder import write_tokenizer
from ldm.formats.rounding import Comparison
from ldm.formats.text_folder import tower_state
from ldm.models.attention import get_attention, set_attention
from ldm.models.autoencoder import KLConfig, fold_latent_stats
from ldm.models.inference import unfolded
from ldm.models.text_tower import TextTower

FILES = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}
NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "openvino": ("openvino",)}
FARTHEST = {"fp32": 1e-4, "fp16": 2e-2}  # how far a graph's answer may lie from the network's, of its largest value
SCALE = 0.18215  # the scaling factor that diffusers' OnnxStableDiffusionPipeline takes for every model's
LATENTS = (4, 8)  # the channels and the factor that it takes
Program = torch.export.ExportedProgram


def check_graphs(source: ExportedModel, form: str) -> None:
    """Refuse a model that the pipelines which open such folders do not join, or a form whose packages are missing.

    Raises:
        UserError: saying which.
    """
    if absent := [name for name in NEEDS[form] if find_spec(name) is None]:
        raise UserError(f"--to {form}: {', '.join(absent)} is not installed here; pip install 'ldm-train[{form}]'")
    network = source.network
    obstacle = (
        f"its network is no U-Net ({network.class_names[0]})"
        if network.folder != "unet"
        else "its network is told sizes (Stable Diffusion XL)"
        if network.reads_size
        else "its network is told a guidance scale, a vector or nothing of the text"
        if network.reads_guidance or network.reads_vector or not network.context_width
        else "its U-Net is ldm's own (coordinates, pooled_text or mask_padding)"
        if not network.stock
        else "its text encoder is no single CLIP"
        if source.pair or not source.clip
        else "its autoencoder is no KL autoencoder"
        if not isinstance(source.autoencoder, KLConfig)
        else ""
    )
    if obstacle:
        raise UserError(f"--to {form}: {obstacle}, and StableDiffusionPipeline's parts alone are written so; write --to diffusers")


def beyond_onnx_pipeline(source: ExportedModel, form: str) -> str:
    """Why diffusers' pipeline of ONNX does not draw with a model that `check_graphs` lets pass; empty if it does."""
    codec = source.autoencoder
    if form != "onnx" or not isinstance(codec, KLConfig) or (codec.latent_channels, codec.factor) == LATENTS:
        return ""
    own = f"{codec.latent_channels} channels of latents at factor {codec.factor}"
    return f"diffusers' OnnxStableDiffusionPipeline draws 4 channels at factor 8, not {own}; onnxruntime runs the parts"


class UNetCall(nn.Module):
    """A U-Net under the names of its inputs in a pipeline."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """(B,C,h,w), (1,) and (B,L,D) -> (B,C',h,w)."""
        every = torch.ones(encoder_hidden_states.shape[:2], dtype=torch.bool)
        time = timestep.expand(sample.shape[0])
        made: Tensor = self.network(sample, time, Cond(text=Text(tokens=encoder_hidden_states, mask=every)))
        return made


class TextCall(nn.Module):
    """A CLIP's text tower."""

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B,L) int32 -> the last states (B,L,D), and the end token's (B,D)."""
        states = self.tower(input_ids.long())
        return states.last_hidden_state, states.pooler_output


class EncoderCall(nn.Module):
    """The encoder of a KL autoencoder."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor) -> Tensor:
        """(B,3,H,W) in [-1,1] -> mean and log-variance, one behind the other (B,2c,h,w)."""
        return torch.cat(self.network.encode(sample), dim=1)


class DecoderCall(nn.Module):
    """The decoder of a KL autoencoder."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent_sample: Tensor) -> Tensor:
        """(B,c,h,w) -> (B,3,H,W), about [-1,1]."""
        made: Tensor = self.network.decode(latent_sample)
        return made


@dataclass(frozen=True)
class Part:
    """Part of a pipeline that becomes a graph."""

    name: str  # of its folder
    config: Mapping[str, Any]  # the content of its config.json
    call: nn.Module  # of named tensors
    example: Mapping[str, Tensor]
    free: Mapping[str, Mapping[int, str]]  # axes of any length, by input, and what they are called
    gives: tuple[str, ...]  # names of what comes out

    def program(self) -> Program:
        """Its operations, for shapes of any length along the free axes."""
        shapes = {name: dict.fromkeys(self.free[name], torch.export.Dim.AUTO) for name in self.example}
        with torch.no_grad():
            return torch.export.export(self.call, (), dict(self.example), dynamic_shapes=shapes)


def parts_of(source: ExportedModel, scale: float | None) -> list[Part]:
    """The parts of a model that `check_graphs` lets pass.

    Args:
        scale: the scaling factor that its latents are to have; None: its own.
    """
    unet, text = source.parts["unet"], source.parts["text_encoder"]
    assert isinstance(source.autoencoder, KLConfig)
    codec, state = with_quant_convolutions(source.autoencoder, source.parts["vae"].state)
    if scale is not None and codec.scaling_factor != scale:
        channels = codec.latent_channels
        codec, state = fold_latent_stats(codec, state, (0.0,) * channels, (scale / codec.scaling_factor,) * channels)
        codec = replace(codec, scaling_factor=scale)
    tower = TextTower(dict(text.config))
    vae = codec.build()
    network = source.network.build()
    for module, own in ((network, unet.state), (vae, state), (tower, tower_state(dict(text.state)))):
        module.load_state_dict(own)
    plain = [unfolded(module.eval().requires_grad_(False)) for module in (network, vae)]
    length, least, factor = tower.config.max_position_embeddings, 2 ** (len(unet.config["block_out_channels"]) - 1), codec.factor
    draw = torch.Generator().manual_seed(0)
    batch, map_axes = {0: "batch"}, {0: "batch", 2: "height", 3: "width"}
    latent = torch.randn(2, source.network.out_channels, 8, 9, generator=draw)
    sample = torch.randn(2, source.network.in_channels, 2 * least, 3 * least, generator=draw)
    told = torch.randn(2, length, source.network.context_width, generator=draw)
    image = torch.rand(2, 3, 8 * factor, 9 * factor, generator=draw) * 2 - 1
    ids = torch.randint(len(text.state["text_model.embeddings.token_embedding.weight"]), (2, length), generator=draw, dtype=torch.int32)
    said = codec.to_diffusers()
    return [
        Part("text_encoder", text.config, TextCall(tower.eval()), {"input_ids": ids}, {"input_ids": {**batch}}, STATES),
        Part(
            "unet",
            unet.config,
            UNetCall(plain[0]),
            {"sample": sample, "timestep": torch.tensor([500.0]), "encoder_hidden_states": told},
            {"sample": map_axes, "timestep": {}, "encoder_hidden_states": {0: "batch", 1: "sequence_length"}},
            ("out_sample",),
        ),
        Part("vae_encoder", said, EncoderCall(plain[1]), {"sample": image}, {"sample": map_axes}, ("latent_parameters",)),
        Part("vae_decoder", said, DecoderCall(plain[1]), {"latent_sample": latent}, {"latent_sample": map_axes}, ("sample",)),
    ]


STATES = ("last_hidden_state", "pooler_output")


def write_graphs(source: ExportedModel, folder: Path, form: str, dtype: str, say: Callable[[str], None]) -> list[Comparison]:
    """Fill an empty folder with a model's parts as graphs, tokenizer and schedule; run every graph and compare it with its network.

    Args:
        form: onnx or openvino.
        dtype: of the weights: fp32, or of openvino fp16.

    Raises:
        UserError: for a model of another kind, a part that does not convert, or whose graph gives something else.
    """
    check_graphs(source, form)
    kernel, done = get_attention(), []
    set_attention("sdpa")  # one operation, whatever the sides
    try:
        for part in parts_of(source, SCALE if form == "onnx" else None):
            place = folder / part.name
            place.mkdir(parents=True)
            try:
                with warnings.catch_warnings(), redirect_stdout(StringIO()):
                    warnings.simplefilter("ignore")
                    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
                    WRITERS[form](part, place / FILES[form], dtype)
                done.append(_compared(part, place / FILES[form], form, dtype))
            except UserError:
                raise
            except Exception as error:  # converters refuse with many types
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                raise UserError(f"--to {form}: {part.name} does not convert ({reason}); write --to diffusers") from error
            write_json(place / CONFIG, dict(part.config))
            say(str(done[-1]))
    finally:
        set_attention(kernel)
    for name, tokenizer in source.tokenizers.items():
        write_tokenizer(tokenizer, source.name, folder / name)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", source.scheduler)
    write_json(folder / INDEX, _index(source, form))
    return done


def _write_onnx(part: Part, file: Path, dtype: str) -> None:
    made = torch.onnx.export(part.program(), input_names=list(part.example), output_names=list(part.gives), dynamo=True, verbose=False)
    assert made is not None
    _name_axes(made.model, part)
    size = sum(weight.numel() * weight.element_size() for weight in part.call.parameters())
    made.save(file, external_data=size > 2**30)  # beside the file, which holds less than 2 GB


def _name_axes(model: Any, part: Part) -> None:
    """Call the free axes by what they are: torch numbers them."""
    names = {}
    for value in model.graph.inputs:
        for axis, name in part.free.get(value.name, {}).items():
            names[str(value.shape[axis])] = name
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, length in enumerate(value.shape):
            if str(length) in names:
                value.shape[axis] = names[str(length)]


def _write_openvino(part: Part, file: Path, dtype: str) -> None:
    openvino = load_openvino()
    model = openvino.convert_model(part.program())
    for name, value in zip(part.example, model.inputs, strict=True):
        value.get_tensor().set_names({name})
    for name, value in zip(part.gives, model.outputs, strict=True):
        value.get_tensor().set_names({name})
    openvino.save_model(model, file, compress_to_fp16=dtype == "fp16")


WRITERS: dict[str, Callable[[Part, Path, str], None]] = {"onnx": _write_onnx, "openvino": _write_openvino}


def _answers(file: Path, form: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What a graph on disk gives, in float32."""
    values = {name: value.numpy() for name, value in inputs.items()}
    if form == "onnx":
        import onnxruntime

        found: Sequence[Any] = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, values)
    else:
        core = load_openvino().Core()
        found = list(core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values).values())
    return [torch.from_numpy(value) for value in found]


def _compared(part: Part, file: Path, form: str, dtype: str) -> Comparison:
    """The largest difference of a graph's answers from the network's, of twice as many samples as it was converted at.

    Raises:
        UserError: if it is more than rounding explains.
    """
    larger = {name: torch.cat([value] * 2) if 0 in part.free[name] else value for name, value in part.example.items()}
    with torch.no_grad():
        right = part.call(**larger)
    right = right if isinstance(right, tuple) else (right,)
    largest = 0.0
    for name, value, found in zip(part.gives, right, _answers(file, form, larger), strict=True):
        error = float((found - value).abs().max())
        if found.shape != value.shape or not error <= FARTHEST[dtype] * max(float(value.abs().max()), 1e-6):
            raise UserError(f"{file}: {name} differs from the network's by {error:.3g}; nothing was kept, write --to diffusers")
        largest = max(largest, error)
    size = sum(one.stat().st_size for one in file.parent.iterdir() if one.name != CONFIG)
    return Comparison(part.name, sum(1 for _ in part.call.parameters()), size, largest)


def _index(source: ExportedModel, form: str) -> dict[str, Any]:
    """model_index.json: of ONNX as diffusers' own pipeline of it reads it, of OpenVINO as optimum writes it."""
    import diffusers

    absent: list[None] = [None, None]
    common = {
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", source.scheduler["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": absent,
        "safety_checker": absent,
        "requires_safety_checker": False,
    }
    if form == "onnx":
        parts = ("text_encoder", "unet", "vae_encoder", "vae_decoder")
        return {"_class_name": "OnnxStableDiffusionPipeline", **common, **{name: ["diffusers", "OnnxRuntimeModel"] for name in parts}}
    opened = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": absent,
    }
    return {"_class_name": "StableDiffusionPipeline", **common, **opened}
