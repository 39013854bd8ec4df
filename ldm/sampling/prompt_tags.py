"""Tags of the web UI in prompts, such as <lora:name:0.8>: what they name, and the words without them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ldm.config.errors import UserError
from ldm.sampling.prompt_files import Asked

TAG = re.compile(r"<(lora|lyco|hypernet):([^<>\r\n]{1,300})>")
ENDINGS = (".safetensors", ".pt", ".bin")  # of a LoRA's file; a folder of its name counts too
BOTH = ("te", "unet")  # names of the weights of the networks


@dataclass(frozen=True)
class Tag:
    """What a tag asks for."""

    text: str  # as it stands in the prompt
    kind: str
    name: str
    weight: float


def parted(prompt: str) -> tuple[str, tuple[Tag, ...]]:
    """A prompt's words without its tags, and the tags.

    Raises:
        UserError: for a tag whose weight cannot be applied.
    """
    tags = tuple(_tag(found) for found in TAG.finditer(prompt))
    return (TAG.sub("", prompt).strip() if tags else prompt), tags


def _tag(found: re.Match[str]) -> Tag:
    name, *said = found[2].split(":")
    named = dict(word.split("=", 1) for word in said if "=" in word)
    numbers = {*(word for word in said if "=" not in word), *(named.pop(network) for network in BOTH if network in named)}
    try:
        weights = {float(number) for number in numbers} or {1.0}
    except ValueError:
        weights = {math.nan}
    if len(weights) > 1 or named or not all(map(math.isfinite, weights)):
        raise UserError(f"prompt: {found[0]!r}: one weight of the whole LoRA is applied here, such as <lora:{name}:0.8>")
    return Tag(found[0], found[1], name, weights.pop())


def tagged(
    asked: Sequence[Asked], folder: Path | None, given: Sequence[str], tell: Callable[[str], None], literal: bool = False
) -> list[Asked]:
    """Prompts without their tags, each with the LoRAs that its own name.

    Args:
        folder: where LoRAs are looked for; None: tags are told and left out.
        given: LoRAs that are drawn with anyway, FILE or FILE:WEIGHT.
        tell: told what is left out, once each.
        literal: tags stand for themselves.

    Raises:
        UserError: for a name that no file or several files in the folder have, or a folder that no prompt needs.
    """
    if literal:
        found = list(asked)
    else:
        known = None if folder is None else _files(folder)
        said: dict[str, None] = {}
        found = [_without(one, folder, known, {Path(word.rpartition(":")[0] or word).stem for word in given}, said) for one in asked]
        for text in said:
            tell(text)
    if folder is not None and not any(one.loras for one in found):
        raise UserError(f"lora_dir: got {folder}, but no prompt names a LoRA, such as <lora:name:0.8>; leave it out, or use --lora FILE")
    return found


def _without(one: Asked, folder: Path | None, known: dict[str, list[Path]] | None, given: set[str], said: dict[str, None]) -> Asked:
    words, tags = parted(one.prompt)
    negative, unread = parted(one.negative or "")
    loras = []
    for tag in (*tags, *unread):
        if tag.kind == "hypernet" or tag in unread:
            said[f"prompt: {tag.text} is left out: {'no hypernetworks are' if tag.kind == 'hypernet' else 'no LoRA is'} applied there"] = (
                None
            )
        elif known is not None and folder is not None:
            loras.append(f"{_file(tag, folder, known)}:{tag.weight!r}")
        elif tag.name not in given:
            said[f"prompt: {tag.text} is left out; give --lora-dir DIR, or the file by --lora FILE:{tag.weight:g}"] = None
    return replace(one, prompt=words, negative=None if one.negative is None else negative, loras=tuple(loras))


def _files(folder: Path) -> dict[str, list[Path]]:
    """The LoRAs below a folder by name.

    Raises:
        UserError: if it is none.
    """
    if not folder.is_dir():
        raise UserError(f"lora_dir: {folder} is not a folder; give the one that your LoRAs are in")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.suffix in ENDINGS:
            found.setdefault(path.name if path.is_dir() else path.stem, []).append(path)
    return found


def _file(tag: Tag, folder: Path, known: dict[str, list[Path]]) -> Path:
    files = [path for path in known.get(tag.name, []) if path.is_file()] or known.get(tag.name, [])
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"prompt: {tag.text}: {len(files)} in {folder} are called so: {', '.join(map(str, files[:3]))}; give one by --lora")
    plain = tag.name.removesuffix(Path(tag.name).suffix if Path(tag.name).suffix in ENDINGS else "").lower()
    near = [name for name in known if name.lower() == plain] or get_close_matches(tag.name, known, 1)
    hint = f"; is {near[0]} meant?" if near else ""
    raise UserError(f"prompt: {tag.text}: no {tag.name[:80]}{ENDINGS[0]} in {folder}{hint}")
