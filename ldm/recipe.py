"""What a picture remembers of how it was made: text chunks in its PNG, for people, other programs and ourselves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.errors import UserError

PARAMETERS, OURS = "parameters", "ldm"  # the names of the chunks
SCHEMA = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a picture, given the model."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    rescale: float
    sampler: str
    spacing: str
    eta: float
    width: int  # px
    height: int  # px
    model: str  # the folder's name
    model_hash: str  # of its content

    def parameters(self) -> str:
        """The text that A1111's web UI writes and many programs read."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        values = {
            "Steps": self.steps, "Sampler": self.sampler, "CFG scale": self.guidance, "Seed": self.seed,
            "Size": f"{self.width}x{self.height}", "Model hash": self.model_hash[:10], "Model": self.model,
            "Version": f"ldm {__version__}",
        }  # fmt: skip
        lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items()))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the `ldm` chunk."""
        return {"schema": SCHEMA, "version": __version__, **asdict(self)}


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value


def save_picture(path: Path, pixels: Any, recipe: Recipe) -> None:
    """Write bytes (H,W,3) as a PNG with its recipe, whole or not at all; an existing file is never replaced.

    Raises:
        FileExistsError: if `path` is there already.
    """
    import os

    from PIL import Image, PngImagePlugin

    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(PARAMETERS, recipe.parameters())
    chunks.add_itxt(OURS, json.dumps(recipe.to_dict(), ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=chunks)
    try:
        os.link(temporary, path)  # fails where the name is taken, however late
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(str(path)) from None
        temporary.replace(path)
        return
    finally:
        temporary.unlink(missing_ok=True)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a PNG of ours.

    Raises:
        UserError: if the file is no such PNG.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = getattr(image, "text", {}).get(OURS)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from None
    if text is None:
        raise UserError(f"{path}: carries no recipe; only PNG files that ldm wrote do")
    try:
        values = json.loads(text)
        return Recipe(**{f.name: values[f.name] for f in fields(Recipe)})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: its recipe cannot be read ({error})") from None
