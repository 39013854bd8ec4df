"""Pictures of InvokeAI, NovelAI, Fooocus, SwarmUI and Easy Diffusion: followed by `--from`, or told line by line what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from ldm.__main__ import main
from ldm.sampling.foreign_recipe import ForeignRecipe
from ldm.sampling.recipe import Recipe, read_recipe, recipe_of

INVOKE: dict[str, Any] = {
    **{"app_version": "4.2.9", "generation_mode": "txt2img", "positive_prompt": "a red circle", "negative_prompt": "blurry", "seed": 44},
    **{"steps": 10, "cfg_scale": 7.5, "scheduler": "dpmpp_2m_k", "width": 64, "height": 32, "clip_skip": 1, "rand_device": "cpu"},
    **{"cfg_rescale_multiplier": 0.5, "model": {"key": "k", "name": "dream"}, "loras": [], "controlnets": [], "seamless_x": False},
}
NOVEL: dict[str, Any] = {
    **{"prompt": "a red circle", "uc": "blurry", "steps": 28, "scale": 5.0, "cfg_rescale": 0.2, "seed": 33, "sampler": "k_dpmpp_2m"},
    **{"noise_schedule": "karras", "width": 64, "height": 32, "request_type": "PromptGenerateRequest", "n_samples": 1, "signed_hash": "x"},
}
FOOOCUS: dict[str, Any] = {
    **{"prompt": "a red circle", "negative_prompt": "blurry", "steps": 30, "guidance_scale": 4.0, "seed": "7", "resolution": "(64, 32)"},
    **{
        "sampler": "dpmpp_2m_sde_gpu",
        "scheduler": "karras",
        "base_model": "jugger",
        "styles": "[]",
        "version": "Fooocus v2.5",
        "loras": [],
    },
}
SWARM: dict[str, Any] = {
    **{
        "prompt": "a red circle",
        "negativeprompt": "blurry",
        "model": "x/dream",
        "seed": 5,
        "steps": 9,
        "cfgscale": 4,
        "width": 64,
        "height": 32,
    },
    **{"sampler": "euler", "scheduler": "normal", "clipstopatlayer": -2, "swarm_version": "0.9", "aspectratio": "2:1"},
}
EASY = {
    **{
        "prompt": "a red circle",
        "negative_prompt": "blurry",
        "num_inference_steps": "9",
        "guidance_scale": "4",
        "seed": "5",
        "width": "64",
    },
    **{"height": "32", "sampler_name": "euler_a", "use_stable_diffusion_model": "dream", "use_vae_model": "None"},
}
BOTH = {"prompt": "a red circle", "negative": "blurry", "width": 64, "height": 32}


def invoke(**more: Any) -> dict[str, str]:
    return {"invokeai_metadata": json.dumps(INVOKE | more)}


def novel(**more: Any) -> dict[str, str]:
    return {"Software": "NovelAI", "Description": "a red circle", "Comment": json.dumps(NOVEL | more)}


def fooocus(**more: Any) -> dict[str, str]:
    return {"parameters": json.dumps(FOOOCUS | more), "fooocus_scheme": "fooocus"}


def swarm(**more: Any) -> dict[str, str]:
    return {"parameters": json.dumps({"sui_image_params": SWARM | more})}


def easy(**more: str) -> dict[str, str]:
    return EASY | more


def read(chunks: dict[str, str]) -> tuple[str, dict[str, Any], list[str]]:
    found = recipe_of(chunks, Path("x.png"))
    assert isinstance(found, ForeignRecipe)
    return found.program, dict(found.fields), [str(lost) for lost in found.unfollowed]


@pytest.mark.parametrize(
    ("chunks", "program", "fields"),
    [
        (
            invoke(),
            "InvokeAI",
            {
                "seed": 44,
                "steps": 10,
                "guidance": 7.5,
                "rescale": 0.5,
                "sampler": "dpmpp_2m",
                "spacing": "karras",
                "clip_skip": 2,
                "model": "dream",
            },
        ),
        (novel(), "NovelAI", {"seed": 33, "steps": 28, "guidance": 5.0, "rescale": 0.2, "sampler": "dpmpp_2m", "spacing": "karras"}),
        (
            fooocus(),
            "Fooocus",
            {"seed": 7, "steps": 30, "guidance": 4.0, "sampler": "dpmpp_2m_sde", "spacing": "karras", "model": "jugger"},
        ),
        (
            swarm(),
            "SwarmUI",
            {"seed": 5, "steps": 9, "guidance": 4.0, "sampler": "euler", "spacing": "linspace", "clip_skip": 2, "model": "dream"},
        ),
        (easy(), "Easy Diffusion", {"seed": 5, "steps": 9, "guidance": 4.0, "sampler": "euler_a", "model": "dream"}),
    ],
    ids=["invoke", "novel", "fooocus", "swarm", "easy"],
)
def test_a_plain_picture_is_followed_whole(chunks: dict[str, str], program: str, fields: dict[str, Any]) -> None:
    assert read(chunks) == (program, BOTH | fields, [])


@pytest.mark.parametrize(
    ("chunks", "lost"),
    [
        (invoke(loras=[{"model": {"name": "sty"}, "weight": 0.6}]), "LoRA sty at weight 0.6"),
        (invoke(loras=[{"lora": {"model_name": "old"}, "weight": 1}]), "LoRA old at weight 1"),
        (invoke(positive_prompt="a (red)++ circle"), "weights of InvokeAI's notation"),
        (invoke(controlnets=[{"image": {}}]), "controlnets"),
        (invoke(strength=0.4, init_image="a.png"), "img2img at strength 0.4"),
        (invoke(seamless_x=True), "seamless_x: True"),
        (invoke(scheduler="kdpm_2"), "sampler kdpm_2"),
        (invoke(steps=10**9), "steps: 1000000000 (whole numbers from 1 to 1000"),
        (invoke(clip_skip="x"), "clip_skip: x"),
        (novel(request_type="Img2ImgRequest", strength=0.5), "Img2ImgRequest at strength 0.5"),
        (novel(prompt="a {red} circle"), "brackets, by which a word weighs 1.05"),
        (novel(v4_prompt={"caption": {"base_caption": "a", "char_captions": [{"char_caption": "b"}]}}), "captions of single characters"),
        (novel(seed=2**64), "seed: 18446744073709551616"),
        (fooocus(loras=[["sty.safetensors", 0.5, "0a"]]), "LoRA sty.safetensors at weight 0.5"),
        (fooocus(lora_combined_1="sty : 0.5"), "LoRA sty at weight 0.5"),
        (fooocus(styles="['Fooocus V2']"), "styles: ['Fooocus V2']"),
        (fooocus(sharpness=2.0), "sharpness: 2"),
        (fooocus(resolution="(0, 64)"), "resolution: (0, 64)"),
        (swarm(loras=["sty"], loraweights=["0.7"]), "LoRA sty at weight 0.7"),
        (swarm(initimagecreativity=0.6), "img2img at strength 0.6"),
        (swarm(refinerupscale=2), "refinerupscale: 2"),
        (easy(use_lora_model="sty", lora_alpha="0.5"), "use_lora_model: sty"),
    ],
)
def test_what_cannot_be_followed_is_told(chunks: dict[str, str], lost: str) -> None:
    assert any(line.startswith(lost) or lost in line for line in read(chunks)[2])


def test_it_is_drawn_from_and_strict_refuses(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunks = PngImagePlugin.PngInfo()
    for name, text in invoke(steps=2, loras=[{"model": {"name": "sty"}, "weight": 0.6}], width=32).items():
        chunks.add_itxt(name, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=chunks)
    words = ["sample", "--from", str(tmp_path / "x.png"), "--model", str(kl_model), "--out"]
    assert main([*words, str(tmp_path / "a")]) == 0
    assert "not followed: LoRA sty at weight 0.6" in capsys.readouterr().err
    made = read_recipe(next((tmp_path / "a").glob("0*.png")))
    assert isinstance(made, Recipe)
    assert (made.prompt, made.negative, made.steps, made.seed, made.sampler) == ("a red circle", "blurry", 2, 44, "dpmpp_2m")
    assert (made.spacing, made.clip_skip, made.rescale, made.width) == ("karras", 2, 0.5, 32)
    assert main([*words, str(tmp_path / "b"), "--strict"]) == 2
    assert "LoRA sty" in capsys.readouterr().err


def test_exif_of_other_formats_holds_it_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + swarm()["parameters"].encode("utf-16-be")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    found = read_recipe(tmp_path / "x.jpg")
    assert isinstance(found, ForeignRecipe) and (found.program, found.fields["prompt"]) == ("SwarmUI", "a red circle")
