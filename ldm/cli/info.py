"""The info verb: the metadata of pictures, whether a model at hand is the one that drew them, and what models are told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.command import call
from ldm.config.errors import UserError
from ldm.sampling.picture_texts import COMFY, FORMATS, PARAMETERS, read_chunks
from ldm.sampling.recipe import AI_MADE, Recipe, recipe_of

Option = typer.Option


def main(words: Sequence[str]) -> int:
    """`ldm info PICTURE ...`: the exit code."""
    return call(info, words, "ldm info")


def info(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, or folders of models.")],
    model: Annotated[str, Option(help="A model to compare with; default: the newest of runs/*, if any.")] = "",
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per picture.")] = False,
) -> int:
    """Say what pictures and models tell: recipe, model, others' settings, watermarks. The exit code is 2 where one is unreadable."""
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

    if path.is_dir():
        if next(path.glob("*.png"), None) and not any((path / name).exists() for name in ("model", "stages", "unet", "model_index.json")):
            raise UserError(f"{path}: a folder of pictures, and no model; name the pictures, such as {path}/*.png")
        return about_model(path)
    chunks = read_chunks(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            found: dict[str, Any] = {"file": str(path), "width": image.width, "height": image.height, "format": image.format}
            pixels = image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise UserError(f"{path}: its pixels cannot be read ({' '.join(str(error).split())[:200]})") from None
    recipe = recipe_of(chunks, path)
    if isinstance(recipe, Recipe):
        found |= {"made_by": "ldm", "recipe": recipe.to_dict()}
        if at_hand:
            places = [place for place, said in at_hand.items() if said == recipe.model_hash]
            found["model_at_hand"] = places[0] if places else None
            found["models_compared"] = sorted(at_hand)
    elif recipe is not None:
        found |= {"made_by": recipe.program, "recipe": dict(recipe.fields), "unfollowed": [str(lost) for lost in recipe.unfollowed]}
    for name in (PARAMETERS, *COMFY):
        if name in chunks:
            found[name] = chunks[name]
    import numpy as np

    from ldm.sampling.watermark import seek

    found["watermark"] = seek(np.asarray(pixels))
    found["says_made_by_a_model"] = any(AI_MADE in text for text in chunks.values())
    return found


def about_model(path: Path) -> dict[str, Any]:
    """What a model folder, or a run folder with one, says of itself: how it was made, and what it is told when it draws.

    Raises:
        UserError: if there is no model in it.
    """
    from ldm.families.draws import BEFORE
    from ldm.formats.model_folder import read_record

    root = _folder(path)
    record = read_record(root)
    story = record.get("story", {})
    views = {
        each["condition"]["view"]: {"port": each["condition"]["port"]["kind"], **{k: v for k, v in each["kind"].items() if v}}
        for each in record.get("conditions", ())
    }
    return {
        "file": str(path),
        "model": story.get("name", path.name),
        "kind": record.get("kind", "latent_diffusion"),
        "data": story.get("data", ""),
        "defaults": record.get("defaults", {}),
        "after": about_model(root / BEFORE) if (root / BEFORE).is_dir() else None,
        "told": None if "kind" in record and not views else views,  # another kind of model tells that by its own configuration
    }


def _folder(name: Path | str) -> Path:
    """The model folder of a name; one that says no kind must have all parts of a pipeline.

    Raises:
        UserError: if there is no model.
    """
    from ldm.formats.model_folder import open_model, read_record, root_of

    root = root_of(name)
    return root if "kind" in read_record(root) else open_model(name).folder


def told(found: dict[str, Any]) -> str:
    """The same for people."""
    if "model" in found:
        return "\n".join(_model_lines(found))
    lines = [f"{found['file']}: {found['format']}, {found['width']}x{found['height']} px"]
    if "made_by" in found:
        lines.append(f"  made by {found['made_by']}")
        usual = {"schema", "prompt", "version"}
        recipe = found["recipe"]
        lines.append(f"  prompt: {recipe.get('prompt', '')}")
        shown = {name: value for name, value in recipe.items() if name not in usual and value not in ("", None)}
        width = max(map(len, shown), default=0)
        lines += [f"  {name:<{width}}  {value}" for name, value in shown.items()]
        lines += [f"  `--from` does not follow: {lost}" for lost in found.get("unfollowed", ())]
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


def _model_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['file']}: model {found['model']} of kind {found['kind']}"
    if found["data"]:
        yield f"  trained on {found['data']}"
    if found["defaults"]:
        yield "  drawn with " + ", ".join(f"{name} {value}" for name, value in found["defaults"].items())
    if before := found["after"]:
        drawn = ", ".join(f"{name} {value}" for name, value in before["defaults"].items())
        yield f"  after the model in {before['file']} of kind {before['kind']}" + f", drawn with {drawn}" * bool(drawn)
        yield from (line for line in _model_lines(before) if line.startswith("  after"))
    for view, kind in (found["told"] or {}).items():
        what = {"classes": f"{kind.get('channels')} classes: {', '.join(kind.get('names', []))}"}.get(kind["form"], kind["form"])
        yield f"  is told {view} ({what}) by port {kind['port']}: ldm sample --given {view}=FILE"
    if found["told"] == {}:
        yield "  is told nothing but prompts"


def _at_hand(model: str) -> dict[str, str]:
    """Content hashes of the model that is meant, or of those below runs/."""
    places = [Path(model)] if model else [file.parent for file in sorted(Path("runs").glob("*/model/model_index.json"))]
    found = {}
    for place in places:
        from ldm.formats.part import content_hash

        found[str(place)] = content_hash(_folder(place))
    return found
