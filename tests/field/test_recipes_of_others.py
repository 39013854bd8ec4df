"""Settings text of Stable Diffusion web UI in pictures, as users bring them: followed, or told line by line what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.demo.catalogue import Catalogue, Opened, Outfit
from ldm.demo.orders import Form, fill_in
from ldm.sampling.foreign_recipe import ForeignRecipe
from ldm.sampling.picture_texts import exif_text
from ldm.sampling.recipe import Recipe, read_recipe
from ldm.sampling.webui_text import read_parameters
from tests.ends_soon import ends_soon

HIRES = (
    "a red circle\nNegative prompt: blurry\nSteps: 12, Sampler: DPM++ 2M Karras, CFG scale: 4, Seed: 77, Size: 32x32, "
    "Denoising strength: 0.6, Clip skip: 2, Hires upscale: 2, Hires steps: 8, Hires upscaler: Latent, Version: v1.6.0"
)
PLAIN = "a red circle\nNegative prompt: blurry\nSteps: 5, Sampler: Euler, CFG scale: 4, Seed: 9, Size: 32x32, Version: v1.9"


def picture(path: Path, text: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", text)
    Image.new("RGB", (32, 32), "red").save(path, pnginfo=chunks)
    return path


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """Fields and what is not followed."""
    found = read_parameters(text)
    assert found is not None
    return dict(found.fields), [str(lost) for lost in found.unfollowed]


def drawn(out: Path) -> Recipe:
    found = read_recipe(next(out.glob("0*.png")))
    assert isinstance(found, Recipe)
    return found


def test_hires_fix_is_followed_and_the_rest_is_told(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = picture(tmp_path / "h.png", HIRES)
    words = ["sample", "--from", str(file), "--model", str(kl_model), "--out"]
    assert main([*words, str(tmp_path / "a")]) == 0
    made = drawn(tmp_path / "a")
    assert (made.width, made.height, made.hires, made.hires_strength, made.clip_skip) == (64, 64, 2.0, 0.6, 2)
    assert (made.steps, made.sampler, made.spacing, made.guidance, made.seed) == (12, "dpmpp_2m", "karras", 4.0, 77)
    said = capsys.readouterr().err
    assert said.count("not followed") == 2 and "Hires steps: 8" in said and "Hires upscaler: Latent" in said
    assert main([*words, str(tmp_path / "b"), "--strict"]) == 2
    said = capsys.readouterr().err
    assert "Hires steps: 8" in said and len(said.splitlines()) == 1 and not (tmp_path / "b").exists()
    assert main([*words[:1], "--from", str(picture(tmp_path / "p.png", PLAIN)), *words[3:], str(tmp_path / "c"), "--strict"]) == 0
    assert drawn(tmp_path / "c").clip_skip == 1
    assert main(["sample", "a", *words[3:], str(tmp_path / "d"), "--strict"]) == 2
    assert "--from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("Sampler: Euler,", "Sampler: DPM++ SDE Karras,", "sampler DPM++ SDE Karras"),
        ("Sampler: Euler,", "Sampler: Euler, Schedule type: Beta,", "schedule Beta"),
        ("Seed: 9", "Seed: 18446744073709551615", "Seed: 18446744073709551615"),
        ("Steps: 5", "Steps: 0", "Steps: 0"),
        ("CFG scale: 4", "CFG scale: nan", "CFG scale: nan"),
        ("Size: 32x32", "Size: 32x32, Denoising strength: 0.4", "img2img at strength 0.4"),
        ("Size: 32x32", "Size: 32x32, Hires upscale: 1.7, Denoising strength: 0.4", ""),
        ("Size: 32x32", "Size: 32x32, Hires resize: 64x96, Denoising strength: 0.4", "hires fix from 32x32 to 64x96"),
        ("Size: 32x32", "Size: 0x32", "Size: 0x32"),
        ("a red circle", "a red circle <lora:myStyle:0.8>", "LoRA myStyle at weight 0.8"),
        ("a red circle", "a red <lyco:other:te=0.5:unet=1> circle", "LoRA other at weight 0.5"),
        ("a red circle", "a red circle <hypernet:h:1>", "<hypernet:h:1>"),
        ("Version", 'TI hashes: "easynegative: c74b4e810b03", Version', "easynegative: c74b4e810b03"),
        ("Version", 'Lora hashes: "x: 0a1b", Version', "LoRA x at weight ? (hash 0a1b)"),
        ("Version", "Refiner: sd_xl_refiner, Version", "Refiner: sd_xl_refiner"),
        ("Version", "VAE: kl-f8.ckpt, Version", "VAE: kl-f8.ckpt"),
        ("Version", 'ControlNet 0: "Module: canny, Model: x", Version', "ControlNet 0: Module: canny, Model: x"),
        ("Version", "Tiling: True, Version", "Tiling: True"),
        ("Version", "Eta: 0.5, Version", "Eta: 0.5"),
    ],
)
def test_what_has_no_place_here_is_told(old: str, new: str, lost: str) -> None:
    fields, told = read(PLAIN.replace(old, new, 1))
    assert len(told) == (1 if lost else 0) and all(one.startswith(lost) or lost in one for one in told), told
    assert fields["prompt"] == "a red circle" or fields["prompt"] == "a red  circle"


def test_names_and_numbers_are_read_as_the_web_ui_means_them() -> None:
    assert read(PLAIN)[1] == []
    for said, sampler, spacing in [
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M", "dpmpp_2m", "linspace"),  # before 1.9 without Karras' spacing
        ("DPM++ 2M, Schedule type: Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Euler a, Schedule type: Automatic", "euler_a", None),
        ("k_euler_ancestral", "euler_a", None),
        ("Euler, Schedule type: SGM Uniform", "euler", "trailing"),
        ("UniPC", "unipc", None),
    ]:
        fields, told = read(PLAIN.replace("Sampler: Euler", f"Sampler: {said}"))
        assert (fields["sampler"], fields.get("spacing"), told) == (sampler, spacing, [])
    fields, told = read(PLAIN.replace("Size: 32x32", "Size: 512x768, Hires upscale: 1.5, Denoising strength: 0.3"))
    assert (fields["width"], fields["height"], fields["hires"], fields["hires_strength"]) == (768, 1152, 1.5, 0.3) and not told
    fields, told = read(f"{PLAIN}\nTemplate: a {{red|blue}} circle\nNegative Template: blurry")  # the dynamic prompts extension's
    assert fields["prompt"] == "a red circle" and fields["steps"] == 5 and not told


def test_an_option_takes_the_place_of_what_is_not_followed(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = picture(tmp_path / "s.png", PLAIN.replace("Euler,", "DPM++ SDE,").replace("Size", "Denoising strength: 0.4, Size"))
    words = ["sample", "--from", str(file), "--model", str(kl_model), "--strict", "--out", str(tmp_path / "o")]
    assert main([*words, "--sampler", "ddim"]) == 2 and "img2img" in capsys.readouterr().err
    assert main([*words, "--init", str(file)]) == 2 and "DPM++ SDE" in capsys.readouterr().err
    assert main([*words, "--sampler", "ddim", "--init", str(file)]) == 0
    assert (drawn(tmp_path / "o").strength, drawn(tmp_path / "o").sampler) == (0.4, "ddim")


def test_loras_of_a_recipe_are_found_by_their_names(tmp_path: Path) -> None:
    from ldm.sampling.request import Following, NamedAdapters

    file = picture(tmp_path / "l.png", PLAIN.replace("a red circle", "a red circle <lora:myStyle:0.8>"))
    told: list[str] = []
    following = Following(recipe=file)
    assert following.old((NamedAdapters(lora_dir=tmp_path),), told.append)["prompt"] == "a red circle <lora:myStyle:0.8>"
    assert not any("LoRA" in line for line in told)
    assert following.old((NamedAdapters(lora=("x.safetensors",)),), told.append)["prompt"] == "a red circle"
    assert not any("LoRA" in line for line in told)
    assert following.old((NamedAdapters(),), told.append)["prompt"] == "a red circle" and any("LoRA myStyle" in line for line in told)


def test_another_model_is_told(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hashlib

    from ldm.sampling.request import file_hashed

    file = picture(tmp_path / "m.png", PLAIN.replace("Version", "Model hash: 0123456789, Model: foo, Version"))
    words = ["sample", "--from", str(file), "--model", str(kl_model), "--out", str(tmp_path / "o")]
    assert main(words) == 0 and "made by the model foo (hash 0123456789)" in capsys.readouterr().err
    assert main([*words, "--strict"]) == 2
    (tmp_path / "w").write_bytes(data := bytes(range(256)) * 5000)
    assert file_hashed(tmp_path / "w", hashlib.sha256(data).hexdigest()[:10])
    assert file_hashed(tmp_path / "w", hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8])
    assert not file_hashed(tmp_path / "w", "0123456789")


@pytest.mark.parametrize("code", ["utf-16-be", "utf-16-le", "utf-16", "ascii", "utf-8"])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "avif"])
def test_exif_comments_are_read(tmp_path: Path, code: str, suffix: str) -> None:
    text = PLAIN if code == "ascii" else PLAIN.replace("a red circle", "a red circle 中 ü")
    exif = Image.Exif()
    mark = b"ASCII\0\0\0" if code in ("ascii", "utf-8") else b"UNICODE\0"
    exif.get_ifd(0x8769)[0x9286] = mark + text.encode(code)
    Image.new("RGB", (32, 32), "red").save(tmp_path / f"x.{suffix}", exif=exif.tobytes())
    found = read_recipe(tmp_path / f"x.{suffix}")
    assert isinstance(found, ForeignRecipe) and found.fields["prompt"] == text.split("\n")[0] and found.fields["seed"] == 9


def test_texts_without_a_code_and_in_other_fields_are_read(tmp_path: Path) -> None:
    assert exif_text(PLAIN.encode()) == exif_text(b"\0" * 8 + PLAIN.encode()) == exif_text(PLAIN.encode("utf-16-le")) == PLAIN
    assert exif_text(b"UNICODE\0" + PLAIN.encode()) == PLAIN  # what some write there is UTF-8
    for tag, value in ((0x010E, PLAIN), (0x9C9C, PLAIN.encode("utf-16-le"))):
        exif = Image.Exif()
        exif[tag] = value
        Image.new("RGB", (32, 32)).save(tmp_path / "x.jpg", exif=exif)
        assert read_recipe(tmp_path / "x.jpg").fields["seed"] == 9  # type: ignore[union-attr]
    Image.new("P", (32, 32)).save(tmp_path / "x.gif", comment=PLAIN.encode())
    assert read_recipe(tmp_path / "x.gif").fields["seed"] == 9  # type: ignore[union-attr]


def test_the_page_tells_the_same() -> None:
    form = Form(steps=3, guidance=1.0, rescale=0.0, sampler="ddim", spacing="", width=32, height=32)
    found = read_parameters(HIRES)
    assert found is not None

    def unopened(outfit: Outfit) -> Opened:
        raise AssertionError(outfit)

    filled, notes = fill_in(form, found, Catalogue(("m", "m"), unopened, runs=None), "0" * 64, 512)
    assert (filled.width, filled.hires, filled.hires_strength, filled.clip_skip, filled.sampler) == (64, 2.0, 0.6, 2, "dpmpp_2m")
    assert [note for note in notes if "Hires" in note] == ["Not followed: Hires steps: 8.", "Not followed: Hires upscaler: Latent."]


@pytest.mark.parametrize(
    "piece", ["a-a-", "a: ", '"', 'a: "', 'a: "x" y, ', "\\", "<lora:", "<lora:a", ", ", "a:,", "Steps: 1, ", "\n", 'a: "\\"']
)
def test_long_texts_take_time_in_proportion(piece: str) -> None:
    with ends_soon():
        read_parameters(f"x\nSteps: 2, Seed: 1, Sampler: Euler, {piece * 500_000}")


def test_a_recipe_of_ours_with_odd_values_is_one_line(tmp_path: Path) -> None:
    import json

    whole = {
        "prompt": "a",
        "negative": "",
        "seed": 0,
        "steps": 2,
        "guidance": 1.0,
        "rescale": 0.0,
        "sampler": "ddim",
        "spacing": "trailing",
    }
    whole |= {"schema": 1, "version": "0", "width": 32, "height": 32, "model": "x", "model_hash": "0"}
    for field, value in [("hires", 0), ("steps", 10**30), ("guidance", 1e999), ("outpaint", "a,b"), ("width", -5), ("clip_skip", 0)]:
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt("ldm", json.dumps({**whole, field: value}))
        Image.new("RGB", (32, 32)).save(tmp_path / "x.png", pnginfo=chunks)
        with pytest.raises(UserError, match=f"{field}: ") as caught:
            read_recipe(tmp_path / "x.png")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loras", ["[" * 100_000, '[{"file": ["x"], "hash": "0", "weight": 1}]', '{"a": 1}', '[{"file": "x"}]', "5"])
def test_damaged_adapters_of_a_recipe_are_one_line(loras: str) -> None:
    from ldm.sampling.adapters import remembered

    with pytest.raises(UserError, match="the recipe's loras cannot be read"):
        remembered({"loras": loras}, "loras")
    assert remembered({"loras": loras}, "loras", given=True) == []


@pytest.mark.parametrize("missing", ["Seed: 3", "Steps: 20", "CFG scale: 7", "Sampler: DDIM", "Size: 64x64"])
def test_what_decides_a_picture_and_is_not_told_is_said(missing: str) -> None:
    """Else the model's own, or seed 0, takes its place without a word."""
    text = ", ".join(one for one in ("Steps: 20", "Sampler: DDIM", "CFG scale: 7", "Seed: 3", "Size: 64x64") if one != missing)
    found = read_parameters(f"a cat\n{text}")
    name = {"Seed": "seed", "Steps": "steps", "CFG scale": "guidance", "Sampler": "sampler", "Size": "size"}[missing.partition(":")[0]]
    assert found is not None and [str(lost) for lost in found.unfollowed] == [f"{name}: not told by the picture; give it by --{name}"]


def test_weights_are_no_picture_and_are_called_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="weights, and not a picture"):
        read_recipe(tmp_path / "x.safetensors")
