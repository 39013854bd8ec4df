"""`ldm export`: what it writes opens elsewhere, draws the same, and is whole or not there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import SIDE, STORY, UNET, finished_model

import ldm.formats.pipeline_folder
from ldm.__main__ import main
from ldm.diffusion.process import Process
from ldm.diffusion.schedules import ScaledLinear
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.formats.part import load_part

PROMPTS = ["a small red circle", "a large blue ring"]


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


def picture(folder: Path, noise: torch.Tensor, **words: Any) -> np.ndarray:
    """What diffusers draws."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, **words)
    pipeline.set_progress_bar_config(disable=True)
    told: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    return np.round(pipeline(PROMPTS, latents=noise, **told).images * 255)


def ours(folder: Path | str, noise: torch.Tensor) -> np.ndarray:
    return load(folder).sample(PROMPTS, [0, 0], Wanted(steps=5, guidance=4.0, sampler="ddim"), latents=noise).numpy()


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    return torch.randn(2, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(5))


def test_a_copy_at_full_precision_is_the_same_model(kl_model: Path, tmp_path: Path, noise: torch.Tensor, capsys: Any) -> None:
    out = tmp_path / "deep" / "copy"
    assert export(kl_model, "--to", "diffusers", "--out", out, "--json") == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert {part["part"]: part["max_error"] for part in told["parts"]} == {"unet": 0, "vae": 0, "text_encoder": 0}
    assert set(told["files"]) == {path.relative_to(out.parent).as_posix() for path in out.rglob("*") if path.is_file()}
    assert told["bytes"] == sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert "unet: " in printed.err and "max abs error 0" in printed.err
    drawn = ours(kl_model, noise)
    assert (ours(out, noise) == drawn).all() and np.abs(picture(out, noise) - drawn).max() <= 1 and drawn.std() > 5
    before, after = (json.loads((folder / "ldm.json").read_text()) for folder in (kl_model, out))
    assert {**after, "autoencoder": ""} == {**before, "autoencoder": ""}
    assert "This copy" in (out / "README.md").read_text() and STORY["name"] in (out / "README.md").read_text()


def test_half_precision_halves_the_weights_and_opens_by_its_variant(kl_model: Path, tmp_path: Path, noise: torch.Tensor) -> None:
    out, plain = tmp_path / "half", tmp_path / "bf16"
    assert export(kl_model, "--to", "diffusers", "--dtype", "fp16", "--variant", "fp16", "--out", out) == 0
    assert export(kl_model, "--to", "diffusers", "--dtype", "bf16", "--out", plain) == 0
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        whole, half, other = (
            (kl_model / part / f"{stem}.safetensors"),
            (out / part / f"{stem}.fp16.safetensors"),
            (plain / part / f"{stem}.safetensors"),
        )
        header = 8 + int.from_bytes(half.read_bytes()[:8], "little")
        assert abs(half.stat().st_size - whole.stat().st_size / 2) < header and other.stat().st_size <= half.stat().st_size + header
        state = load_part(out / part)[1]
        assert {value.dtype for value in state.values()} == {torch.float16}
        source = load_part(kl_model / part)[1]
        assert all(torch.equal(state[name], source[name].half()) for name in state)
        assert {value.dtype for value in load_part(plain / part)[1].values()} == {torch.bfloat16}
    drawn = ours(out, noise)
    assert np.abs(picture(out, noise, variant="fp16", torch_dtype=torch.float32) - drawn).max() <= 1
    assert np.abs(picture(plain, noise, torch_dtype=torch.float32) - ours(plain, noise)).max() <= 1
    assert picture(out, noise, variant="fp16").std() > 5  # also without a word about types
    assert 'variant="fp16", torch_dtype=torch.float16' in (out / "README.md").read_text()


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_open_everywhere(variant: str, kl_model: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    out, words = tmp_path / "sharded", ("--dtype", "fp16", *(("--variant", variant) if variant else ()))
    assert export(kl_model, "--to", "diffusers", *words, "--max-shard", 0.00005, "--out", out) == 0
    for part, made in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", CLIPTextModel)):
        files = sorted((out / part).glob("*.safetensors"))
        assert len(files) > 1 and all("-of-000" in file.name and (not variant or ".fp16-" in file.name) for file in files)
        assert all(file.stat().st_size < 50_000 + 20_000 for file in files)
        opened, said = made.from_pretrained(
            out / part, output_loading_info=True, torch_dtype=torch.float16, **({"variant": variant} if variant else {})
        )
        assert not any(said[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), part
        source = load_part(kl_model / part)[1]
        prefix = "" if next(iter(opened.state_dict())) in source else "text_model."
        assert all(torch.equal(value, source[prefix + name].half()) for name, value in opened.state_dict().items())
    assert load(out).sample(PROMPTS, [0, 1], Wanted(steps=2)).shape == (2, SIDE, SIDE, 3)


def test_tokenizers_of_both_layouts_give_the_same_numbers(kl_model: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer, CLIPTokenizerFast

    out, texts = tmp_path / "copy", [*PROMPTS, "Ünïcode — 漢字!", ""]
    assert export(kl_model, "--to", "diffusers", "--out", out) == 0
    wanted = load(kl_model).text.tokenizer(texts, padding="max_length", truncation=True, max_length=16).input_ids
    for made, names in (
        (CLIPTokenizer, ("vocab.json", "merges.txt", "tokenizer_config.json")),
        (CLIPTokenizerFast, ("tokenizer.json", "tokenizer_config.json")),
    ):
        folder = tmp_path / made.__name__ / str(len(names))
        folder.mkdir(parents=True)
        for name in names:
            shutil.copy(out / "tokenizer" / name, folder)
        found = made.from_pretrained(folder)(texts, padding="max_length", truncation=True, max_length=16).input_ids
        assert found == wanted, names


def test_vq_and_unet_of_our_own_go_into_folders(tmp_path: Path, vq_model: Path, capsys: Any) -> None:
    out = tmp_path / "vq"
    assert export(vq_model, "--to", "diffusers", "--dtype", "fp16", "--out", out) == 0
    assert (out / "vqvae" / "latents.json").read_text() == (vq_model / "vqvae" / "latents.json").read_text()
    assert load(out).codec.statistics == load(vq_model).codec.statistics
    own = finished_model(tmp_path / "own", network=replace(UNET, coordinates=True))
    capsys.readouterr()
    assert export(own, "--to", "diffusers", "--out", tmp_path / "own-copy") == 0
    assert "so only ldm opens this folder" in capsys.readouterr().err
    assert "With diffusers" not in (tmp_path / "own-copy" / "README.md").read_text()
    assert load(tmp_path / "own-copy").sample(PROMPTS[:1], [0], Wanted(steps=2)).shape == (1, SIDE, SIDE, 3)


def test_a_strangers_folder_keeps_its_scheduler_card_and_factor(kl_model: Path, tmp_path: Path, capsys: Any) -> None:
    stranger, out = tmp_path / "stranger", tmp_path / "copy"
    shutil.copytree(kl_model, stranger)
    for name in ("ldm.json", "manifest.json"):
        (stranger / name).unlink()
    (stranger / "README.md").write_text("# Theirs\n")
    (stranger / "safety_checker").mkdir()
    scheduler = {
        "_class_name": "PNDMScheduler",
        "skip_prk_steps": True,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
    }
    (stranger / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    config = json.loads((stranger / "vae" / "config.json").read_text())
    (stranger / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.18215}))
    assert export(stranger, "--to", "diffusers", "--out", out) == 0
    assert "left out, because ldm has no use for it: safety_checker" in capsys.readouterr().err
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text()) == scheduler
    assert json.loads((out / "model_index.json").read_text())["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert (out / "README.md").read_text() == "# Theirs\n"
    assert load(out).codec.statistics == load(stranger).codec.statistics != load(kl_model).codec.statistics
    (stranger / "README.md").unlink()
    assert export(stranger, "--to", "diffusers", "--out", out, "--overwrite") == 0
    card = (out / "README.md").read_text()
    assert "has not trained" in card and "trained with `ldm`" not in card


def test_an_inpainting_model_names_its_pipeline(tmp_path: Path) -> None:
    from ldm.formats.assembly import model_index
    from ldm.models.autoencoder import KLConfig

    unet = replace(UNET, in_channels=9)
    text = {"text_encoder": {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]}}
    assert model_index(KLConfig(), "DDIMScheduler", unet, text)["_class_name"] == "StableDiffusionInpaintPipeline"
    t5 = model_index(KLConfig(), "DDIMScheduler", UNET, {"text_encoder": {"model_type": "t5", "architectures": ["T5EncoderModel"]}})
    assert t5["_class_name"] == "DiffusionPipeline" and t5["text_encoder"] == ["transformers", "T5EncoderModel"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "gguf", "--out", "x"), "--to: got 'gguf'; choose one of diffusers, single-file, compvis-ckpt"),
        (("--to", "diffusers", "--dtype", "int8", "--out", "x"), "--dtype: got 'int8'; choose one of fp32, fp16, bf16"),
        (("--to", "diffusers", "--out", "x.ckpt"), "diffusers is a folder; write --to compvis-ckpt"),
        (("--to", "single-file", "--out", "x"), "single-file is a file whose name ends in .safetensors"),
        (("--to", "compvis-ckpt", "--out", "x.safetensors"), "compvis-ckpt is a file whose name ends in .ckpt"),
        (("--to", "diffusers", "--variant", "fp16", "--out", "x"), "it needs --to diffusers --dtype fp16"),
        (("--to", "diffusers", "--max-shard", "0", "--out", "x"), "--max-shard: got 0.0; a positive number of GB"),
        (("--to", "single-file", "--max-shard", "1", "--out", "x.safetensors"), "--max-shard: single-file is one file"),
        (("--to", "diffusers"), "Missing option '--out'"),
    ],
)
def test_wrong_words_are_told_before_the_model_is_read(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export("owner/name", *words) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1 and not list(tmp_path.iterdir())


def test_targets_are_kept_unless_told(kl_model: Path, tmp_path: Path, capsys: Any) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(kl_model, model)

    def refused(*words: object) -> str:
        assert export(model, *words) == 2
        return str(capsys.readouterr().err)

    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "is there already" in refused("--to", "diffusers", "--out", out)
    assert "holds no diffusers model" in refused("--to", "diffusers", "--out", out, "--overwrite")
    assert "within each other" in refused("--to", "diffusers", "--out", model, "--overwrite")
    assert "within each other" in refused("--to", "single-file", "--out", model / "x.safetensors")
    assert "within each other" in refused("--to", "diffusers", "--out", tmp_path, "--overwrite")
    (tmp_path / "x.safetensors").mkdir()
    assert "is a folder" in refused("--to", "single-file", "--out", tmp_path / "x.safetensors", "--overwrite")
    assert "no folder that lets you write" in refused("--to", "diffusers", "--out", out / "precious.txt" / "x")
    assert (out / "precious.txt").read_text() == "mine"
    assert "no such folder" in (export(tmp_path / "none", "--to", "diffusers", "--out", tmp_path / "n"), capsys.readouterr().err)[1]


@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_a_difference_on_disk_leaves_nothing_behind(form: str, kl_model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from ldm.formats.atomic import write_tensors

    def damaging(path: Path, tensors: dict[str, torch.Tensor], metadata: Any = None) -> None:
        name = next(key for key in tensors if "conv_in" in key or "input_blocks.0" in key)
        write_tensors(path, {**tensors, name: tensors[name] * 1.01}, metadata)

    module = "ldm.formats.pipeline_folder" if form == "diffusers" else "ldm.formats.compvis_file"
    out = tmp_path / ("out" if form == "diffusers" else "out.safetensors")
    assert export(kl_model, "--to", form, "--out", out) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(f"{module}.write_tensors", damaging)
    assert export(kl_model, "--to", form, "--dtype", "bf16", "--out", out, "--overwrite") == 2
    assert "unet: conv_in" in (line := capsys.readouterr().err) and "came back different by" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    fresh = tmp_path / "fresh" / out.name
    assert export(kl_model, "--to", form, "--out", fresh) == 2
    assert list(fresh.parent.iterdir()) == []


def test_too_large_for_half_precision_names_the_weight(kl_model: Path, tmp_path: Path, capsys: Any) -> None:
    from ldm.formats.part import save_part

    model = tmp_path / "model"
    shutil.copytree(kl_model, model)
    config, state = load_part(model / "unet")
    state["conv_out.bias"] = state["conv_out.bias"] + 1e6
    save_part(config, state, model / "unet")
    (model / "manifest.json").unlink()
    for form, name in (("diffusers", "a"), ("single-file", "a.safetensors"), ("compvis-ckpt", "a.ckpt")):
        assert export(model, "--to", form, "--dtype", "fp16", "--out", tmp_path / name) == 2
        assert "unet: conv_out.bias reaches 1e+06, but fp16 ends at 65504" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_says_so(kl_model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import errno
    import os

    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("ldm.cli.export.shutil.disk_usage", lambda path: usage._replace(free=1000))
        assert export(kl_model, "--to", "diffusers", "--out", tmp_path / "a") == 2
        assert "1.00 kB are free; make room" in capsys.readouterr().err

    def full(path: Path, tensors: Any, metadata: Any = None) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(ldm.formats.pipeline_folder, "write_tensors", full)
    assert export(kl_model, "--to", "diffusers", "--out", tmp_path / "a") == 2
    assert "No space left on device; make room" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_v_model_keeps_its_process(tmp_path: Path) -> None:
    process = Process(target="v", schedule=ScaledLinear(zero_terminal_snr=True))
    model = finished_model(tmp_path / "v", process=process)
    assert export(model, "--to", "diffusers", "--out", tmp_path / "copy") == 0
    assert load(tmp_path / "copy").process == process
