"""Single files under CompVis' names: tensors, schedule, metadata, YAML and tokenizer, opened by others and read back."""

from __future__ import annotations

import hashlib
import json
import pickletools
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import finished_model
import numpy as np
import pytest
import torch
import yaml
from finished_model import CAPTIONS, SIDE, STORY, UNET
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.__main__ import main
from ldm.diffusion.process import Process
from ldm.diffusion.schedules import Cosine, Flow, Linear, ScaledLinear
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.formats.compvis import from_compvis, to_compvis
from ldm.formats.compvis_file import inference_yaml, obstacles, schedule_buffers, text_kind
from ldm.formats.export_source import ExportedModel, ExportedNetwork, with_quant_convolutions
from ldm.formats.part import load_part
from ldm.formats.tokenizer_files import load_tokenizer
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig

PROMPTS = list(CAPTIONS[:2])
WIDE = UNetConfig(channels=(32, 64), layers=1, attention=(False, True), heads=2, norm_groups=32, context_width=32)
CLIP_L = {
    "model_type": "clip_text_model",
    "architectures": ["CLIPTextModel"],
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
CLIP_H = {
    **CLIP_L,
    "hidden_size": 1024,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
}


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that CompVis' code can build: groups of 32 everywhere, as there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finished_model, "KL", KLConfig(channels=(32, 32, 32, 64), layers=1, norm_groups=32, latent_channels=4))
        return finished_model.finished_model(tmp_path_factory.mktemp("wide"), network=WIDE)


@pytest.fixture(scope="module")
def single(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    assert export(model, "--to", "single-file", "--out", out) == 0
    return out


def source(network: UNetConfig, autoencoder: KLConfig | VQConfig, text: dict[str, Any], **more: Any) -> ExportedModel:
    """A model of configurations alone."""
    told: dict[str, Any] = {
        "name": "x",
        "parts": {"text_encoder": ExportedNetwork(text, {})},
        "network": network,
        "autoencoder": autoencoder,
        "statistics": None,
        "tokenizers": {"tokenizer": None},
        "process": Process(),
        "scheduler": {},
        "defaults": {"size": (512, 512)},
        "story": {},
        "card": "",
        "notices": (),
        "hash": "",
    }
    return ExportedModel(**{**told, **more})


def test_the_file_alone_gives_every_weight_back_under_our_names(model: Path, single: Path) -> None:
    state = load_file(single)
    with safe_open(single, "pt") as file:
        said = json.loads(file.metadata()["ldm.recipe"])
    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model.")
    for part, name, prefix in (("unet", "unet", prefixes[0]), ("vae", "vae", prefixes[1]), ("text", "text_encoder", prefixes[2])):
        assert any(key.startswith(prefix) for key in state)
        config = said["parts"][name]
        made = {"unet": UNetConfig, "vae": KLConfig}[name].from_diffusers(config) if name != "text_encoder" else config
        back, wanted = from_compvis(part, made, state), load_part(model / name)[1]  # type: ignore[arg-type]
        assert back.keys() == wanted.keys() and all(torch.equal(back[key], wanted[key]) for key in wanted)
    assert state["first_stage_model.encoder.mid.attn_1.q.weight"].ndim == 4  # convolutions there
    others = {key for key in state if not key.startswith(prefixes)}
    assert others == {*schedule_buffers(Process()), "scale_factor"} and state["scale_factor"] == 1.0


def test_the_recipe_tells_how_to_sample_and_how_it_was_made(model: Path, single: Path) -> None:
    family, record = load(model), json.loads((model / "ldm.json").read_text())
    with safe_open(single, "pt") as file:
        said = json.loads(file.metadata()["ldm.recipe"])
    assert said["story"] == STORY and said["defaults"] == record["defaults"] and said["latents"] is None
    assert Process.from_scheduler_config(said["scheduler"]) == family.process
    assert said["source_hash"] == family.content_hash
    folder = single.with_name("tiny.tokenizer")
    assert load_tokenizer(folder)(PROMPTS).input_ids == family.text.tokenizer(PROMPTS).input_ids
    assert {"tokenizer.json", "vocab.json", "merges.txt", "config.json"} <= {path.name for path in folder.iterdir()}


def test_modelspec(single: Path) -> None:
    with safe_open(single, "pt") as file:
        said = file.metadata()
    spec = {name.removeprefix("modelspec."): value for name, value in said.items() if name.startswith("modelspec.")}
    assert spec["sai_model_spec"] == "1.0.0" and spec["architecture"] == "latent-diffusion" and spec["title"] == STORY["name"]
    assert spec["resolution"] == f"{SIDE}x{SIDE}" and spec["prediction_type"] == "epsilon" and spec["date"].endswith("+00:00")
    assert spec["implementation"].endswith("CompVis/latent-diffusion")
    data = single.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert spec["hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()


def test_diffusers_opens_the_file_and_draws_the_same(model: Path, single: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_single_file(str(single), config=str(model), local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(PROMPTS, latents=noise, num_inference_steps=5, guidance_scale=4.0, output_type="np").images * 255
    ours = load(model).sample(PROMPTS, [0, 0], Wanted(steps=5, guidance=4.0, sampler="ddim"), latents=noise).numpy()
    assert np.abs(np.round(theirs) - ours).max() <= 1 and ours.std() > 5


def test_the_ckpt_holds_the_same_tensors_and_nothing_that_runs(model: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.ckpt"
    assert export(model, "--to", "compvis-ckpt", "--dtype", "fp16", "--out", out) == 0
    found = torch.load(out, weights_only=True)
    assert found["global_step"] == 0 and json.loads(found["ldm.recipe"])["story"] == STORY
    wanted = load_file(single)
    state = found["state_dict"]
    assert state.keys() == wanted.keys()
    schedule = {*schedule_buffers(Process()), "scale_factor"}
    for name, value in state.items():
        assert torch.equal(value, wanted[name] if name in schedule else wanted[name].half()), name
    assert (tmp_path / "tiny.yaml").read_text() == single.with_suffix(".yaml").read_text()
    with zipfile.ZipFile(out) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    named = {arg for op, arg, _ in pickletools.genops(data) if op.name == "GLOBAL"}
    assert named <= {"torch._utils _rebuild_tensor_v2", "torch HalfStorage", "torch FloatStorage", "collections OrderedDict"}


def test_half_precision_halves_the_file(model: Path, single: Path, tmp_path: Path) -> None:
    assert export(model, "--to", "single-file", "--dtype", "fp16", "--out", tmp_path / "a.safetensors") == 0
    schedule = 4 * (12 * 1000 + 1)
    whole, half = (sum(value.nbytes for value in load_file(path).values()) for path in (single, tmp_path / "a.safetensors"))
    assert half - schedule == (whole - schedule) / 2
    assert load_file(tmp_path / "a.safetensors")["alphas_cumprod"].dtype == torch.float32


@pytest.mark.parametrize("schedule", [ScaledLinear(), Linear(), Cosine(), ScaledLinear(steps=50)], ids=lambda s: f"{s.kind}{s.steps}")
def test_schedule_buffers_are_the_closed_forms(schedule: Any) -> None:
    betas = schedule.betas()
    bar = np.cumprod(1 - betas)
    before = np.append(1, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    wanted = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": bar**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - bar) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": bar**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / bar - 1) ** 0.5,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * before**0.5 / (1 - bar),
        "posterior_mean_coef2": (1 - before) * (1 - betas) ** 0.5 / (1 - bar),
    }
    found = schedule_buffers(Process(schedule=schedule))
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        assert np.allclose(found[name].numpy(), table.astype(np.float32), rtol=3e-6, atol=1e-12), name


def test_stable_diffusions_schedule_has_its_published_values_and_pure_noise_is_infinite() -> None:
    bar = schedule_buffers(Process())["alphas_cumprod"]
    assert bar[[0, 499, 999]].tolist() == pytest.approx([0.99915, 0.27766965, 0.0046601], rel=1e-5)
    zero = schedule_buffers(Process(target="v", schedule=ScaledLinear(zero_terminal_snr=True)))
    assert zero["alphas_cumprod"][-1] == 0 and zero["betas"][-1] == 1 and zero["sqrt_recip_alphas_cumprod"][-1] == torch.inf
    assert schedule_buffers(Process(target="flow", schedule=Flow())) == {}


def test_the_yaml_of_stable_diffusion_1_is_the_published_one() -> None:
    autoencoder = KLConfig(scaling_factor=0.18215)
    found = yaml.safe_load(inference_yaml(source(UNetConfig(), autoencoder, CLIP_L), autoencoder, "t"))
    params = found["model"]["params"]
    assert found["model"]["target"] == "ldm.models.diffusion.ddpm.LatentDiffusion"
    assert (params["linear_start"], params["linear_end"], params["timesteps"], params["scale_factor"]) == (0.00085, 0.012, 1000, 0.18215)
    assert (params["image_size"], params["channels"], params["conditioning_key"]) == (64, 4, "crossattn")
    unet = params["unet_config"]["params"]
    published = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [1, 2, 4],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 768,
        "legacy": False,
    }
    assert {name: unet[name] for name in published} == published
    vae = params["first_stage_config"]["params"]
    assert vae["embed_dim"] == 4 and vae["ddconfig"] == {
        "double_z": True,
        "z_channels": 4,
        "resolution": 512,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    assert params["cond_stage_config"] == {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}


def test_the_yaml_of_other_models() -> None:
    two = UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True)
    process = Process(target="v")
    params = yaml.safe_load(inference_yaml(source(two, KLConfig(), CLIP_H, process=process), KLConfig(), "t"))["model"]["params"]
    assert params["parameterization"] == "v" and params["unet_config"]["params"]["num_head_channels"] == 64
    assert params["unet_config"]["params"]["use_linear_in_transformer"] is True
    assert params["cond_stage_config"]["params"] == {"arch": "ViT-H-14", "freeze": True, "layer": "penultimate"}
    assert text_kind(CLIP_H) == "open_clip" and text_kind({**CLIP_H, "hidden_act": "quick_gelu"}) == "text"
    paint = replace(UNetConfig(), in_channels=9)
    found = yaml.safe_load(inference_yaml(source(paint, KLConfig(), CLIP_L), KLConfig(), "t"))["model"]
    assert found["target"].endswith("LatentInpaintDiffusion") and found["params"]["conditioning_key"] == "hybrid"
    vq = VQConfig(codes=8192, attention=(False, False, True))
    told = yaml.safe_load(inference_yaml(source(UNetConfig(), vq, CLIP_L, process=Process(schedule=Linear())), vq, "t"))["model"]["params"]
    first = told["first_stage_config"]
    assert first["target"].endswith("VQModelInterface") and first["params"]["n_embed"] == 8192 and first["params"]["embed_dim"] == 3
    assert first["params"]["ddconfig"]["attn_resolutions"] == [128] and told["beta_schedule"] == "sqrt_linear"


def test_the_yaml_of_a_text_encoder_of_ones_own_names_its_folder(model: Path, single: Path) -> None:
    params = yaml.safe_load(single.with_suffix(".yaml").read_text())["model"]["params"]
    assert params["cond_stage_config"]["params"] == {"version": "tiny.tokenizer", "max_length": 16}
    assert params["unet_config"]["params"]["channel_mult"] == [1, 2] and params["scale_factor"] == 1.0
    from transformers import CLIPTextModel, CLIPTokenizer  # as CompVis' FrozenCLIPEmbedder does

    folder = single.with_name("tiny.tokenizer")
    text, ids = CLIPTextModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", max_length=16)
    states = text(torch.tensor(ids.input_ids)).last_hidden_state
    assert torch.allclose(states, load(model).text.encode(PROMPTS).tokens, atol=1e-6)


@pytest.mark.parametrize(
    ("network", "autoencoder", "process", "said"),
    [
        (UNET, KLConfig(), Process(), "unet: norm_groups is 8"),
        (UNetConfig(), KLConfig(channels=(64, 96)), Process(), r"vae: channels is \[64, 96\], multiples of 64"),
        (UNetConfig(depth=(1, 1, 1, 2)), KLConfig(), Process(), "depth is"),
        (UNetConfig(heads=(8, 8, 8, 16)), KLConfig(), Process(), "heads is"),
        (UNetConfig(), KLConfig(), Process(target="flow", schedule=Flow()), "flow"),
        (UNetConfig(), KLConfig(middle_attention=False, attention=(True,) * 4), Process(), "attend without the middle"),
    ],
)
def test_what_the_code_of_compvis_cannot_draw_is_told(network: Any, autoencoder: Any, process: Any, said: str) -> None:
    found = obstacles(source(network, autoencoder, CLIP_L, process=process), autoencoder)
    assert len(found) == 1 and re.search(said, found[0])
    assert obstacles(source(UNetConfig(), KLConfig(), CLIP_L), KLConfig()) == []


def test_vq_and_narrow_groups_are_written_without_a_yaml(vq_model: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "vq.safetensors"
    assert export(vq_model, "--to", "single-file", "--out", out, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert "norm_groups is 8" in told["notices"][0] and "own mean and deviation" in told["notices"][0]
    assert not out.with_suffix(".yaml").exists() and {part["max_error"] for part in told["parts"]} == {0}
    state = load_file(out)
    assert torch.equal(state["first_stage_model.quantize.embedding.weight"], load_part(vq_model / "vqvae")[1]["quantize.embedding.weight"])
    with safe_open(out, "pt") as file:
        said = json.loads(file.metadata()["ldm.recipe"])
    assert said["latents"] == json.loads((vq_model / "vqvae" / "latents.json").read_text())


def test_a_flow_is_written_without_a_schedule(tmp_path: Path, capsys: Any) -> None:
    model = finished_model.finished_model(tmp_path / "flow", process=Process(target="flow", schedule=Flow(shift=2.0)))
    assert export(model, "--to", "single-file", "--out", tmp_path / "a.safetensors") == 0
    assert "schedule: flow, which has no betas" in capsys.readouterr().err
    assert "alphas_cumprod" not in load_file(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        said = file.metadata()
    assert said["modelspec.prediction_type"] == "flow"
    assert Process.from_scheduler_config(json.loads(said["ldm.recipe"])["scheduler"]).schedule == Flow(shift=2.0)


def test_what_compvis_names_cannot_say_is_refused(tmp_path: Path, capsys: Any) -> None:
    own = finished_model.finished_model(tmp_path / "own", network=replace(UNET, coordinates=True, mask_padding=True))
    for form, name in (("single-file", "a.safetensors"), ("compvis-ckpt", "a.ckpt")):
        assert export(own, "--to", form, "--out", tmp_path / name) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "unet: coordinates and mask_padding make it ldm's own (LDMUNet)" in line and "--to diffusers" in line
    from ldm.config.errors import UserError
    from ldm.formats.compvis_file import sayable

    parts = {
        "unet": ExportedNetwork({"_class_name": "x"}, {}),
        "vae": ExportedNetwork({}, {}),
        "text_encoder": ExportedNetwork({"model_type": "t5"}, {}),
    }
    with pytest.raises(UserError, match="text_encoder: t5 has no place in a CompVis file"):
        sayable(source(UNetConfig(), KLConfig(), {}, parts=parts))
    with pytest.raises(UserError, match="size_channels is 256 and there are 1 text encoders, but files know"):
        sayable(source(UNetConfig(size_channels=256), KLConfig(), {}, parts=parts))
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_shift_and_missing_quant_convolutions_become_convolutions() -> None:
    torch.manual_seed(0)
    config = KLConfig(
        channels=(8, 16), layers=1, norm_groups=4, quant_conv=False, post_quant_conv=False, scaling_factor=0.36, shift_factor=0.1
    )
    network = config.build().eval().double()
    made, state = with_quant_convolutions(config, network.state_dict())
    assert (made.quant_conv, made.post_quant_conv, made.shift_factor, made.scaling_factor) == (True, True, None, 0.36)
    other = made.build().eval().double()
    other.load_state_dict(state)
    image = torch.rand(1, 3, 16, 16, dtype=torch.float64) * 2 - 1
    for ours, theirs, shift in zip(network.encode(image), other.encode(image), (0.1, 0.0), strict=True):
        assert torch.allclose(ours - shift, theirs, atol=1e-12)
    latent = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(network.decode(latent), other.decode(latent - 0.1), atol=1e-12)
    plain = {name: value.clone() for name, value in state.items()}
    assert with_quant_convolutions(made, plain)[1].keys() == plain.keys()
    assert to_compvis("vae", made, state)["first_stage_model.quant_conv.weight"].shape == (8, 8, 1, 1)


def test_overwriting_replaces_everything_of_that_name(model: Path, kl_model: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a.safetensors"
    assert export(model, "--to", "single-file", "--out", out) == 0 and (tmp_path / "a.yaml").exists()
    assert export(kl_model, "--to", "single-file", "--out", out) == 2
    assert "is there already; choose another name, or add --overwrite" in capsys.readouterr().err
    assert export(kl_model, "--to", "single-file", "--out", out, "--overwrite") == 0
    assert not (tmp_path / "a.yaml").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "a.tokenizer"]
    assert not (tmp_path / "a.tokenizer" / "model.safetensors").exists()


def test_a_disk_that_fills_while_the_pickle_is_written_says_so(model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import errno
    import os

    import ldm.formats.pickles as module

    class Full(module._Reporting):
        def write(self, data: Any) -> int:
            if self.file.tell() > 100_000:
                self.problems.append(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.ckpt"))
                raise self.problems[-1]
            return super().write(data)

    monkeypatch.setattr(module, "_Reporting", Full)
    assert export(model, "--to", "compvis-ckpt", "--out", tmp_path / "a.ckpt") == 2
    assert "No space left on device; make room" in capsys.readouterr().err and not list(tmp_path.iterdir())
