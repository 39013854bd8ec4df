"""Graphs that other programs run: what a model's parts give, in shapes of any length, and pipelines that open the folder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import CAPTIONS, finished_model

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.families.registry import exported
from ldm.formats import graph_folder
from ldm.formats.graph_folder import FILES, NEEDS, _answers, beyond_onnx_pipeline, check_graphs, parts_of

STEPS = 3
PARTS = ("text_encoder", "unet", "vae_encoder", "vae_decoder")


def needs(form: str) -> Any:
    return pytest.mark.skipif(any(find_spec(name) is None for name in NEEDS[form]), reason=f"needs {', '.join(NEEDS[form])}")


def exported_to(form: str, folder: Path, *words: str) -> Path:
    model, out = finished_model(folder), folder / form
    assert main(["export", str(model), "--to", form, "--out", str(out), *words]) == 0
    assert main(["export", str(model), "--to", "diffusers", "--out", str(folder / "diffusers")]) == 0
    return out


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_to("onnx", tmp_path_factory.mktemp("onnx"))


@pytest.fixture(scope="module")
def openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_to("openvino", tmp_path_factory.mktemp("openvino"))


def theirs(folder: Path) -> Any:
    """diffusers' pipeline on the folder beside."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder.parent / "diffusers", safety_checker=None)


def drawn(pipeline: Any, noise: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(CAPTIONS[0], height=32, width=40, num_inference_steps=STEPS, guidance_scale=4.0, latents=noise, output_type="np").images
    return np.asarray(made)


def every_part_is_theirs(folder: Path, form: str, tolerance: float) -> None:
    """Each graph against diffusers' and transformers' module of the same model, at sizes that it was not converted at."""
    pipeline, (height, width) = theirs(folder), (9, 13)
    torch.manual_seed(0)
    ids = torch.randint(300, (3, 16), dtype=torch.int32)
    with torch.no_grad():
        states = pipeline.text_encoder(ids.long())
        x, told = torch.randn(3, 4, height, width), states.last_hidden_state
        right = {
            "text_encoder": ({"input_ids": ids}, [told, states.pooler_output]),
            "unet": (
                {"sample": x, "timestep": torch.tensor([321.0]), "encoder_hidden_states": told},
                [pipeline.unet(x, 321.0, told).sample],
            ),
        }
    for name, (inputs, wanted) in right.items():
        found = _answers(folder / name / FILES[form], form, inputs)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape and (one - other).abs().max() < tolerance * other.abs().max(), name


def the_autoencoder_is_theirs(folder: Path, form: str, tolerance: float) -> None:
    pipeline = theirs(folder)
    image = torch.rand(1, 3, 40, 56) * 2 - 1
    scale = json.loads((folder / "vae_decoder" / "config.json").read_text())["scaling_factor"]
    with torch.no_grad():
        (moments,) = _answers(folder / "vae_encoder" / FILES[form], form, {"sample": image})
        right = pipeline.vae.encode(image).latent_dist.mean * pipeline.vae.config.scaling_factor
        assert (moments.chunk(2, 1)[0] * scale - right).abs().max() < tolerance * right.abs().max()
        (decoded,) = _answers(folder / "vae_decoder" / FILES[form], form, {"latent_sample": right / scale})
        wanted = pipeline.vae.decode(right / pipeline.vae.config.scaling_factor).sample
        assert (decoded - wanted).abs().max() < tolerance * wanted.abs().max()


@needs("onnx")
@pytest.mark.slow
def test_onnx_parts_give_what_diffusers_gives(onnx: Path) -> None:
    import onnxruntime

    every_part_is_theirs(onnx, "onnx", 1e-4)
    the_autoencoder_is_theirs(onnx, "onnx", 1e-4)
    session = onnxruntime.InferenceSession(str(onnx / "unet" / "model.onnx"))
    said = {value.name: value.shape for value in session.get_inputs()}
    assert said == {"sample": ["batch", 4, "height", "width"], "timestep": [1], "encoder_hidden_states": ["batch", "sequence_length", 32]}
    assert [value.name for value in session.get_outputs()] == ["out_sample"]


@needs("onnx")
@pytest.mark.slow
def test_diffusers_pipeline_of_onnx_draws_the_same(onnx: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "OnnxStableDiffusionPipeline"):
        pytest.skip("this diffusers has no OnnxStableDiffusionPipeline any more")
    noise = torch.randn(1, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    made = drawn(diffusers.OnnxStableDiffusionPipeline.from_pretrained(onnx), noise.numpy())
    right = drawn(theirs(onnx), noise)
    assert np.abs(made - right).max() < 1 / 255


@needs("openvino")
@pytest.mark.slow
def test_openvino_parts_give_what_diffusers_gives(openvino: Path) -> None:
    every_part_is_theirs(openvino, "openvino", 1e-4)
    the_autoencoder_is_theirs(openvino, "openvino", 1e-4)
    index = json.loads((openvino / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and all((openvino / name / FILES["openvino"]).exists() for name in PARTS)


@needs("openvino")
@pytest.mark.slow
def test_optimums_pipeline_of_openvino_draws_the_same(openvino: Path) -> None:
    optimum = pytest.importorskip("optimum.intel", reason="needs optimum-intel, whose transformers is another")
    noise = torch.randn(1, 4, 4, 5, generator=torch.Generator().manual_seed(0))
    wishes = {"INFERENCE_PRECISION_HINT": "f32"}
    made = drawn(optimum.OVStableDiffusionPipeline.from_pretrained(openvino, ov_config=wishes), noise.numpy())
    assert np.abs(made - drawn(theirs(openvino), noise)).max() < 1 / 255


@needs("openvino")
@pytest.mark.slow
def test_half_weights_are_half_as_large(tmp_path: Path) -> None:
    out = exported_to("openvino", tmp_path, "--dtype", "fp16")
    every_part_is_theirs(out, "openvino", 2e-2)
    assert (out / "unet" / "openvino_model.bin").stat().st_size < 0.6 * sum(
        value.numel() * 4 for value in exported(str(tmp_path / "model")).parts["unet"].state.values()
    )


@needs("openvino")
def test_a_graph_that_gives_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = graph_folder._answers
    monkeypatch.setattr(graph_folder, "_answers", lambda *args: [value * 1.01 for value in answers(*args)])
    with pytest.raises(UserError, match=r"last_hidden_state differs from the network's by .*; nothing was kept"):
        main_raising(finished_model(tmp_path), "openvino", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def main_raising(model: Path, form: str, out: Path) -> None:
    from ldm.cli.export import export

    export(str(model), form, out)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--to", "onnx", "--dtype", "fp16"], "--dtype: got fp16; --to onnx writes fp32"),
        (["--to", "openvino", "--dtype", "bf16"], "--dtype: got bf16; --to openvino writes fp32 or fp16"),
        (["--to", "openvino", "--max-shard", "2"], "--max-shard"),
        (["--to", "onnx", "--variant", "fp16"], "--variant"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", "owner/name", "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err


def test_models_that_no_such_pipeline_joins_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from ldm.models.mmdit import MMDiTConfig

    source = exported(str(finished_model(tmp_path)))
    monkeypatch.setattr(graph_folder, "find_spec", lambda name: object())
    check_graphs(source, "onnx")
    codec = source.autoencoder
    beyond = beyond_onnx_pipeline(replace(source, autoencoder=replace(codec, latent_channels=8)), "onnx")  # type: ignore[type-var]
    assert f"draws 4 channels at factor 8, not 8 channels of latents at factor {codec.factor}" in beyond
    for changed, said in (
        (replace(source, network=replace(source.unet, size_channels=8)), "told sizes"),
        (replace(source, network=replace(source.unet, coordinates=True)), "ldm's own"),
        (replace(source, network=MMDiTConfig()), "no U-Net"),
    ):
        with pytest.raises(UserError, match=f"--to onnx: .*{said}.*; write --to diffusers"):
            check_graphs(changed, "onnx")
    with pytest.raises(UserError, match="its autoencoder is no KL autoencoder"):
        check_graphs(exported(str(finished_model(tmp_path / "vq", kind="vq"))), "onnx")
    monkeypatch.setattr(graph_folder, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--to onnx: onnx, onnxruntime, onnxscript is not installed here"):
        check_graphs(source, "onnx")


def test_the_parts_on_their_own_have_the_wanted_scale(tmp_path: Path) -> None:
    source = exported(str(finished_model(tmp_path)))
    own, other = parts_of(source, None), parts_of(source, 0.18215)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        first = own[3].call(latent_sample=z / own[3].config["scaling_factor"])
        second = other[3].call(latent_sample=z / 0.18215)
    assert other[3].config["scaling_factor"] == 0.18215 and torch.allclose(first, second, atol=1e-5)
