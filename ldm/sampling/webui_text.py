"""Settings text of Stable Diffusion web UI (`parameters`), which many programs write: read in time linear in its length."""

from __future__ import annotations

import json
import re
from typing import Any

from ldm.sampling.foreign_recipe import ForeignRecipe, Reading, shown
from ldm.sampling.recipe_values import number_of

NEGATIVE = "Negative prompt:"
PROGRAM = "a program that writes as Stable Diffusion web UI does"
NAME = re.compile(r"\w[\w \-/.]{0,80}")
QUOTED = re.compile(r'\s{0,9}("(?:\\.|[^\\"])*+")\s{0,9}(?:,|$)')
TAG = re.compile(r"<(\w{1,40}):([^<>]{1,400})>")
NETWORKS = {"lora": "lora", "lyco": "lora", "hypernet": ""}  # what such a tag of a prompt asks for, and the option that gives it
SAID_ELSEWHERE = {"Size", "Hires upscale", "Hires resize", "Model", "Model hash", "Schedule type", "Lora hashes", "TI hashes", "VAE hash"}
# What changes no picture here: who wrote it and when, and of which generator its noise was.
IDLE = {"Version", "User", "App", "Created Date", "Batch size", "Batch pos", "RNG", "ENSD", "Hashes", "Civitai resources"}
IDLE |= {"Civitai metadata", "Template", "Negative Template", "Backend", "Pipeline", "Operations"}
USUAL = {  # what is no loss where it has this value
    "Hires upscaler": ("Lanczos",),
    "Hires steps": ("0",),
    "Hires sampler": ("Use same sampler",),
    "Hires schedule type": ("Use same scheduler",),
    "VAE": ("Automatic", "None"),
    "Token merging ratio": ("0",),
    "Face restoration": ("None",),
    "First pass size": ("0x0",),
    "Tiling": ("False",),
    "Emphasis": ("Original", "No norm"),
}
NUMBERS = {
    "Steps": "steps",
    "CFG scale": "guidance",
    "Seed": "seed",
    "Clip skip": "clip_skip",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation",
}
MOST = 2**22  # characters that are looked at


def read_parameters(text: str) -> ForeignRecipe | None:
    """What a `parameters` text tells; None if it is none.

    Its last line of settings begins with `Steps:` or has three pairs or more, as the web UI itself has it.
    """
    lines = text[:MOST].strip().split("\n")
    number = _settings_line(lines)
    if number is None:
        return None
    pairs, found = pairs_of(lines[number]), Reading()
    start = next((i for i, line in enumerate(lines[:number]) if line.startswith(NEGATIVE)), number)
    prompt, negative = "\n".join(lines[:start]), "\n".join(lines[start:number])[len(NEGATIVE) :]
    found.fields |= {"prompt": _without_tags(prompt, pairs, found), "negative": negative.strip()}
    for theirs, name in NUMBERS.items():
        if theirs in pairs:
            found.number(name, pairs[theirs], theirs)
    if "Sampler" in pairs:
        found.sampler(pairs["Sampler"])
    if "Schedule type" in pairs and ("sampler" in found.fields or "Sampler" not in pairs):
        found.spacing(pairs["Schedule type"])
    elif found.fields.get("sampler") in ("dpmpp_2m", "dpmpp_2m_sde", "heun") and "ldm" not in pairs.get("Version", "ldm"):
        found.fields.setdefault("spacing", "linspace")  # before version 1.9 the name told of Karras' spacing, or there was none
    found.fields |= {ours: pairs[theirs] for theirs, ours in (("Model", "model"), ("Model hash", "model_hash")) if theirs in pairs}
    _passes(pairs, found)
    if pairs.get("TI hashes"):
        found.lose(f"learned words (textual inversion) {shown(pairs['TI hashes'])}; give them by --embedding FILE", "embedding")
    _rest(pairs, found)
    return found.made(PROGRAM)


def _settings_line(lines: list[str]) -> int | None:
    """The number of the line that holds the settings."""
    for number in range(len(lines) - 1, -1, -1):
        said = lines[number]
        if (number == len(lines) - 1 or said.startswith("Steps:")) and len(pairs_of(said)) >= 3:
            return number
    return None


def pairs_of(line: str) -> dict[str, str]:
    """`Name: value, Name: "value, quoted as JSON"`; every character is looked at a fixed number of times."""
    found: dict[str, str] = {}
    place = 0
    while (colon := line.find(":", place)) >= 0:
        name = line[line.rfind(",", place, colon) + 1 or place : colon].strip()
        if quoted := QUOTED.match(line, colon + 1):
            value, place = _unquoted(quoted[1]), quoted.end()
        else:
            end = line.find(",", colon)
            value, place = line[colon + 1 : end if end >= 0 else None].strip(), end + 1 or len(line)
        if NAME.fullmatch(name):
            found[name] = value
    return found


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _without_tags(prompt: str, pairs: dict[str, str], found: Reading) -> str:
    """The prompt without `<lora:name:weight>` and its like, which are no words of it; each is told."""
    tags = TAG.findall(prompt)
    hashes = pairs_of(pairs.get("Lora hashes", ""))
    for kind, words in tags:
        name, *rest = words.split(":")
        weight = rest[0].rpartition("=")[2] if rest else "1"
        more = f" (all it says: {shown(words)})" if len(rest) > 1 else ""
        if NETWORKS.get(kind) == "lora":
            said = f" (hash {shown(hashes[name])})" if name in hashes else ""
            found.lora(name, weight, said + more)
        else:
            found.lose(f"<{kind}:{shown(words)}>")
    named = {words.split(":")[0] for _, words in tags}
    for name, said in hashes.items():
        if name not in named:
            found.lora(name, "?", f" (hash {shown(said)})")
    return TAG.sub("", prompt).strip() if tags else prompt.strip()


def _passes(pairs: dict[str, str], found: Reading) -> None:
    """Size, and how the two passes of hires fix, or the picture that it was drawn out of, stand in it."""
    first, second = _size(pairs.get("Size", "")), _size(pairs.get("Hires resize", ""))
    if first is None:
        if "Size" in pairs:
            found.lose(f"Size: {shown(pairs['Size'])}", "size")
        return _denoised(pairs, found, False)
    found.fields |= {"width": first[0], "height": first[1]}
    factor = number_of("hires", pairs.get("Hires upscale"))
    if second is None and factor is not None:
        second = (int(first[0] * factor), int(first[1] * factor))
    if second is None or second == first:
        if "Hires upscale" in pairs and factor is None:
            found.lose(f"Hires upscale: {shown(pairs['Hires upscale'])}", "hires")
        return _denoised(pairs, found, second is not None)
    factor = second[0] / first[0]
    if first[1] * factor != second[1] or number_of("hires", factor) is None or not all(number_of("width", side) for side in second):
        said = f"hires fix from {first[0]}x{first[1]} to {second[0]}x{second[1]}"
        found.lose(f"{said}: both sides must grow by the same factor; give --hires and --size", "hires")
        return _denoised(pairs, found, True)
    found.fields |= {"width": second[0], "height": second[1], "hires": factor}
    return _denoised(pairs, found, True)


def _denoised(pairs: dict[str, str], found: Reading, twice: bool) -> None:
    """`Denoising strength` is the second pass's, where there is one; else a picture is missing."""
    if (said := pairs.get("Denoising strength")) is None:
        return
    found.number("hires_strength" if twice else "strength", said, "Denoising strength")
    if not twice:
        found.init(f"img2img at strength {shown(said)}")


def _size(text: str) -> tuple[int, int] | None:
    size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip(), re.ASCII)
    if size is None or not all(number_of("width", side) for side in size.groups()):
        return None
    return int(size[1]), int(size[2])


def _rest(pairs: dict[str, str], found: Reading) -> None:
    """All that was told and has no place here, each by its name."""
    usual: dict[str, Any] = {**USUAL, "Hires sampler": (*USUAL["Hires sampler"], pairs.get("Sampler"))}
    usual |= {"Hires steps": ("0", pairs.get("Steps")), "Hires CFG Scale": (pairs.get("CFG scale"),)}
    usual["Eta"] = ("1", "1.0") if found.fields.get("sampler") == "euler_a" else ("0", "0.0")
    if found.fields.get("sampler") == "ddim" and "Eta" in pairs:
        found.number("eta", pairs.pop("Eta"), "Eta")
    for name, value in pairs.items():
        known = name in NUMBERS or name in SAID_ELSEWHERE or name in IDLE or name in ("Sampler", "Denoising strength")
        if known or value in usual.get(name, ()):
            continue
        option = "vae" if name == "VAE" else ""
        found.lose(f"{name}: {shown(value)}{'; give its file by --vae' if option else ''}", option)
