"""Adapters of a finished model: LoRA files merged and textual inversion words taught before it draws, as recipes remember them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.families.draws import PLAIN, Draws

LONGEST = 100_000  # characters of what a recipe tells of LoRAs or words
MOST_WEIGHT = 1e6
FIELDS = ("loras", "embeddings")  # of a Recipe: JSON, a list of {file, weight, hash} and of {file, token, hash}
OPTIONS = {
    "loras": "lora",
    "embeddings": "embedding",
    "vae": "vae",
    "given": "given",
}  # that give what a recipe's field tells of, also JSON


def weighted(word: str) -> tuple[str, float]:
    """The file and the weight that FILE[:weight] names; 1 where it says none.

    Raises:
        UserError: for a weight that is no number within a million.
    """
    file, colon, number = word.rpartition(":")
    try:
        weight = float(number) if colon else None
    except ValueError:
        weight = None  # a colon of the file's name
    if weight is None:
        return word, 1.0
    if not file or not abs(weight) <= MOST_WEIGHT:
        raise UserError(f"lora: got {word!r}; FILE or FILE:WEIGHT is needed, such as lora.safetensors:0.8, at most {MOST_WEIGHT:g}")
    return file, weight


def with_adapters(
    folder: str,
    device: str,
    loras: Sequence[str],
    embeddings: Sequence[str],
    old: Mapping[str, Any],
    note: Callable[[str], None],
    factor: float = 1.0,
    vae: Path | None = None,
) -> tuple[Draws, dict[str, str]]:
    """A model with LoRAs and words, ready to draw, and the fields of a recipe that tell of them.

    The backend is that of the recipe that is followed. Arguments and errors as `add`'s.
    """
    from ldm.families.registry import open_finished

    family = open_finished(folder, device)
    added = add(family, loras, embeddings, old, note, factor) | decoded_by(family, vae, old, note)
    running = PLAIN.following(old)
    family.ready(Path(folder), running, "fp32")
    return family, added | {"backend": running.other}


def scaled(loras: str, factor: float) -> str:
    """A recipe's `loras` with all weights multiplied."""
    return json.dumps([{**one, "weight": one["weight"] * factor} for one in remembered({"loras": loras}, "loras")], ensure_ascii=False)


def add(
    family: Draws, loras: Sequence[str], embeddings: Sequence[str], old: Mapping[str, Any], note: Callable[[str], None], factor: float = 1.0
) -> dict[str, str]:
    """Merge LoRAs into a model and teach it words; returns the fields of a recipe that tell of them.

    Args:
        family: as `ldm.families.registry.open_finished` gave it.
        loras: FILE or FILE:WEIGHT.
        embeddings: files.
        old: a recipe that is followed where neither is given; its files must be where they were, with the same content.
        note: told where what is given is not what the recipe had.
        factor: of the LoRAs' weights.

    Raises:
        UserError: naming the file that is missing, has changed, or is for another model.
    """
    from ldm.formats.embedding_files import read_embedding
    from ldm.formats.lora_files import read

    before = {name: remembered(old, name, bool(given)) for name, given in zip(FIELDS, (loras, embeddings), strict=True)}
    wanted = [weighted(word) for word in loras] or [(_again(one, "lora"), float(one["weight"])) for one in before["loras"]]
    found = [(read(file), weight) for file, weight in wanted]
    words = [read_embedding(Path(file)) for file in embeddings or [_again(one, "embedding") for one in before["embeddings"]]]
    told: dict[str, list[dict[str, Any]]] = {
        "loras": [{"file": shown_path(file), "weight": w, "hash": lora.hash} for (lora, w), (file, _) in zip(found, wanted, strict=True)],
        "embeddings": [{"file": shown_path(word.name), "token": word.token, "hash": word.hash} for word in words],
    }
    for name in FIELDS:
        kept = [{**one, "file": ""} for one in before[name]]
        if kept and [{**one, "file": ""} for one in told[name]] != kept:
            given = (loras if name == "loras" else embeddings) or None
            if given is None:
                lost = next(a for a, b in zip(before[name], told[name], strict=True) if a["hash"] != b["hash"])
                raise UserError(f"from: {lost['file']} is not the file that the picture was drawn with; give that one by --{name[:-1]}")
            note(f"the picture was drawn with other {name}: it will differ")
    for lora, _ in found:
        for text in lora.notes:
            note(text)
    given_files = [("lora", lora.name, lora.hash) for lora, _ in found] + [("embedding", word.name, word.hash) for word in words]
    for kind, file, own in given_files:
        if own in family.merged:
            raise UserError(f"{kind}: {file}: the model was made with it and has it already; leave it out, or give its base by --model")
    for own in dict.fromkeys(lora.hash for lora, _ in found):
        same = [(lora.name, weight) for lora, weight in found if lora.hash == own]
        if len(same) > 1:
            also = "" if len({name for name, _ in same}) == 1 else f" ({', '.join(name for name, _ in same[1:])} is the same file)"
            note(f"lora: {same[0][0]} is given {len(same)} times{also}, so it is applied at {sum(weight for _, weight in same):g}")
    for lora, weight in found:
        if not weight:
            note(f"lora: {lora.name} has the weight 0, so it changes nothing; leave it out, or give it another weight")
    family.adapt([(lora, weight * factor) for lora, weight in found], words)
    fields = {name: json.dumps(values, ensure_ascii=False) if values else "" for name, values in told.items()}
    return fields | {"loras": scaled(fields["loras"], factor) if fields["loras"] else ""}


def told_of(loras: Sequence[str]) -> str:
    """The field of a recipe that tells of LoRAs, FILE or FILE:WEIGHT; empty without any.

    Raises:
        UserError: if one is missing.
    """
    from ldm.formats.atomic import sha256
    from ldm.formats.lora_files import find

    parts = [weighted(word) for word in loras]
    told = [{"file": shown_path(file), "weight": w, "hash": sha256(find(at_home(file)))} for file, w in parts]
    return json.dumps(told, ensure_ascii=False) if told else ""


def decoded_by(family: Draws, vae: Path | None, old: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, str]:
    """Put another autoencoder in the place of a model's; returns the field of a recipe that tells of it.

    Args:
        vae: a folder in diffusers' layout, or a file of weights; None: the recipe's, if it has one.

    Raises:
        UserError: naming what is missing, has changed, or is for another model.
    """
    before = remembered(old, "vae", vae is not None)
    if vae is None and not before:
        return {"vae": ""}
    path = Path(_again(before[0], "vae")) if vae is None else at_home(vae)
    if not path.exists():
        raise UserError(f"vae: {path}: No such file or directory")
    said = family.take_autoencoder(path, note)
    if before and before[0]["hash"] != said:
        if vae is None:
            raise UserError(f"from: {path} is not the autoencoder that the picture was drawn with; give that one by --vae")
        note("the picture was drawn with another autoencoder: it will differ")
    return {"vae": json.dumps([{"file": shown_path(str(vae or before[0]["file"])), "hash": said}], ensure_ascii=False)}


def told_shortly(fields: Mapping[str, str]) -> list[str]:
    """A few words for each of the LoRAs, words and views that a recipe's fields tell of."""
    loras = [f"{Path(one['file']).stem} {one['weight']:g}" for one in remembered(fields, "loras")]
    words = [str(one["token"]) for one in remembered(fields, "embeddings")]
    views = [f"the view {one['view']} of {one['file']}" for one in remembered(fields, "given")]
    return loras + words + [f"the autoencoder {Path(one['file']).stem}" for one in remembered(fields, "vae")] + views


def differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two recipes tell of other LoRAs or words, wherever their files lie."""
    first, second = ([[{**x, "file": ""} for x in remembered(recipe, name)] for name in OPTIONS] for recipe in (one, other))
    return first != second


def remembered(old: Mapping[str, Any], name: str, given: bool = False) -> list[dict[str, Any]]:
    """What a recipe tells of LoRAs, words or an autoencoder; nothing where it is damaged and others are `given`.

    Raises:
        UserError: if it is damaged.
    """
    text = old.get(name) or "[]"
    try:
        values = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, TypeError, RecursionError):
        values = None
    own = {"loras": "weight", "embeddings": "token", "vae": "file", "given": "weight"}[name]
    if isinstance(values, list) and all(isinstance(one, dict) and _told_of(one, own) for one in values):
        return [{**one, own: float(one[own])} if own == "weight" else one for one in values]
    if given:
        return []
    raise UserError(f"from: the recipe's {name} cannot be read; give the files by --{OPTIONS[name]}")


def _told_of(one: Mapping[str, Any], own: str) -> bool:
    """Whether a recipe's entry has the fields that it should, each of its type."""
    if not all(isinstance(one.get(key), str) and "\0" not in one[key] for key in ("file", "hash", *(("view",) if "view" in one else ()))):
        return False
    value = one.get(own)
    if own != "weight":
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST_WEIGHT


def refuse(old: Mapping[str, Any], verb: str) -> None:
    """Say of a recipe with a classifier that a verb cannot follow it.

    Raises:
        UserError: if it has one.
    """
    if old.get("classifier"):
        raise UserError(f"from: this picture was drawn with a classifier, which {verb} does not take; ldm sample does")


def _again(one: Mapping[str, Any], option: str) -> str:
    """The file that a recipe names.

    Raises:
        UserError: if it is not there.
    """
    if not Path(one["file"]).exists():
        raise UserError(f"from: this picture was drawn with {one['file']} (SHA-256 {one['hash'][:12]}), not here; give it by --{option}")
    return str(one["file"])


def shown_path(file: str) -> str:
    """A path as a picture may tell it: nothing of where this machine keeps its files."""
    path = Path(file)
    return path.name if path.is_absolute() or str(path).startswith("~") else str(path)
