"""HTTP API of the page: a request as JSON, read into the one that `ldm sample` makes of its options, and its schema."""

from __future__ import annotations

import base64
import binascii
import json
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
from ldm.demo.orders import MAX_LINES, MAX_PROMPT, check_upload, order_of, view_word, without_place
from ldm.demo.studio import DrawOrder, Job
from ldm.demo.view_inputs import ViewInput
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
    "views": (),
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
    "given": "What else the picture is drawn by, by the view's name as the model reads it: a picture in base64, a list of boxes, points "
    "or triples, or an object with file (either of these), weight and of (whether the view is made of the picture).",
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
        if name == "given":
            told_of = [{"type": "string", "contentEncoding": "base64"}, {"type": "array"}]
            whole = {"file": {"oneOf": told_of}, "weight": {"type": "number", "minimum": 0, "maximum": 10}, "of": {"type": "boolean"}}
            entry = {"type": "object", "properties": whole, "required": ["file"], "additionalProperties": False}
            one = {"type": "object", "additionalProperties": {"oneOf": [*told_of, entry]}}
        elif typing.get_origin(hint) is tuple:
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
    if name == "given":
        return tuple(view_word(one, folder) for one in _views(value))
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


def _views(value: Any) -> Iterator[ViewInput]:
    """What a call tells of views: see SAID.

    Raises:
        UserError: naming the view and what is needed.
    """
    if not isinstance(value, Mapping):
        raise UserError(f'given: got {str(value)[:40]!r}; an object is needed, such as {{"edges": "iVBORw0..."}}')
    for view, said in value.items():
        entry = said if isinstance(said, Mapping) else {"file": said}
        if (strange := entry.keys() - {"file", "weight", "of"}) or "file" not in entry:
            what = f"{min(strange)[:40]!r} is not known" if strange else "file is missing"
            raise UserError(f"given: {view[:80]}: {what}; file, weight and of can be said")
        file, weight, of = entry["file"], entry.get("weight", 1.0), entry.get("of", False)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= 10 or not isinstance(of, bool):
            got = f"got weight {str(weight)[:20]} and of {str(of)[:20]}"
            raise UserError(f"given: {view[:80]}: {got}; a number from 0 to 10, and true or false, are needed")
        if not isinstance(file, str | list) or "=" in view or not view:
            raise UserError(f"given: {view[:80]}: got {str(file)[:40]!r}; a picture in base64 or a list is needed")
        data = json.dumps(file).encode() if isinstance(file, list) else _picture(f"given: {view[:80]}", file)
        yield ViewInput(view, data, float(weight), of)


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
