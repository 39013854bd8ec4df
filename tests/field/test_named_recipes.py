"""Pictures of InvokeAI, NovelAI, Fooocus, SwarmUI and Easy Diffusion: followed by `--from`, or told line by line what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from ldm.__main__ import main
from ldm.config.errors import UserError
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


DRAW: dict[str, Any] = {
    **{"c": "a red circle", "uc": "blurry", "steps": 20, "sampler": "DPM++ 2M Karras", "scale": 7.5, "seed": 42, "size": "64x32"},
    **{
        "model": "dream_f16.ckpt",
        "strength": 1,
        "seed_mode": "Scale Alike",
        "mask_blur": 2.5,
        "lora": [],
        "shift": 1,
        "tiled_decoding": False,
    },
}
INVOKE_2: dict[str, Any] = {
    **{"model": "stable diffusion", "model_weights": "dream", "app_id": "invoke-ai/InvokeAI", "app_version": "2.2.5", "model_hash": "0a"},
    "image": {
        **{"prompt": [{"prompt": "a red circle [blurry]", "weight": 1}], "steps": 9, "cfg_scale": 4, "seed": 5, "width": 64, "height": 32},
        **{"sampler": "k_euler_a", "type": "txt2img", "threshold": 0, "perlin": 0, "seamless": False, "hires_fix": False, "variations": []},
    },
}
RUINED: dict[str, Any] = {
    **{"Prompt": "a red circle", "Negative": "blurry", "steps": 9, "cfg": 4, "width": 64, "height": 32, "seed": 5, "start_step": 0},
    **{"sampler_name": "dpmpp_2m_sde_gpu", "scheduler": "karras", "base_model_name": "dream.safetensors", "loras": [], "denoise": None},
    **{"clip_skip": 1, "software": "RuinedFooocus"},
}
KOHYA = {"prompt": "a red circle", "negative-prompt": "blurry", "steps": "9", "scale": "4.0", "seed": "5", "sampler": "euler_a"}


def invoke_2(**more: Any) -> dict[str, str]:
    return {"sd-metadata": json.dumps(INVOKE_2 | {"image": INVOKE_2["image"] | more})}


def dream(more: str = "", words: str = "a red circle [blurry]") -> dict[str, str]:
    return {"Dream": f'"{words}" -s 9 -S 5 -W 64 -H 32 -C 4.0 -A k_euler_a{more}'}


def xmp(tmp_path: Path, ending: str, **more: Any) -> Path:
    """A picture as Draw Things writes it: JSON in XMP's form of EXIF's comment."""
    said = json.dumps(DRAW | more).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
        ' xmlns:exif="http://ns.adobe.com/exif/1.0/"><exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">'
        f"{said}</rdf:li></rdf:Alt></exif:UserComment></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    file = tmp_path / f"x.{ending}"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("XML:com.adobe.xmp", packet)
    Image.new("RGB", (8, 8)).save(file, **({"pnginfo": chunks} if ending == "png" else {"xmp": packet.encode()}))
    return file


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_draw_things_writes_it_as_xmp(ending: str, tmp_path: Path) -> None:
    found = read_recipe(xmp(tmp_path, ending, c='a "red" circle & <more>'))
    assert isinstance(found, ForeignRecipe) and not found.unfollowed and found.program == "Draw Things"
    assert found.fields == BOTH | {
        **{"prompt": 'a "red" circle & <more>', "seed": 42, "steps": 20, "guidance": 7.5, "sampler": "dpmpp_2m", "spacing": "karras"},
        **{"model": "dream_f16.ckpt"},
    }


@pytest.mark.parametrize(
    ("more", "lost"),
    [
        ({"lora": [{"model": "sty.ckpt", "weight": 0.6}]}, "LoRA sty.ckpt at weight 0.6"),
        ({"strength": 0.7}, "img2img at strength 0.7"),
        ({"hires_fix": True, "first_stage_size": "32x32"}, "hires_fix: True"),
        ({"shift": 3.0}, "shift: 3"),
        ({"refiner": "x.ckpt", "refiner_start": 0.8}, "refiner: x.ckpt"),
        ({"v2": {"controls": [{"file": "x"}], "clipSkip": 1}}, "controls"),
        ({"size": "64"}, "size: 64"),
        ({"sampler": "DPM++ 2M AYS"}, "sampler DPM++ 2M AYS"),
    ],
)
def test_what_of_draw_things_cannot_be_followed_is_told(more: dict[str, Any], lost: str, tmp_path: Path) -> None:
    found = read_recipe(xmp(tmp_path, "png", **more))
    assert isinstance(found, ForeignRecipe) and any(lost in str(line) for line in found.unfollowed)


INVOKED = BOTH | {"seed": 5, "steps": 9, "guidance": 4.0, "sampler": "euler_a"}


@pytest.mark.parametrize(
    ("chunks", "program", "fields"),
    [
        (invoke_2(), "InvokeAI 2", INVOKED | {"model": "dream"}),
        (invoke_2(prompt="a red circle [blurry]"), "InvokeAI 2", INVOKED | {"model": "dream"}),
        (dream(), "InvokeAI 2", INVOKED),
        (
            {"parameters": json.dumps(RUINED)},
            "RuinedFooocus",
            INVOKED | {"sampler": "dpmpp_2m_sde", "spacing": "karras", "model": "dream", "clip_skip": 1},
        ),
        (KOHYA, "kohya's gen_img", {name: value for name, value in INVOKED.items() if name not in ("width", "height")}),
    ],
    ids=["sd-metadata", "sd-metadata-words", "dream", "ruined", "kohya"],
)
def test_older_programs_are_followed_whole(chunks: dict[str, str], program: str, fields: dict[str, Any]) -> None:
    assert read(chunks) == (program, fields, ["size: not told by the picture; give it by --size"] * ("width" not in fields))


@pytest.mark.parametrize(
    ("chunks", "lost"),
    [
        (invoke_2(prompt=[{"prompt": "a", "weight": 1}, {"prompt": "b", "weight": 2}]), "prompt"),
        (invoke_2(type="img2img", strength=0.4), "img2img at strength 0.4"),
        (invoke_2(type="img2img"), "img2img"),
        (invoke_2(variations=[{"seed": 1, "weight": 0.2}]), "variations"),
        (invoke_2(postprocessing=[{"type": "esrgan"}]), "postprocessing"),
        (invoke_2(prompt="a (red)++ circle"), "weights of InvokeAI's notation"),
        (dream(" -I a.png -f 0.4"), "img2img at strength 0.4"),
        (dream(" -I a.png"), "img2img"),
        (dream(" -U 2 0.75 -G 0.8"), "upscaling: 2 0.75"),
        (dream(" -q"), "-q: True"),
        (dream(" -A k_lms"), "sampler k_lms"),
        ({"parameters": json.dumps(RUINED | {"loras": [["0a", "0.5 - sty.safetensors"]]})}, "LoRA sty.safetensors at weight 0.5"),
        (KOHYA | {"negative-scale": "2.0"}, "negative-scale: 2.0"),
        (KOHYA | {"clip-prompt": "a dog"}, "clip-prompt: a dog"),
    ],
)
def test_what_older_programs_did_besides_is_told(chunks: dict[str, str], lost: str) -> None:
    assert any(lost in line for line in read(chunks)[2])


def test_texts_that_are_no_recipe_are_named(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("Description", "a red circle --v 6.1 Job ID: \x1b[2J0")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=chunks)
    with pytest.raises(UserError, match=r"no recipe that is known here .its texts: Description: .*--v 6.1") as told:
        read_recipe(tmp_path / "x.png")
    assert str(told.value).isprintable()
