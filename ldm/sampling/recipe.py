"""Recipe: the metadata of a picture, all that decides it, as text chunks in its PNG, for people, other programs and ourselves."""

from __future__ import annotations

import json
import os
import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.version import __version__
from ldm.families.draws import Settings

PARAMETERS, OURS = "parameters", "ldm"  # the names of the chunks
XMP = "XML:com.adobe.xmp"
DESCRIPTION = 0x010E  # EXIF's field for text, where a format has no named ones
AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"  # IPTC's word for what a model made
ORIGIN = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
    f' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType="{AI_MADE}"/>'
    "</rdf:RDF></x:xmpmeta>"
)
SCHEMA = 1
NEGATIVE = "Negative prompt: "
NAMES = {  # our samplers under the names that other programs know
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
SCHEDULES = {"karras": "Karras", "exponential": "Exponential"}  # and of spacings
SPACINGS = ("trailing", "leading", "linspace", *SCHEDULES, "lcm")
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')  # as A1111's web UI reads its settings line


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
    source: str = ""  # what that picture was said to show then
    watermark: str = ""  # text hidden in the pixels
    loras: str = ""  # JSON: a list of {file, weight, hash}, merged into the model in this order
    embeddings: str = ""  # JSON: a list of {file, token, hash}, words that the model was taught
    classifier: str = ""  # SHA-256 of the file that guided it besides the prompt
    classifier_scale: float = 0.0  # and how strongly

    def parameters(self) -> str:
        """The text that A1111's web UI writes and many programs read."""
        lines = [self.prompt]
        if self.negative:
            lines.append(NEGATIVE + self.negative)
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


def read_recipe(path: Path) -> Recipe | dict[str, Any]:
    """The whole recipe in a PNG of ours; of other programs' pictures those of its fields that they tell.

    Raises:
        UserError: if the file is no picture, or carries no recipe.
    """
    return recipe_of(read_chunks(path), path)


def read_chunks(path: Path) -> dict[str, str]:
    """The texts that a picture file carries, by their names.

    Raises:
        UserError: if the file is no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            found = dict(getattr(image, "text", {}))
            if isinstance(comment := image.info.get("comment"), bytes):  # a GIF's
                found |= _from_comment(comment.decode("utf-8", "replace"))
            if image.format == "WEBP" and (said := image.getexif().get(DESCRIPTION)):
                found |= _from_comment(str(said))
            return {name: str(text) for name, text in found.items()}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'not a picture'}") from None
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None


def _from_comment(text: str) -> dict[str, str]:
    """Our chunk where a file has one text without a name."""
    return {OURS: text} if text.startswith('{"schema"') else {}


def recipe_of(text: dict[str, str], path: Path) -> Recipe | dict[str, Any]:
    """What `read_recipe` returns, of the texts of a file."""
    if OURS in text:
        return _ours(text[OURS], path)
    found = parse_parameters(text.get(PARAMETERS, ""))
    if not found:
        raise UserError(f"{path}: carries no recipe; PNG files that ldm or A1111's web UI wrote do, unless they were edited")
    return found


def _ours(text: str, path: Path) -> Recipe:
    try:
        values = json.loads(text)
        if values["schema"] > SCHEMA:
            raise UserError(f"{path}: its recipe was written by ldm {values['version']}; a newer ldm than this can read it")
        kinds: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
        known = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING} | values
        return Recipe(**{f.name: _typed(known[f.name], kinds[str(f.type)]) for f in fields(Recipe)})
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its recipe cannot be read ({type(error).__name__}: {error})") from None


def _typed(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def parse_parameters(text: str) -> dict[str, Any]:
    """The fields of a Recipe that A1111's `parameters` text tells; empty if it is none.

    Its last line holds the settings, and only counts as such with three pairs or more.
    """
    *lines, last = text.strip().split("\n")
    pairs = {name: _unquoted(value) for name, value in PAIR.findall(last)}
    if len(pairs) < 3:
        return {}
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE.strip())), len(lines))
    negative = "\n".join(lines[start:])[len(NEGATIVE.strip()) :].strip()
    found: dict[str, Any] = {"prompt": "\n".join(lines[:start]).strip(), "negative": negative}
    kinds: dict[str, tuple[str, type]] = {
        "Steps": ("steps", int),
        "CFG scale": ("guidance", float),
        "Seed": ("seed", int),
        "Denoising strength": ("strength", float),
        "Variation seed": ("variation_seed", int),
        "Variation seed strength": ("variation", float),
    }
    for name, (field, kind) in kinds.items():
        try:
            found[field] = kind(pairs[name])
        except (KeyError, ValueError):
            continue
    if size := re.fullmatch(r"(\d{1,5})x(\d{1,5})", pairs.get("Size", "")):
        found |= {"width": int(size[1]), "height": int(size[2])}
    sampler = pairs.get("Sampler", "")
    for spacing, theirs in SCHEDULES.items():
        if pairs.get("Schedule type") == theirs or sampler.endswith(f" {theirs}"):
            found["spacing"] = spacing
            sampler = sampler.removesuffix(f" {theirs}")
    ours = {theirs: name for name, theirs in NAMES.items()}
    if known := ours.get(sampler):
        found["sampler"] = known
    return found


def _unquoted(value: str) -> str:
    value = value.strip()
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value
