"""Recipe: the metadata of a picture, all that decides it, as text chunks in its PNG, for people, other programs and ourselves."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.version import __version__
from ldm.families.draws import BACKENDS, Settings
from ldm.sampling.comfy_graph import read_graph
from ldm.sampling.foreign_recipe import ForeignRecipe, shown
from ldm.sampling.named_recipe import read_named
from ldm.sampling.picture_texts import OURS, PARAMETERS, read_chunks
from ldm.sampling.recipe_values import LIMITS, NAMES, SCHEDULES, number_of
from ldm.sampling.webui_text import NEGATIVE, read_parameters

XMP = "XML:com.adobe.xmp"
AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"  # IPTC's word for what a model made
ORIGIN = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    f' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{AI_MADE}"/>'
    "</rdf:RDF></x:xmpmeta>"
)
SCHEMA = 1
KNOWN = (
    "pictures of ldm, Stable Diffusion web UI, ComfyUI, InvokeAI, NovelAI, Fooocus, SwarmUI, Easy Diffusion, Draw Things and kohya have one"
)
MENTIONED = 4  # texts of a picture that are named where none is a recipe
MARGINS = re.compile(r"(?:\d{1,4}(?:,\d{1,4}){3})?")  # of `outpaint`


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Everything that decides a picture, given the model."""

    prompt: str
    negative: str
    seed: int
    width: int  # px
    height: int  # px
    model: str  # its name, without the place where it lies
    model_hash: str  # of its content
    init: str = ""  # SHA-256 of the file it was drawn out of; empty: out of noise
    strength: float = 1.0  # the share of the steps that were taken
    mask: str = ""  # SHA-256 of the file that showed where it is new; empty: everywhere
    notation: bool = False  # whether brackets and AND in the prompts mean what ldm.text.prompt_syntax says, or stand for themselves
    hires: float = 1.0  # how many times smaller, in width and height, a first pass drew it; 1: there was none
    hires_strength: float = 0.5  # the share of the steps that the second pass took
    variation_seed: int = 0  # of the noise that its own is mixed with
    variation: float = 0.0  # how far, along the arc: 0 its own, 1 the other
    to: str = ""  # a second prompt
    share: float = 0.0  # how far the text's states are on the way to that one
    outpaint: str = ""  # px added around `init`: left,top,right,bottom
    invert: bool = False  # whether it started from the noise that ddim gives `init` back from, instead of fresh noise
    source: str = ""  # what that picture was said to show then; without one what was drawn beside, for its attention (prompt-to-prompt)
    cross_replace: float = 0.0  # the share of the steps in which its words took the attention of the source's
    self_replace: float = 0.0  # and in which its places did
    watermark: str = ""  # text hidden in the pixels
    loras: str = ""  # JSON: a list of {file, weight, hash}, merged into the model in this order
    embeddings: str = ""  # JSON: a list of {file, token, hash}, words that the model was taught
    vae: str = ""  # JSON: a list of one {file, hash}, the autoencoder that took the place of the model's own
    given: str = ""  # JSON: a list of {view, file, weight, hash, of}, views of the picture that the model was told
    classifier: str = ""  # SHA-256 of the file that guided it besides the prompt
    classifier_scale: float = 0.0  # and how strongly
    backend: str = ""  # what computed the denoising network, where it was not torch

    def parameters(self) -> str:
        """The text that A1111's web UI writes and many programs read."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"{NEGATIVE} {self.negative}")
        values: dict[str, object] = {"Steps": self.steps, "Sampler": NAMES.get(self.sampler, self.sampler)}
        if self.spacing in SCHEDULES:
            values["Schedule type"] = SCHEDULES[self.spacing]
        values |= {
            "CFG scale": self.guidance,
            "Seed": self.seed,
            "Size": f"{self.first_width}x{self.first_height}",
            "Model hash": self.model_hash[:10],
            "Model": self.model,
            "Version": f"ldm {__version__}",
        }
        if self.clip_skip != 1:
            values["Clip skip"] = self.clip_skip
        if self.init:
            values["Denoising strength"] = self.strength
        elif self.hires != 1:
            values |= {"Denoising strength": self.hires_strength, "Hires upscale": self.hires}
        if self.variation:
            values |= {"Variation seed": self.variation_seed, "Variation seed strength": self.variation}
        for name, field in (("Lora hashes", self.loras), ("TI hashes", self.embeddings)):
            if field:
                values[name] = ", ".join(f"{one.get('token') or Path(one['file']).stem}: {one['hash'][:12]}" for one in json.loads(field))
        lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items()))
        return "\n".join(lines)

    @property
    def first_width(self) -> int:
        """px, of the first pass."""
        return round(self.width / self.hires)

    @property
    def first_height(self) -> int:
        """px, of the first pass."""
        return round(self.height / self.hires)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the `ldm` chunk."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:\n"') else value


def save_picture(path: Path, pixels: Any, recipe: Recipe) -> None:
    """Write bytes (H,W,3) as a PNG with its recipe, whole or not at all; an existing file is never replaced.

    Raises:
        FileExistsError: if `path` is there already.
    """
    from PIL import Image, PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    for name, text in texts_of(recipe).items():
        chunks.add_itxt(name, text)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=chunks)
        claim(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def texts_of(recipe: Recipe) -> dict[str, str]:
    """What a PNG carries: the settings as other programs read them, the recipe, and that a model made it."""
    return {PARAMETERS: writable(recipe.parameters()), OURS: writable(json.dumps(recipe.to_dict(), ensure_ascii=False)), XMP: ORIGIN}


def claim(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless the name is taken, however late."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("xb"):
            pass
        temporary.replace(path)


def writable(text: str) -> str:
    """The text with `?` for what UTF-8 has no bytes for: halves of characters, as a mistyped command line may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_recipe(path: Path) -> Recipe | ForeignRecipe:
    """The whole recipe in a picture of ours; of other programs' pictures what they tell of one.

    Raises:
        UserError: if the file is no picture, or carries no recipe.
    """
    texts = read_chunks(path)
    found = recipe_of(texts, path)
    if found is None:
        raise UserError(f"{path}: carries no recipe that is known here{_mentioned(texts)}; {KNOWN}, unless they were edited")
    return found


def _mentioned(texts: Mapping[str, str]) -> str:
    """What a picture tells in place of a recipe, such as the program that wrote it."""
    there = [f"{shown(name)}: {shown(text)}" for name, text in texts.items() if name != XMP][:MENTIONED]
    return f" (its texts: {'; '.join(there)})" if there else ""


def recipe_of(text: Mapping[str, str], path: Path) -> Recipe | ForeignRecipe | None:
    """The recipe that the texts of a file tell; None where they tell none.

    Raises:
        UserError: if it is ours, and damaged.
    """
    if OURS in text:
        return _ours(text[OURS], path)
    return read_parameters(text.get(PARAMETERS, "")) or read_graph(text) or read_named(text)


def _ours(text: str, path: Path) -> Recipe:
    try:
        values = json.loads(text)
        if values["schema"] > SCHEMA:
            raise UserError(f"{path}: its recipe was written by ldm {shown(values['version'])}; a newer ldm than this can read it")
        known = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING} | values
        return Recipe(**{f.name: _typed(f.name, known[f.name], str(f.type)) for f in fields(Recipe)})
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its recipe cannot be read ({type(error).__name__}: {error})") from None


def _typed(name: str, value: Any, kind: str) -> Any:
    """A field's value, if it is one.

    Raises:
        TypeError, ValueError: saying what it is instead.
    """
    value = float(value) if kind == "float" and type(value) is int and abs(value) < 2**53 else value
    if type(value).__name__ != kind:
        raise TypeError(f"{name}: {shown(value)!r} is no {kind}")
    if name in LIMITS and number_of(name, value) is None:
        raise ValueError("{}: got {}; from {:g} to {:g} is possible".format(name, shown(value), *LIMITS[name]))
    if name == "backend" and value not in ("", *BACKENDS):
        raise ValueError(f"backend: got {shown(value)}; {', '.join(BACKENDS)} are known here")
    if name == "outpaint" and not MARGINS.fullmatch(value):
        raise ValueError(f"outpaint: got {shown(value)!r}; four numbers with commas are needed")
    return value
