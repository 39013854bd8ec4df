"""ComfyUI's graphs, as users bring them: the right prompt and pass, and a line for whatever is not followed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from ldm.config.errors import UserError
from ldm.sampling.comfy_graph import read_graph
from ldm.sampling.foreign_recipe import ForeignRecipe
from ldm.sampling.recipe import read_recipe
from tests.ends_soon import ends_soon

Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def sampler(**changed: Any) -> Graph:
    told = {"seed": 7, "steps": 20, "cfg": 6.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    told |= {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
    return node("KSampler", **(told | changed))


PLAIN: Graph = {
    "1": node("CheckpointLoaderSimple", ckpt_name="sd/dream_8.safetensors"),
    "2": node("CLIPTextEncode", text="a (red:1.2) circle", clip=["1", 1]),
    "3": node("CLIPTextEncode", text="blurry", clip=["1", 1]),
    "4": node("EmptyLatentImage", width=512, height=768, batch_size=1),
    "5": sampler(),
    "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
    "7": node("SaveImage", images=["6", 0], filename_prefix="x"),
}
FIELDS = {
    **{"prompt": "a (red:1.2) circle", "negative": "blurry", "steps": 20, "guidance": 6.5, "seed": 7, "sampler": "dpmpp_2m"},
    **{"spacing": "karras", "model": "dream_8", "width": 512, "height": 768},
}


def read(changed: Graph, base: Graph = PLAIN, name: str = "prompt") -> tuple[dict[str, Any], list[str]]:
    """Fields and what is not followed of a graph with some nodes changed."""
    found = read_graph({name: json.dumps({**copy.deepcopy(base), **changed})})
    assert found is not None and found.program == "ComfyUI"
    return dict(found.fields), [str(lost) for lost in found.unfollowed]


def test_a_plain_graph_is_followed_whole() -> None:
    assert read({}) == (FIELDS, [])


STYLER = node("SDXLPromptStyler", text_positive="a red circle", text_negative="blurry", style="base")
LOADER = node("Efficient Loader", positive="a red circle", negative="blurry", ckpt_name="dream_8.ckpt", clip_skip=-2, lora_name="None")
ENCODED = {f"{n}": node("CLIPTextEncode", text=["9", n - 2], clip=["1", 1]) for n in (2, 3)}


@pytest.mark.parametrize(
    ("changed", "skip"),
    [
        ({"9": STYLER, **ENCODED}, 1),
        ({"9": node("Prompts", positive_prompt="a red circle", negative_prompt="blurry"), **ENCODED}, 1),
        ({"9": node("Text Loader", prompt="a red circle", neg="blurry"), **ENCODED}, 1),
        ({"9": node("Prompts", positive=["8", 0], negative="blurry"), "8": node("String", value="a red circle"), **ENCODED}, 1),
        ({"9": LOADER, "5": sampler(model=["9", 0], positive=["9", 1], negative=["9", 2])}, 2),
    ],
    ids=["styler", "by name", "short", "linked", "loader"],
)
def test_a_node_that_holds_both_texts_gives_each_its_own(changed: Graph, skip: int) -> None:
    fields, lost = read(changed)
    assert (fields["prompt"], fields["negative"], fields["model"]) == ("a red circle", "blurry", "dream_8")
    assert fields.get("clip_skip", 1) == skip and lost == []


def test_the_order_of_nodes_does_not_count() -> None:
    backwards = dict(reversed(PLAIN.items()))
    assert read({}, backwards) == (FIELDS, [])


HIRES: Graph = {
    "8": node("LatentUpscaleBy", samples=["5", 0], upscale_method="nearest-exact", scale_by=1.5),
    "0": sampler(latent_image=["8", 0], denoise=0.5, steps=40, seed=7),
    "6": node("VAEDecode", samples=["0", 0], vae=["1", 2]),
}


def test_two_passes_are_hires_fix() -> None:
    fields, told = read(HIRES)
    assert fields == FIELDS | {"width": 768, "height": 1152, "hires": 1.5, "hires_strength": 0.5}
    assert [line.split(":")[0] for line in told] == [
        "enlarged by LatentUpscaleBy nearest-exact; here by Lanczos' filter",
        "40 steps within strength 0.5",
        "the second pass' own steps 40",
    ]
    through_pixels = {
        "8": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "9": node("ImageUpscaleWithModel", image=["8", 0], upscale_model=["12", 0]),
        "12": node("UpscaleModelLoader", model_name="4x-UltraSharp.pth"),
        "10": node("ImageScale", image=["9", 0], upscale_method="lanczos", width=1024, height=1536, crop="disabled"),
        "11": node("VAEEncode", pixels=["10", 0], vae=["1", 2]),
        "0": sampler(latent_image=["11", 0], denoise=0.5, seed=8),
        "6": HIRES["6"],
    }
    fields, told = read(through_pixels)
    assert (fields["seed"], fields["width"], fields["height"], fields["hires"]) == (7, 1024, 1536, 2.0)
    assert any("ImageUpscaleWithModel" in line for line in told) and any("seed 8" in line for line in told)


def test_a_second_pass_that_is_no_hires_fix_is_told() -> None:
    same = {"0": sampler(latent_image=["5", 0], denoise=0.5), "6": HIRES["6"]}
    fields, told = read(same)
    assert fields == FIELDS and told[0].startswith("a second pass (node 0)")
    third = {**HIRES, "9": sampler(latent_image=["0", 0], denoise=0.2), "6": node("VAEDecode", samples=["9", 0], vae=["1", 2])}
    assert any("further pass" in line for line in read(third)[1])


def advanced(**changed: Any) -> Graph:
    told = sampler(**changed)["inputs"]
    told["noise_seed"] = told.pop("seed")
    del told["denoise"]
    usual = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    return node("KSamplerAdvanced", **(usual | told))


def test_advanced_samplers_that_go_on_are_one_pass() -> None:
    assert read({"5": advanced()}) == (FIELDS, [])
    split = {
        "5": advanced(end_at_step=15, return_with_leftover_noise="enable"),
        "8": advanced(latent_image=["5", 0], add_noise="disable", start_at_step=15, seed=0),
        "6": node("VAEDecode", samples=["8", 0], vae=["1", 2]),
    }
    assert read(split) == (FIELDS, [])
    refined = {**split, "9": node("CheckpointLoaderSimple", ckpt_name="refiner.safetensors")}
    refined["8"] = advanced(latent_image=["5", 0], add_noise="disable", start_at_step=15, model=["9", 0])
    fields, told = read(refined)
    assert fields == FIELDS and told == ["from step 15 on another model, prompt or guidance (node 8)"]
    assert read({"5": advanced(end_at_step=15)})[1] == ["node 5 stops at step 15 of 20"]


def test_img2img_takes_a_picture_that_is_not_here() -> None:
    pixels = {"8": node("LoadImage", image="cat.png"), "4": node("VAEEncode", pixels=["8", 0], vae=["1", 2])}
    fields, told = read({**pixels, "5": sampler(denoise=0.4)})
    assert fields["strength"] == 0.4 and "width" not in fields
    assert told[0].startswith("img2img from cat.png; give the picture") and "here 8 of 20 are taken" in told[1]
    fields, told = read({**pixels, "5": advanced(start_at_step=12)})
    assert fields["strength"] == pytest.approx(0.4) and len(told) == 1  # its steps are counted as ours are
    masked = {"9": node("SetLatentNoiseMask", samples=["4", 0], mask=["8", 1]), "5": sampler(latent_image=["9", 0])}
    assert any("inpainting" in line for line in read({**pixels, **masked})[1])


def test_loras_and_layers_of_the_text_encoder() -> None:
    changed = {
        "8": node("LoraLoader", lora_name="style.safetensors", strength_model=0.8, strength_clip=0.5, model=["1", 0], clip=["1", 1]),
        "9": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["8", 1]),
        "2": node("CLIPTextEncode", text="a circle", clip=["9", 0]),
        "3": node("CLIPTextEncode", text="blurry", clip=["9", 0]),
        "5": sampler(model=["8", 0]),
    }
    fields, told = read(changed)
    assert fields == FIELDS | {"prompt": "a circle", "clip_skip": 2}
    assert told == ["LoRA style.safetensors at weight 0.8 (0.5 of the text encoder); give it by --lora FILE:WEIGHT, or --lora-dir"]
    assert read({"8": node("FreeU", model=["1", 0], b1=1.1), "5": sampler(model=["8", 0])})[1] == ["node FreeU on the model"]
    vae = {"8": node("VAELoader", vae_name="mse.pt"), "6": node("VAEDecode", samples=["5", 0], vae=["8", 0])}
    assert read(vae)[1] == ["VAE mse.pt; give its file by --vae"]


@pytest.mark.parametrize(
    ("nodes", "prompt", "lines"),
    [
        ({"8": node("PrimitiveString", value="a cat")}, "a cat", 0),
        ({"8": node("MyOwnText", anything="a cat")}, "a cat", 0),
        ({"8": node("ShowText|pysssss", text=["9", 0], text_0="old"), "9": node("Text Multiline", text="a cat")}, "a cat", 0),
        ({"8": node("Reroute", x=["9", 0]), "9": node("String Literal", string="a cat")}, "a cat", 0),
        ({"8": node("Concat", text_a="a", text_b=["9", 0], delimiter=" "), "9": node("String", string="cat")}, "a cat", 0),
        ({"8": node("Replace", text=["9", 0], find="dog", replace="cat"), "9": node("String", string="a dog")}, "a dog", 1),
        ({"8": node("Wildcards", wildcard_text="a {cat|dog}", populated_text="a cat", mode="populate")}, "a cat", 0),
    ],
)
def test_text_through_other_nodes(nodes: Graph, prompt: str, lines: int) -> None:
    fields, told = read({**nodes, "2": node("CLIPTextEncode", text=["8", 0], clip=["1", 1])})
    assert fields["prompt"] == prompt and len(told) == lines


def test_conditions_that_are_passed_on_joined_and_changed() -> None:
    other = {"8": node("CLIPTextEncode", text="at night", clip=["1", 1])}
    fields, told = read(
        {**other, "9": node("ConditioningConcat", conditioning_to=["2", 0], conditioning_from=["8", 0]), "5": sampler(positive=["9", 0])}
    )
    assert fields["prompt"] == "a (red:1.2) circle BREAK at night" and not told
    fields, told = read(
        {**other, "9": node("ConditioningCombine", conditioning_1=["2", 0], conditioning_2=["8", 0]), "5": sampler(positive=["9", 0])}
    )
    assert fields["prompt"] == FIELDS["prompt"] and "several prompts" in told[0]
    net = node("ControlNetApplyAdvanced", positive=["2", 0], negative=["3", 0], control_net=["20", 0], image=["21", 0], strength=1.0)
    fields, told = read({"9": net, "5": sampler(positive=["9", 0], negative=["9", 1])})
    assert fields == FIELDS and told == ["node ControlNetApplyAdvanced on the prompt"]
    fields, told = read({"2": node("CLIPTextEncode", text="[x] embedding:easy cat", clip=["1", 1])})
    assert fields["prompt"] == r"\[x\] embedding:easy cat" and "learned word (textual inversion) easy" in told[0]


def test_what_is_zeroed_out_is_no_prompt() -> None:
    fields, told = read({"8": node("ConditioningZeroOut", conditioning=["2", 0]), "5": sampler(negative=["8", 0])})
    assert fields == FIELDS | {"negative": ""} and told == ["node ConditioningZeroOut on the prompt"]


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"8": node("ConditioningNormalize", conditioning=["2", 0]), "5": sampler(positive=["8", 0])},
            "node ConditioningNormalize on the prompt",
        ),
        ({"2": node("CLIPTextEncodeFlux", clip_l="a", t5xxl="a", guidance=3.5, clip=["1", 1])}, "guidance 3.5 that the network is told"),
        ({"2": node("CLIPTextEncode", text="a BREAK b", clip=["1", 1])}, "BREAK in the prompt, a word there"),
        ({"4": node("EmptyLatentImage", width=["8", 0], height=64), "8": node("Ratio", ratio="1:1")}, "size: cannot be told of the graph"),
    ],
    ids=["one input", "flux", "break", "size"],
)
def test_what_only_looks_followed_is_told(changed: Graph, line: str) -> None:
    assert [one for one in read(changed)[1] if line in one], read(changed)
    assert read({"8": node("Reroute (rgthree)", conditioning=["2", 0]), "5": sampler(positive=["8", 0])}) == (FIELDS, [])


def test_custom_samplers_are_followed() -> None:
    custom = {
        "5": node("SamplerCustomAdvanced", noise=["10", 0], guider=["11", 0], sampler=["12", 0], sigmas=["13", 0], latent_image=["4", 0]),
        "10": node("RandomNoise", noise_seed=["14", 0]),
        "14": node("Seed (rgthree)", seed=7),
        "11": node("CFGGuider", model=["1", 0], positive=["2", 0], negative=["3", 0], cfg=6.5),
        "12": node("KSamplerSelect", sampler_name="dpmpp_2m"),
        "13": node("BasicScheduler", scheduler="karras", steps=20, denoise=1.0, model=["1", 0]),
    }
    assert read(custom) == (FIELDS, [])
    assert read({"5": sampler(sampler_name="res_multistep", seed=2**60)})[1] == [
        "seed: 1152921504606846976 (whole numbers from 0 to 9.0072e+15 are taken)",
        "sampler res_multistep: not one of DDPM, DDIM, PLMS, Euler, Euler a, Heun, DPM++ 2M, DPM++ 2M SDE, UniPC, LCM",
    ]


def test_several_pictures_of_a_graph_are_told() -> None:
    changed = {"8": sampler(seed=9), "9": node("VAEDecode", samples=["8", 0], vae=["1", 2]), "10": node("SaveImage", images=["9", 0])}
    assert "2 pictures end this graph" in read(changed)[1][0]
    assert read({**changed, "10": node("PreviewImage", images=["9", 0])}) == (FIELDS, [])  # what is only looked at is in no file


def workflow(mode: int = 0) -> Graph:
    def one(id: int, kind: str, values: list[Any], mode: int = 0, **links: tuple[int, str]) -> Graph:
        inputs = [{"name": name, "type": kind, "link": number} for name, (number, kind) in links.items()]
        return {"id": id, "type": kind, "mode": mode, "inputs": inputs, "widgets_values": values}

    nodes = [
        one(1, "CheckpointLoaderSimple", ["dream_8.safetensors"]),
        one(8, "LoraLoader", ["style.safetensors", 0.8, 0.8], mode, model=(1, "MODEL"), clip=(2, "CLIP")),
        one(2, "CLIPTextEncode", ["a (red:1.2) circle"], clip=(4, "CLIP")),
        one(3, "CLIPTextEncode", ["blurry"], clip=(4, "CLIP")),
        one(4, "EmptyLatentImage", [512, 768, 1]),
        one(
            *(5, "KSampler", [7, "randomize", 20, 6.5, "dpmpp_2m", "karras", 1]),
            **{"model": (3, "MODEL"), "positive": (5, "C"), "negative": (6, "C"), "latent_image": (7, "LATENT")},
        ),
        one(6, "VAEDecode", [], samples=(8, "LATENT"), vae=(9, "VAE")),
        one(7, "SaveImage", ["x"], images=(10, "IMAGE")),
        one(11, "Note", ["some words"]),
    ]
    ways = [(1, 1, 0, 8, 0, "MODEL"), (2, 1, 1, 8, 1, "CLIP"), (3, 8, 0, 5, 0, "MODEL"), (4, 8, 1, 2, 0, "CLIP"), (5, 2, 0, 5, 1, "C")]
    ways += [(6, 3, 0, 5, 2, "C"), (7, 4, 0, 5, 3, "LATENT"), (8, 5, 0, 6, 0, "LATENT"), (9, 1, 2, 6, 1, "VAE"), (10, 6, 0, 7, 0, "IMAGE")]
    return {"nodes": nodes, "links": [list(way) for way in ways], "version": 0.4}


def test_the_editors_form_is_read_too() -> None:
    assert read({}, workflow(mode=4), "workflow") == (FIELDS, [])  # the LoRA is bypassed
    fields, told = read({}, workflow(), "workflow")
    assert fields == FIELDS and told == ["LoRA style.safetensors at weight 0.8; give it by --lora FILE:WEIGHT, or --lora-dir"]


@pytest.mark.parametrize(
    "text",
    [
        *(
            '{"1": {"class_type": ["KSampler"], "inputs": 5}}',
            '{"1": {"class_type": "KSampler", "inputs": {"positive": ["2", 0]}}}',
            "[]",
            "5",
        ),
        *(
            '{"a":' * 100_000,
            '{"nodes": 5}',
            '{"nodes": [5, {"id": [1]}], "links": [[1]]}',
            '{"1": {"class_type": "KSampler", "inputs": []}}',
        ),
        '{"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0], "latent_image": ["1", 0]}}}',
    ],
)
def test_what_is_no_graph_is_no_recipe(tmp_path: Path, text: str) -> None:
    assert read_graph({"prompt": text}) is None and read_graph({"workflow": text}) is None
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=chunks)
    with pytest.raises(UserError, match="carries no recipe"):
        read_recipe(tmp_path / "x.png")


def test_webp_carries_it_in_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = f"prompt:{json.dumps(PLAIN)}"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=exif)
    found = read_recipe(tmp_path / "x.webp")
    assert isinstance(found, ForeignRecipe) and found.fields == FIELDS


def test_long_and_doubling_graphs_end_soon() -> None:
    long = {str(n): node("Reroute", x=[str(n + 1), 0]) for n in range(100, 4900)}
    double = {f"d{n}": node("Concat", a=[f"d{n + 1}", 0], b=[f"d{n + 1}", 0]) for n in range(60)} | {"d60": node("String", string="x" * 99)}
    fan = {f"f{n}": node("AnyNode", a=[f"f{n + 1}", 0], b=[f"f{n + 1}", 0], c=[f"f{n + 2}", 0]) for n in range(3000)}
    for changed in (
        {**long, "2": node("CLIPTextEncode", text=["100", 0], clip=["100", 0])},
        {**long, "5": sampler(latent_image=["100", 0], model=["100", 0])},
        {**double, "2": node("CLIPTextEncode", text=["d0", 0], clip=["1", 1])},
        {**fan, "5": sampler(latent_image=["f0", 0], positive=["f0", 0])},
    ):
        with ends_soon():
            read_graph({"prompt": json.dumps({**PLAIN, **changed})})


@pytest.mark.parametrize(
    ("writer", "told"),
    [
        (node("OllamaGenerate", prompt="write me a prompt", model="x"), True),
        (node("WD14Tagger|pysssss", image=["9", 0], exclude_tags="hat"), True),
        (node("Some Custom Node", value="a ring"), True),
        (node("DPRandomGenerator", text="a {red|blue} ring"), True),
        (node("PrimitiveStringMultiline", value="a ring"), False),
        (node("Text Multiline", text="a ring"), False),
        (node("CR Prompt Text", prompt="a ring"), False),
        (node("easy positive", positive="a ring"), False),
    ],
)
def test_a_node_that_may_write_another_text_is_told(writer: Graph, told: bool) -> None:
    graph = {"2": node("CLIPTextEncode", text=["8", 0], clip=["1", 1]), "8": writer, "9": node("LoadImage", image="x.png")}
    fields, lost = read(graph)
    assert bool(fields["prompt"]) and any("on the prompt" in one for one in lost) == told, (fields, lost)


def test_shown_texts_come_through_what_wrote_them() -> None:
    graph = {
        "2": node("CLIPTextEncode", text=["8", 0], clip=["1", 1]),
        "8": node("ShowText|pysssss", text=["9", 0]),
        "9": node("LLM Party", prompt="write something"),
    }
    assert any("LLM Party on the prompt" in one for one in read(graph)[1])
