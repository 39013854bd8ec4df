"""The info verb: the metadata of pictures, and whether a model at hand is the one that drew them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.sampling.recipe import AI_MADE, OURS, PARAMETERS, parse_parameters, read_chunks, recipe_of

Option = typer.Option
COMFY = ("prompt", "workflow")  # ComfyUI's chunks: what was run, and how its editor shows it
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom")


def main(words: Sequence[str]) -> int:
    """`ldm info PICTURE ...`: the exit code."""
    return call(info, words, "ldm info")


def info(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.")],
    model: Annotated[str, Option(help="A model to compare with; default: the newest of runs/*, if any.")] = "",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per picture.")] = False,
) -> int:
    """Say what pictures remember: recipe, model, other programs' settings, watermarks. The exit code is 2 where one cannot be read."""
    import sys

    failed = False
    at_hand = _at_hand(model)
    for path in pictures:
        try:
            found = about(path, at_hand)
        except UserError as error:
            failed = True
            print(f"ldm info: {error}", file=sys.stderr)
            continue
        print(json.dumps(found, ensure_ascii=False) if as_json else told(found), flush=True)
    return 2 if failed else 0


def about(path: Path, at_hand: dict[str, str] | None = None) -> dict[str, Any]:
    """All that a picture file tells.

    Args:
        at_hand: content hashes of models by where they lie.

    Raises:
        UserError: if it is no picture.
    """
    from PIL import Image

    chunks = read_chunks(path)
    with Image.open(path) as image:
        found: dict[str, Any] = {"file": str(path), "width": image.width, "height": image.height, "format": image.format}
        pixels = image.convert("RGB")
    if OURS in chunks:
        recipe = recipe_of(chunks, path)
        found |= {"made_by": "ldm", "recipe": recipe.to_dict()}  # type: ignore[union-attr]
        if at_hand:
            places = [place for place, said in at_hand.items() if said == recipe.model_hash]  # type: ignore[union-attr]
            found["model_at_hand"] = places[0] if places else None
            found["models_compared"] = sorted(at_hand)
    elif settings := parse_parameters(chunks.get(PARAMETERS, "")):
        found |= {"made_by": "a program that writes as Stable Diffusion web UI does", "recipe": settings}
    elif comfy := read_comfy(chunks):
        found |= {"made_by": "ComfyUI", "recipe": comfy}
    for name in (PARAMETERS, *COMFY):
        if name in chunks:
            found[name] = chunks[name]
    import numpy as np

    from ldm.sampling.watermark import seek

    found["watermark"] = seek(np.asarray(pixels))
    found["says_made_by_a_model"] = any(AI_MADE in text for text in chunks.values())
    return found


def read_comfy(chunks: dict[str, str]) -> dict[str, Any]:
    """What ComfyUI's graph says of its sampling, by the names of our recipes; nothing where it is no such graph."""
    try:
        nodes = json.loads(chunks.get("prompt", ""))
        sampler = next(node["inputs"] for node in nodes.values() if node["class_type"] in SAMPLERS)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return {}

    def text(name: str) -> str | None:
        link = sampler.get(name)
        for _ in range(8):  # through nodes that pass conditions on
            if not (isinstance(link, list) and link and isinstance(nodes.get(str(link[0])), dict)):
                return None
            inputs = nodes[str(link[0])].get("inputs", {})
            if isinstance(inputs.get("text"), str):
                return str(inputs["text"])
            link = next((value for key, value in inputs.items() if key.startswith("conditioning")), inputs.get("text"))
        return None

    found = {"prompt": text("positive"), "negative": text("negative"), "steps": sampler.get("steps"), "guidance": sampler.get("cfg")}
    found |= {"seed": sampler.get("seed", sampler.get("noise_seed")), "sampler": sampler.get("sampler_name")}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float)}


def told(found: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{found['file']}: {found['format']}, {found['width']}x{found['height']} px"]
    if "made_by" in found:
        lines.append(f"  made by {found['made_by']}")
        usual = {"schema", "prompt", "version"}
        recipe = found["recipe"]
        lines.append(f"  prompt: {recipe.get('prompt', '')}")
        shown = {name: value for name, value in recipe.items() if name not in usual and value not in ("", None)}
        width = max(map(len, shown), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in shown.items()]
    else:
        lines.append("  carries no recipe")
    if "model_at_hand" in found:
        place = found["model_at_hand"]
        compared = ", ".join(found["models_compared"])
        lines.append(f"  its model is here: {place}" if place else f"  its model is none of: {compared}")
    if found["watermark"]:
        lines.append(f"  watermark: {found['watermark']}")
    if found["says_made_by_a_model"]:
        lines.append("  says that a model made it (IPTC digital source type)")
    return "\n".join(lines)


def _at_hand(model: str) -> dict[str, str]:
    """Content hashes of the model that is meant, or of those below runs/."""
    places = [Path(model)] if model else [file.parent for file in sorted(Path("runs").glob("*/model/model_index.json"))]
    found = {}
    for place in places:
        from ldm.formats.model_folder import open_model
        from ldm.formats.part import content_hash

        found[str(place)] = content_hash(open_model(place).folder)
    return found
