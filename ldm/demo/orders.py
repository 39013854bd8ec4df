"""Form and order: what a user fills in, checked, as nothing that comes over a network can be trusted."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.data.images import Rejected, probe
from ldm.demo.studio import DrawOrder
from ldm.families.draws import Draws, Settings, Wanted
from ldm.sampling import jobs
from ldm.sampling.adapters import differ, told_shortly
from ldm.sampling.foreign_recipe import ForeignRecipe
from ldm.sampling.init_images import InitImage, read_init_image
from ldm.sampling.prompt_files import Asked
from ldm.sampling.prompt_tags import parted
from ldm.sampling.recipe import Recipe, writable
from ldm.sampling.recipe_values import LIMITS

MAX_PROMPT = 10_000  # characters
MAX_PICTURES = 64  # of one order
MAX_BYTES = 2**25  # of an uploaded picture
MAX_PIXELS = 2**24  # of one, before it is resized
BOUNDS = LIMITS | {"pictures": (1, MAX_PICTURES)}
TOLD = ("original_size", "crop", "target_size")  # what a network of XL's is told of sizes: on the page always those that are drawn
FOREIGN = ("variation", "to", "outpaint", "invert", "watermark", *TOLD)  # fields of a recipe that the page has no place for


@dataclass(frozen=True, kw_only=True)
class Form(Settings):
    """What can be chosen for one order; the numbers mean what the options of `ldm sample` mean, a spacing of "" the sampler's own."""

    prompt: str = ""
    negative: str = ""
    seed: int = 0  # of the first picture; picture k has seed + k
    pictures: int = 1
    width: int  # px
    height: int  # px
    notation: bool = True
    hires: float = 1.0
    hires_strength: float = 0.5
    strength: float = 0.75  # with a picture to start from


NAMES = tuple(f.name for f in fields(Form) if f.name not in TOLD)


def blank(family: Draws, precision: str = "") -> Form:
    """The model's own defaults."""
    own, (height, width) = family.settings(Wanted(precision=precision)), family.defaults["size"]
    return Form(width=width, height=height, **{**asdict(own), "spacing": ""})


def read_form(values: Mapping[str, Any], largest: int, form: Form) -> Form:
    """A form with what a client sent: numbers within their bounds, texts of some length.

    Args:
        largest: px, of a side.
        form: what counts where nothing was sent.

    Raises:
        UserError: naming the field, the value and what is needed.
    """
    found: dict[str, Any] = {}
    for f in (f for f in fields(Form) if f.name in NAMES):
        value = values.get(f.name)
        if value is None:
            continue
        kind = {"str": str, "int": int, "float": float, "bool": bool}[str(f.type)]
        low, high = (1, largest) if f.name in ("width", "height") else BOUNDS.get(f.name, (0, math.inf))
        if kind is str and isinstance(value, str):
            if len(value) > MAX_PROMPT:
                raise UserError(f"{f.name}: {len(value)} characters; at most {MAX_PROMPT}")
            found[f.name] = writable(value).replace("\0", " ").replace("\r\n", "\n")
            continue
        if kind is bool and isinstance(value, bool):
            found[f.name] = value
            continue
        fits = kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not fits or (kind is int and value != int(value)):
            needed = f"a {'whole ' * (kind is int)}number from {low:g} to {high:g}" if kind in (int, float) else f"a {kind.__name__}"
            raise UserError(f"{f.name}: got {str(value)[:40]!r}; {needed} is needed")
        found[f.name] = kind(value)
    return replace(form, **found)


def order_of(
    family: Draws, model: str, form: Form, init: bytes | None = None, mask: bytes | None = None, added: Mapping[str, str] | None = None
) -> DrawOrder:
    """An order by the same way that `sample.py` makes its recipes.

    Args:
        model: its name, that pictures remember.
        init: a picture file to start from.
        mask: a picture file, white where it is to be new.
        added: what recipes tell of the model's LoRAs and words.

    Raises:
        UserError: as `sample.py` has it.
    """
    if form.notation and (tags := parted(form.prompt)[1]):
        raise UserError(f"prompt: {tags[0].text}: this page draws with the LoRAs that it was started with; leave the tag out")
    rest: dict[str, Any] = {"model": model, "model_hash": family.content_hash, "notation": form.notation, **(added or {})}
    init_image = None
    if init is not None:
        init_image = read_uploaded(init, mask, (form.height, form.width))
        rest |= {"init": init_image.init_hash, "mask": init_image.mask_hash, "strength": form.strength}
    elif form.hires != 1:
        rest |= {"hires": form.hires, "hires_strength": form.hires_strength}
    size = (form.height, form.width)
    common = jobs.Common(seed=form.seed, n=form.pictures, wanted=form.wanted(), negative=form.negative, size=size, rest=rest)
    return DrawOrder(tuple(jobs.recipes(family, [Asked(prompt=form.prompt)], common)), init_image)


def read_uploaded(init: bytes, mask: bytes | None, size: tuple[int, int]) -> InitImage:
    """The picture and the mask that a client sent, as `sample.py` reads them from files.

    Raises:
        UserError: for what is too large or no picture.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-demo-") as folder:
        paths: dict[str, Path] = {}
        for name, data in (("init", init), ("mask", mask)):
            if data is None:
                continue
            check_upload(name, data)
            paths[name] = Path(folder) / f"{name}.png"
            paths[name].write_bytes(data)
        try:
            return read_init_image(paths["init"], paths.get("mask"), size)
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from None


def check_upload(name: str, data: bytes) -> None:
    """Refuse what is too large or no picture, by its length and its header alone.

    Raises:
        UserError: saying so.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: {len(data) / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB")
    try:
        probe(data, MAX_PIXELS)
    except Rejected as error:
        raise UserError(f"{name}: {error}") from None


def fill_in(
    form: Form, found: Recipe | ForeignRecipe, model_hash: str, largest: int, added: Mapping[str, str] | None = None
) -> tuple[Form, list[str]]:
    """A form with the settings of a picture, and what should be known of those that it could not take.

    Args:
        found: as `ldm.sampling.recipe.read_recipe` gives it.
        model_hash: of the model at hand.
        added: what recipes tell of its LoRAs and words.
    """
    told: dict[str, Any] = asdict(found) if isinstance(found, Recipe) else {"notation": True, **found.fields}
    notes = [] if isinstance(found, Recipe) else [f"Settings of {found.program}: a picture alike, not the same."]
    notes += [] if isinstance(found, Recipe) else [f"Not followed: {lost}." for lost in found.unfollowed]
    if not model_hash.startswith(str(told.get("model_hash", ""))):
        notes.append(f"It was made by the model {told.get('model', '?')}, not by this one: the picture will differ.")
    if told.get("init"):
        notes.append(f"It was drawn out of another picture (SHA-256 {told['init'][:12]}…): load that one below to repeat it.")
    own = {f.name: f.default for f in fields(Recipe)}
    if isinstance(found, Recipe) and differ(told, added or {}):
        notes.append(f"This page draws with {', '.join(told_shortly(added or {})) or 'no LoRAs or new words'}: the picture will differ.")
    if other := [name for name in FOREIGN if told.get(name, own[name]) != own[name]]:
        notes.append(f"It also used {', '.join(other)}, which this page does not have; `ldm sample --from` does.")
    wanted = {name: told[name] for name in NAMES if name in told and (name != "strength" or told.get("init"))}
    filled = form
    for name, value in wanted.items():  # one by one: other programs' numbers may lie outside of ours
        try:
            filled = read_form({name: value}, largest, filled)
        except UserError as error:
            notes.append(f"Left out: {error}.")
    return replace(filled, pictures=1), notes
