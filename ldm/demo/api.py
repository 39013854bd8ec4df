"""HTTP API of the page: a request as JSON, read into the one that `ldm sample` makes of its options, and its schema."""

from __future__ import annotations

import base64
import binascii
import tempfile
import typing
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.introspection import default_of, hints_of, without_null
from ldm.config.options import Option, options_of
from ldm.demo.catalogue import Catalogue
from ldm.demo.orders import MAX_LINES, MAX_PROMPT, check_upload, order_of, without_place
from ldm.demo.studio import DrawOrder, Job
from ldm.sampling.recipe import texts_of
from ldm.sampling.recipe_values import NAMES as SAMPLERS
from ldm.sampling.recipe_values import SPACINGS
from ldm.sampling.request import Request

# The options of `ldm sample` that a client may say, by the request's parts: none that names a file of this machine, runs other
# networks than the one that is drawn with, or changes how it runs.
PARTS: dict[str, tuple[str, ...]] = {
    "prompts": ("prompt", "prompts"),
    "base": ("model", "seed", "negative", "size"),
    "following": ("recipe", "literal", "strict"),
    "choice": ("n", "seeds", "variations", "variation_strength"),
    "sampler": (),  # all
    "editing": (),
    "adapters": ("lora", "vae"),
    "output": ("watermark",),
}
FILES = {"recipe", "init", "mask", "invert"}  # pictures, in base64
CHOICES: dict[str, tuple[str, ...]] = {"sampler": tuple(SAMPLERS), "spacing": SPACINGS}
SAID = {  # what is otherwise said than on a command line
    "prompts": "Prompts, one a line, with the flags of a prompt file; in place of prompt.",
    "model": "A name that /api/models lists; default: the first.",
    "recipe": "A picture, PNG in base64, whose recipe is followed where nothing else is said.",
    "init": "A picture to start from (img2img), in base64.",
    "mask": "A picture as large as init, white where it is to be new, in base64.",
    "invert": "A picture to edit by its prompt, in base64: start from the noise that it comes from.",
    "lora": "NAME or NAME:WEIGHT of LoRAs that /api/models lists.",
    "vae": "The name of another autoencoder that /api/models lists.",
}


def _fields() -> Iterator[tuple[str, str, type, str, Option]]:
    """Every field that a client may say: its name there, the request's part, that part's class, its name in it, its option."""
    for part, names in PARTS.items():
        kind = hints_of(Request)[part]
        for name, told in options_of(kind).items():
            if name in (names or options_of(kind)):
                yield (told.name or name).removeprefix("--").replace("-", "_"), part, kind, name, told


def schema() -> dict[str, Any]:
    """JSON Schema of what /api/draw takes."""
    properties = {}
    for key, _, kind, name, told in _fields():
        hint = without_null(hints_of(kind)[name])
        plain: dict[Any, dict[str, Any]] = {int: {"type": "integer"}, float: {"type": "number"}, bool: {"type": "boolean"}}
        one: dict[str, Any] = plain.get(hint, {"type": "string"})
        if typing.get_origin(hint) is tuple:
            one = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
        one = {**one, "description": SAID.get(name, told.help)}
        one |= {"contentEncoding": "base64"} if name in FILES else {}
        one |= {"enum": list(CHOICES[name])} if name in CHOICES else {}
        one |= {bound: value for bound, value in (("minimum", told.low), ("maximum", told.high)) if value is not None}
        if (usual := default_of(kind, name)) not in (None, "", ()):
            one["default"] = usual
        properties[key] = one
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What POST /api/draw takes",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def read_request(values: Any, folder: Path) -> Request:
    """A request of JSON.

    Args:
        folder: where files that were sent are written, until the request has been followed.

    Raises:
        UserError: naming the field, the value and what is needed.
    """
    if not isinstance(values, Mapping):
        raise UserError('a JSON object is needed, such as {"prompt": "a green ring"}')
    known = {key: (part, kind, name, told) for key, part, kind, name, told in _fields()}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(key, known, 1)
            raise UserError(f"{key[:80]!r} is not known; {f'is {near[0]} meant?' if near else '/api/schema tells what is'}")
        part, kind, name, told = known[key]
        if value is not None:
            parts.setdefault(part, {})[name] = _value(key, name, value, hints_of(kind)[name], told, folder)
    asked = parts.setdefault("prompts", {})
    if not asked and "recipe" not in parts.get("following", {}):
        raise UserError("prompt: is missing; what should be drawn?")
    return Request(**{part: hints_of(Request)[part](**told) for part, told in parts.items()})


def _value(key: str, name: str, value: Any, hint: Any, told: Option, folder: Path) -> Any:
    hint, got = without_null(hint), f"{key}: got {str(value)[:40]!r}"
    if typing.get_origin(hint) is tuple:
        words = (value,) if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) and len(word) <= MAX_PROMPT for word in words):
            raise UserError(f"{got}; a text of at most {MAX_PROMPT} characters, or a list of such, is needed")
        return tuple(words)
    if hint in (int, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        low, high = (-float("inf") if told.low is None else told.low), (float("inf") if told.high is None else told.high)
        if not fits or not low <= value <= high or (hint is int and value != int(value)):
            span = " ".join(f"{word} {bound:g}" for word, bound in (("from", low), ("to", high)) if abs(bound) != float("inf"))
            raise UserError(f"{got}; a {'whole ' * (hint is int)}number {span} is needed".replace("  ", " "))
        return hint(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise UserError(f"{got}; true or false is needed")
        return value
    most = MAX_LINES if name == "prompts" else MAX_PROMPT
    if not isinstance(value, str) or (len(value) > most and name not in FILES):
        raise UserError(f"{got}; a text of at most {most} characters is needed")
    if hint is not Path or name == "vae":
        return hint(value)
    path = folder / (f"{key}.txt" if name == "prompts" else f"{key}.png")
    path.write_bytes(value.encode("utf-8", "replace") if name == "prompts" else _picture(key, value))
    return path


def _picture(key: str, text: str) -> bytes:
    try:
        data = base64.b64decode(text.partition(";base64,")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise UserError(f"{key}: a picture in base64 is needed, such as base64.b64encode(file.read_bytes()).decode()") from None
    check_upload(key, data)
    return data


def order_of_call(catalogue: Catalogue, values: Any, largest: int) -> DrawOrder:
    """The order of a call.

    Raises:
        UserError: as `ldm.demo.orders.order_of`.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-demo-") as folder, without_place(folder):
        made = order_of(catalogue, read_request(values, Path(folder)), largest)
        return replace(made, notes=tuple(note.replace(f"{folder}/", "") for note in made.notes))


def answer_of(job: Job) -> dict[str, Any]:
    """What a call is answered, once its job is over.

    Raises:
        UserError: if it failed.
    """
    if job.state != "done":
        raise UserError(job.error or job.state)
    pictures = []
    for place, recipe in enumerate(job.order.recipes):
        told = {"seed": recipe.seed, "prompt": recipe.prompt, "width": recipe.width, "height": recipe.height}
        pictures.append({**told, "recipe": recipe.to_dict(), "png": base64.b64encode(_png(job.pictures[place], texts_of(recipe))).decode()})
    return {"pictures": pictures, "notes": job.notes, "seconds": round(job.seconds, 3)}


def _png(pixels: Any, texts: Mapping[str, str]) -> bytes:
    from PIL import Image, PngImagePlugin

    chunks, stream = PngImagePlugin.PngInfo(), BytesIO()
    for name, text in texts.items():
        chunks.add_itxt(name, text)
    Image.fromarray(pixels).save(stream, format="PNG", pnginfo=chunks)
    return stream.getvalue()
