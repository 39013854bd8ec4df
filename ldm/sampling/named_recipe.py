"""Recipes by names in pictures of InvokeAI, NovelAI and others (`ldm.sampling.dialects`): JSON, a chunk for each value, or a line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from ldm.sampling.dialects import DRAW_THINGS, DREAM, EASY, FOOOCUS, INVOKE, INVOKE_2, KOHYA, NOVEL, RUINED, SWARM, Dialect
from ldm.sampling.foreign_recipe import ForeignRecipe, Reading, shown
from ldm.sampling.recipe_values import number_of

MOST_VALUES = 200  # that are told of a picture
PROMPTS = ("prompt", "negative")
NUMBERS = ("steps", "guidance", "seed", "width", "height", "rescale")
UNUSED = (None, False, "", 0, "None", "none", "[]", "null")  # values by which a setting has no part in the picture
LORA_WORDS = re.compile(r"(.{1,300}?) : (-?[\d.]{1,20})")  # Fooocus: `name : weight`
SIZE = re.compile(r"\(?(\d{1,5})(?:, |x)(\d{1,5})\)?")
RUINED_LORA = re.compile(r"(-?[\d.]{1,20}) - (.{1,300})")  # `weight - name`
BRACKETED = re.compile(r"\[([^\[\]]*)\]")  # words of InvokeAI 2 that count against
KOHYA_MORE = (*KOHYA.idle, "negative-scale", "clip-prompt", "crop-top", "crop-left")
OPTION = re.compile(r"-([A-Za-z])(.*)")


def read_named(text: Mapping[str, str]) -> ForeignRecipe | None:
    """What the chunks of a picture tell, if they are of one of these programs; None otherwise."""
    if found := _object(text.get("invokeai_metadata")):
        return _read(INVOKE, found)
    if found := _object(text.get("sd-metadata")):
        return _by_invoke_2(found)
    for name in ("dream", "Dream"):
        if (line := text.get(name, "")).startswith('"'):
            return _by_dream(line)
    if text.get("Software") == "NovelAI" and (found := _object(text.get("Comment"))):
        return _read(NOVEL, {"prompt": text.get("Description", ""), **found}, _by_novel)
    if found := _object(text.get("parameters")):
        if isinstance(swarm := found.get("sui_image_params"), dict):
            return _read(SWARM, swarm, _by_swarm)
        if found.get("software") == RUINED.program:
            return _read(RUINED, found)
        if {"c", "scale", "steps", "sampler"} <= found.keys():
            return _read(DRAW_THINGS, found, _by_draw_things)
        return _read(FOOOCUS, found, _by_fooocus) if {"prompt", "steps", "sampler"} <= found.keys() else None
    easy = {name: value for name, value in text.items() if name in EASY.names or name.startswith(("use_", "lora_"))}
    if {"prompt", "num_inference_steps", "seed"} <= easy.keys():
        return _read(EASY, easy)
    kohya = {name: value for name, value in text.items() if name in KOHYA.names or name in KOHYA_MORE}
    return _read(KOHYA, kohya, _by_kohya) if {"prompt", "steps", "scale", "seed"} <= kohya.keys() else None


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
    """InvokeAI's list of {model or lora: {name}, weight}, and lists of [name, weight, hash] or [hash, "weight - name"]."""
    if not isinstance(value, list):
        return found.lose(f"LoRAs: {shown(value)}", "lora")
    for one in value[:MOST_VALUES]:
        if isinstance(one, dict):
            named = one.get("model") or one.get("lora")
            name = (named.get("name") or named.get("model_name")) if isinstance(named, dict) else named
            found.lora(name, one.get("weight"))
        elif isinstance(one, list) and len(one) == 2 and (ruined := RUINED_LORA.fullmatch(str(one[1])[:400])):
            found.lora(ruined[2], ruined[1])
        elif isinstance(one, list) and len(one) >= 2:
            found.lora(one[0], one[1])
        else:
            found.lose(f"LoRA {shown(one)}", "lora")
    return None


def _by_invoke_2(said: Mapping[str, Any]) -> ForeignRecipe:
    """What stands in `image`, whose prompt is words, or a list of them with their weights."""
    inner = said.get("image")
    found: dict[str, Any] = {name: value for name, value in said.items() if name != "image"} | (inner if isinstance(inner, dict) else {})
    words = found.get("prompt")
    if isinstance(words, list) and len(words) == 1 and isinstance(words[0], dict):
        words = words[0].get("prompt")
    if isinstance(words, str):
        found |= _for_and_against(words)
    return _read(INVOKE_2, found, _out_of_a_picture)


def _by_dream(line: str) -> ForeignRecipe:
    """`"prompt [negative]" -s 50 -S 7 -W 512 -H 512 -C 7.5 -A k_euler_a`: the command line that drew it."""
    end = line.rfind('"')
    found: dict[str, Any] = dict(_for_and_against(line[1:end]))
    name = ""
    for word in line[end + 1 :].split()[: 4 * MOST_VALUES]:
        if option := OPTION.fullmatch(word):
            name = DREAM.get(option[1], f"-{option[1]}")
            found[name] = option[2]
        elif name:
            found[name] = f"{found[name]} {word}".strip()
    return _read(INVOKE_2, {one: True if value == "" and one.startswith("-") else value for one, value in found.items()}, _out_of_a_picture)


def _out_of_a_picture(said: Mapping[str, Any], found: Reading) -> set[str]:
    """A picture that it was drawn out of, told without a strength."""
    if (said.get("type") == "img2img" or said.get("init_image_path")) and "strength" not in said:
        found.init("img2img")
    return set()


def _for_and_against(words: str) -> dict[str, str]:
    """A prompt of InvokeAI 2, whose brackets hold what counts against."""
    against = " ".join(BRACKETED.findall(words))
    return {"prompt": " ".join(BRACKETED.sub(" ", words).split(" ")) if against else words, "negative": against}


def _by_draw_things(said: Mapping[str, Any], found: Reading) -> set[str]:
    """A strength below 1, which a picture was drawn out of by; a second pass; what stands in its own form (`v2`) alone."""
    strength = said.get("strength")
    if strength is not None and strength != 1:
        found.number("strength", strength, "strength")
        found.init(f"img2img at strength {shown(strength)}")
    form = said.get("v2")
    if isinstance(form, dict) and "clip_skip" not in said:
        found.number("clip_skip", form.get("clipSkip", 1), "clipSkip")
    for name in ("controls", "refinerModel", "upscaler", "faceRestoration", "hiresFix", "zeroNegativePrompt"):
        if isinstance(form, dict) and not _unused(form.get(name)):
            found.lose(f"{name}: {shown(form[name])}")
    return {"strength", "shift"} if said.get("shift") == 1 else {"strength"}


def _by_kohya(said: Mapping[str, Any], found: Reading) -> set[str]:
    """A guidance of its own for the negative prompt, told where there is none, too."""
    if said.get("negative-scale") in (None, said.get("scale")):
        return {"negative-scale"}
    return set()


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
