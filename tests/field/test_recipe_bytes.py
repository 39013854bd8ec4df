"""Whatever bytes a picture's texts hold, reading them ends soon and with little memory: a recipe, none, or one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm.config.errors import UserError
from ldm.sampling.foreign_recipe import ForeignRecipe
from ldm.sampling.picture_texts import exif_text
from ldm.sampling.recipe import Recipe, read_recipe, recipe_of
from ldm.sampling.recipe_values import LIMITS
from tests.ends_soon import ends_soon

OURS = Recipe(
    **{"prompt": "a", "negative": "", "seed": 0, "width": 32, "height": 32, "model": "m", "model_hash": "0", "steps": 2},  # type: ignore[arg-type]
    **{"guidance": 1.0, "rescale": 0.0, "sampler": "ddim", "spacing": "trailing"},  # type: ignore[arg-type]
).to_dict()
WORDS = ["Steps: 20", "Sampler: Euler a", "Seed: 5", "Size: 512x768", "CFG scale: 7", "Hires upscale: 2", "Denoising strength: 0.5"]
WORDS += [
    "Clip skip: 2",
    'Lora hashes: "a: 0, b: 1"',
    "<lora:a:1>",
    "Negative prompt: ",
    "Schedule type: Karras",
    "\n",
    '"',
    "\\",
    ":",
    ",",
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["1", "2", 1, 2, 0, 10**400])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6
)
links = st.tuples(st.sampled_from(["1", "2", "3", "4", 3]), st.integers(0, 2)).map(list)
NAMES = [*("positive", "negative", "latent_image", "model", "clip", "samples", "text", "steps", "cfg", "seed", "sampler_name", "scheduler")]
NAMES += ["denoise", "width", "height", "lora_name", "strength_model", "stop_at_clip_layer", "start_at_step", "end_at_step", "guider"]
NAMES += ["noise", "sigmas", "images", "scale_by", "conditioning", "conditioning_to", "conditioning_from", "vae", "upscale_model", "value"]
CLASSES = ["KSampler", "KSamplerAdvanced", "CLIPTextEncode", "LatentUpscale", "ImageUpscaleWithModel", "SaveImage", "Concat"]
CLASSES += ["ConditioningConcat", "SamplerCustomAdvanced"]
nodes = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(CLASSES) | values,
        "inputs": st.dictionaries(st.sampled_from(NAMES), links | values, max_size=8) | values,
    }
)
graphs = st.dictionaries(st.sampled_from("12345"), nodes | values, max_size=5) | values
entries = st.fixed_dictionaries({"name": st.sampled_from(NAMES), "link": st.integers(0, 5), "type": values})
boxes = st.fixed_dictionaries(
    {
        "id": st.integers(1, 4) | values,
        "type": st.sampled_from(CLASSES) | values,
        "mode": st.sampled_from([0, 2, 4]) | values,
        "inputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(NAMES), "link": st.integers(0, 5), "type": values}), max_size=4)
        | values,
        "widgets_values": values,
    }
)
numbers = st.integers(0, 5)
ways = st.lists(st.tuples(numbers, numbers, numbers, numbers, numbers, st.text(max_size=2)).map(list))
drawn = st.fixed_dictionaries({"nodes": st.lists(boxes | values, max_size=4), "links": ways | values})
ours = st.dictionaries(st.sampled_from(list(OURS)), values, max_size=3).map(lambda changed: OURS | changed)

NAMED_VALUES = [
    "prompt",
    "negative_prompt",
    "positive_prompt",
    "uc",
    "steps",
    "scale",
    "cfg_scale",
    "seed",
    "sampler",
    "scheduler",
    "resolution",
    "loras",
]
NAMED_VALUES += [
    "width",
    "height",
    "clip_skip",
    "strength",
    "request_type",
    "v4_prompt",
    "sui_image_params",
    "loraweights",
    "lora_combined_1",
    "model",
]
named = st.dictionaries(st.sampled_from(NAMED_VALUES), values, max_size=8)

DREAMT = ["a ring", "[", "]", '"', "-s 5", "-S7", "-W", "64", "-A k_euler_a", "-I a.png", "-f 0.5", "-", "--", "-C", "1e999", "-U 2 0.75"]

READERS: dict[str, Any] = {
    "invokeai_metadata": named.map(json.dumps) | st.text(max_size=40),
    "Comment": named.map(json.dumps),
    "sd-metadata": named.map(lambda one: json.dumps({"image": one})) | named.map(json.dumps) | st.text(max_size=40),
    "dream": st.lists(st.sampled_from(DREAMT) | st.text(max_size=5), max_size=20).map(lambda words: '"' + " ".join(words)),
    "parameters": st.lists(st.sampled_from(WORDS) | st.text(max_size=10), max_size=30).map(", ".join)
    | st.text()
    | named.map(json.dumps)
    | named.map(lambda one: json.dumps({"sui_image_params": one}))
    | named.map(lambda one: json.dumps({"prompt": "a", "steps": 2, "sampler": "euler"} | one))
    | named.map(lambda one: json.dumps({"c": "a", "steps": 2, "scale": 2, "sampler": "euler", "v2": one} | one))
    | named.map(lambda one: json.dumps({"software": "RuinedFooocus"} | one)),
    "prompt": graphs.map(json.dumps) | st.text(max_size=40),
    "workflow": (drawn | values).map(json.dumps) | st.text(max_size=40),
    "ldm": (ours | values).map(json.dumps) | st.text(max_size=40),
}


def check(name: str, text: str) -> None:
    try:
        with ends_soon():
            found = recipe_of({name: text} | ({"Software": "NovelAI"} if name == "Comment" else {}), Path("x.png"))
    except UserError as error:
        assert name == "ldm" and "\n" not in str(error) and len(str(error)) < 500 and str(error).isprintable()
    else:
        assert found is None or isinstance(found, Recipe | ForeignRecipe)
        if isinstance(found, ForeignRecipe):
            assert all(str(lost) and str(lost).isprintable() and len(str(lost)) < 400 for lost in found.unfollowed)
            assert all(low <= found.fields[field] <= high for field, (low, high) in LIMITS.items() if field in found.fields)
            assert len(str(found.fields.get("prompt", ""))) <= 2 * len(text) + 200


def check_exif(data: bytes) -> None:
    """As the bytes of a comment, and as those of a whole EXIF block."""
    from ldm.sampling.picture_texts import _unnamed

    assert len(exif_text(data)) <= len(data)
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format="JPEG", exif=b"Exif\0\0MM\0*" + data)
    with Image.open(stream) as image:
        assert all(isinstance(text, str) for text in _unnamed(image))


def check_xmp(parts: list[str]) -> None:
    """As XMP's form of EXIF's comment, of any number of languages, open or closed."""
    from ldm.sampling.picture_texts import _meant, _xmp_comments

    with ends_soon():
        assert all(isinstance(name, str) for text in _xmp_comments("".join(parts)) for name in _meant(text))


XMP = [
    "<exif:UserComment>",
    "</exif:UserComment>",
    "<rdf:li",
    ' xml:lang="x-default">',
    "</rdf:li>",
    "&lt;",
    "&#0;",
    "&#99999999999;",
    "{}",
]
codes = st.sampled_from([b"UNICODE\0", b"ASCII\0\0\0", b"JIS\0\0\0\0\0", b"\0" * 8])
exif_bytes = st.binary(max_size=200) | st.tuples(codes, st.binary()).map(b"".join)
CASES: dict[str, tuple[Any, Callable[[Any], None]]] = {name: (texts, partial(check, name)) for name, texts in READERS.items()}
CASES["exif"] = (exif_bytes, check_exif)
CASES["xmp"] = (st.lists(st.sampled_from(XMP) | st.text(max_size=9), max_size=40), check_xmp)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def fuzz(name: str, many: int) -> None:
    inputs, looked_at = CASES[name]

    @settings(max_examples=many, deadline=None, database=None, suppress_health_check=QUIET, derandomize=many < 1000)
    @given(inputs)
    def run(one: Any) -> None:
        looked_at(one)

    run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_any_bytes_end_in_a_value_or_a_line(name: str) -> None:
    fuzz(name, 40)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_of_each_reader(name: str) -> None:
    fuzz(name, 10_000)


def test_a_picture_that_is_cut_off_tells_what_stands_before_its_pixels(tmp_path: Path) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a ring\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768")
    noise = Image.effect_noise((64, 64), 90)
    for name, told in (("told.png", chunks), ("bare.png", None)):
        noise.save(tmp_path / name, pnginfo=told)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1500])
    found = read_recipe(tmp_path / "told.png")
    assert isinstance(found, ForeignRecipe) and (found.fields["prompt"], found.fields["seed"]) == ("a ring", 5)
    with pytest.raises(UserError, match=r"bare.png: damaged or cut off"):
        read_recipe(tmp_path / "bare.png")
