"""Recipes by names in pictures of InvokeAI, NovelAI, Fooocus, SwarmUI and Easy Diffusion: JSON, or a chunk for each value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.sampling.foreign_recipe import ForeignRecipe, Reading, shown
from ldm.sampling.recipe_values import number_of

MOST_VALUES = 200  # that are told of a picture
PROMPTS = ("prompt", "negative")
NUMBERS = ("steps", "guidance", "seed", "width", "height", "rescale")
UNUSED = (None, False, "", 0, "None", "none", "[]", "null")  # values by which a setting has no part in the picture
LORA_WORDS = re.compile(r"(.{1,300}?) : (-?[\d.]{1,20})")  # Fooocus: `name : weight`
SIZE = re.compile(r"\((\d{1,5}), (\d{1,5})\)")


@dataclass(frozen=True)
class Dialect:
    """How a program names what it writes.

    Args:
        program: its name.
        names: our field by the name there; besides them `sampler`, `spacing`, `model`, `loras`, `clip_skip`, `size` and `init`.
        idle: names of what changes no picture here.
        first_skip: what the program calls reading the text encoder's last layer, from which it counts on.
        marks: what in a prompt has another meaning here, and what it is.
    """

    program: str
    names: Mapping[str, str]
    idle: frozenset[str] = frozenset()
    first_skip: int = 1
    marks: tuple[str, str] = ("", "")


INVOKE = Dialect(
    "InvokeAI",
    {
        "positive_prompt": "prompt",
        "negative_prompt": "negative",
        "steps": "steps",
        "cfg_scale": "guidance",
        "cfg_rescale_multiplier": "rescale",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "scheduler": "sampler",
        "model": "model",
        "loras": "loras",
        "clip_skip": "clip_skip",
        "strength": "init",
    },
    frozenset({"app_version", "rand_device", "generation_mode", "type", "_canvas_objects"}),
    first_skip=0,
    marks=(r"[\w)][+-]{2,}|\)[+-]|\.(?:and|blend|swap)\(", "weights of InvokeAI's notation (++, .and()), which are words here"),
)
NOVEL = Dialect(
    "NovelAI",
    {
        "prompt": "prompt",
        "uc": "negative",
        "steps": "steps",
        "scale": "guidance",
        "cfg_rescale": "rescale",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler": "sampler",
        "noise_schedule": "spacing",
    },
    frozenset({"n_samples", "signed_hash", "request_type", "version", "params_version", "legacy", "legacy_v3_extend", "hide_debug_overlay"})
    | {"dynamic_thresholding_percentile", "dynamic_thresholding_mimic_scale", "uncond_scale", "v4_prompt", "v4_negative_prompt"}
    | {"strength", "noise"},
    marks=(r"[{}\[\]]", "brackets, by which a word weighs 1.05 times more or less there"),
)
FOOOCUS = Dialect(
    "Fooocus",
    {
        "prompt": "prompt",
        "negative_prompt": "negative",
        "steps": "steps",
        "guidance_scale": "guidance",
        "seed": "seed",
        "resolution": "size",
        "sampler": "sampler",
        "scheduler": "spacing",
        "base_model": "model",
        "loras": "loras",
        "clip_skip": "clip_skip",
    },
    frozenset({"version", "base_model_hash", "full_prompt", "full_negative_prompt", "created_by", "metadata_scheme", "lora_combined"}),
)
SWARM = Dialect(
    "SwarmUI",
    {
        "prompt": "prompt",
        "negativeprompt": "negative",
        "steps": "steps",
        "cfgscale": "guidance",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler": "sampler",
        "scheduler": "spacing",
        "model": "model",
        "clipstopatlayer": "clip_skip",
        "initimagecreativity": "init",
    },
    frozenset({"swarm_version", "aspectratio", "images", "date", "generation_time", "sidelength"}),
)
EASY = Dialect(
    "Easy Diffusion",
    {
        "prompt": "prompt",
        "negative_prompt": "negative",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance",
        "seed": "seed",
        "width": "width",
        "height": "height",
        "sampler_name": "sampler",
        "use_stable_diffusion_model": "model",
        "prompt_strength": "init",
    },
)


def read_named(text: Mapping[str, str]) -> ForeignRecipe | None:
    """What the chunks of a picture tell, if they are of one of these programs; None otherwise."""
    if found := _object(text.get("invokeai_metadata")):
        return _read(INVOKE, found)
    if text.get("Software") == "NovelAI" and (found := _object(text.get("Comment"))):
        return _read(NOVEL, {"prompt": text.get("Description", ""), **found}, _by_novel)
    if found := _object(text.get("parameters")):
        if isinstance(swarm := found.get("sui_image_params"), dict):
            return _read(SWARM, swarm, _by_swarm)
        return _read(FOOOCUS, found, _by_fooocus) if {"prompt", "steps", "sampler"} <= found.keys() else None
    easy = {name: value for name, value in text.items() if name in EASY.names or name.startswith(("use_", "lora_"))}
    return _read(EASY, easy) if {"prompt", "num_inference_steps", "seed"} <= easy.keys() else None


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object; empty where it is none."""
    if text is None or text.lstrip()[:1] != "{":
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(dialect: Dialect, said: Mapping[str, Any], more: Callable[[Mapping[str, Any], Reading], set[str]] | None = None) -> ForeignRecipe:
    """Each value by its name: taken, or told."""
    found = Reading()
    done = more(said, found) if more else set()
    for name, value in list(said.items())[:MOST_VALUES]:
        field = dialect.names.get(name)
        if field is None:
            if name not in dialect.idle and name not in done and not _unused(value):
                found.lose(f"{shown(name)}: {shown(value)}")
        elif value is not None:
            _take(dialect, name, field, value, found)
    if len(said) > MOST_VALUES:
        found.lose(f"{len(said) - MOST_VALUES} more settings")
    return found.made(dialect.program)


def _unused(value: Any) -> bool:
    return not value if isinstance(value, list | dict) else value in UNUSED


def _take(dialect: Dialect, theirs: str, field: str, value: Any, found: Reading) -> None:
    if field in PROMPTS:
        if not isinstance(value, str):
            return found.lose(f"{theirs}: {shown(value)}", field)
        found.fields[field] = value.strip()
        pattern, meaning = dialect.marks
        if pattern and re.search(pattern, value):
            found.lose(f"{theirs}: {meaning}")
    elif field in NUMBERS:
        found.number(field, value, theirs)
    elif field == "clip_skip":
        layer = abs(value) - dialect.first_skip + 1 if isinstance(value, int) and not isinstance(value, bool) else value
        found.number(field, layer, theirs)
    elif field == "sampler":
        name = str(value)[:100]
        if name.endswith("_k"):  # InvokeAI's mark of Karras' spacing
            found.fields["spacing"], name = "karras", name[:-2]
        found.sampler(name.removesuffix("_v3"))
    elif field == "spacing":
        if "sampler" in found.fields:
            found.spacing("normal" if value == "native" else value)
    elif field == "model":
        named = (value.get("name") or value.get("model_name")) if isinstance(value, dict) else value
        if isinstance(named, str):
            found.fields["model"] = re.split(r"[/\\]", named[:300])[-1].removesuffix(".safetensors")
    elif field == "size":
        size = SIZE.fullmatch(str(value)[:40])
        if size is None or not all(number_of("width", side) for side in size.groups()):
            return found.lose(f"{theirs}: {shown(value)}", "size")
        found.fields |= {"width": int(size[1]), "height": int(size[2])}
    elif field == "init":
        found.number("strength", value, theirs)
        found.init(f"img2img at strength {shown(value)}")
    elif field == "loras":
        _loras(value, found)
    return None


def _loras(value: Any, found: Reading) -> None:
    """InvokeAI's list of {model or lora: {name}, weight}, and Fooocus' of [name, weight, hash]."""
    if not isinstance(value, list):
        return found.lose(f"LoRAs: {shown(value)}", "lora")
    for one in value[:MOST_VALUES]:
        if isinstance(one, dict):
            named = one.get("model") or one.get("lora")
            name = (named.get("name") or named.get("model_name")) if isinstance(named, dict) else named
            found.lora(name, one.get("weight"))
        elif isinstance(one, list) and len(one) >= 2:
            found.lora(one[0], one[1])
        else:
            found.lose(f"LoRA {shown(one)}", "lora")
    return None


def _by_novel(said: Mapping[str, Any], found: Reading) -> set[str]:
    """A picture that it was drawn out of, which its request tells, and captions of single characters."""
    request = str(said.get("request_type", "PromptGenerateRequest"))[:100]
    if request != "PromptGenerateRequest" or ("request_type" not in said and "strength" in said):
        found.number("strength", said.get("strength", 1.0), "strength")
        found.init(f"{shown(request)} at strength {shown(said.get('strength', 1.0))}")
    prompt = said.get("v4_prompt")
    caption = prompt.get("caption") if isinstance(prompt, dict) else None
    if isinstance(caption, dict) and caption.get("char_captions"):
        found.lose("captions of single characters")
    return set()


def _by_fooocus(said: Mapping[str, Any], found: Reading) -> set[str]:
    """LoRAs that stand each under a name of its own."""
    done = {name for name in said if re.fullmatch(r"lora_combined_\d{1,3}", str(name))}
    for name in sorted(done):
        words = LORA_WORDS.fullmatch(str(said[name])[:400])
        found.lora(words[1], words[2]) if words else found.lose(f"LoRA {shown(said[name])}", "lora")
    return done


def _by_swarm(said: Mapping[str, Any], found: Reading) -> set[str]:
    """LoRAs and their weights, which are two lists."""
    names, weights = said.get("loras"), said.get("loraweights")
    if not isinstance(names, list):
        return set()
    for i, name in enumerate(names[:MOST_VALUES]):
        found.lora(name, weights[i] if isinstance(weights, list) and i < len(weights) else "1")
    return {"loras", "loraweights"}
