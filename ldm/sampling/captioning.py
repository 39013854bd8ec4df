"""Captioning: pictures below folders get the caption that a model writes, as text files beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm.config.errors import UserError
from ldm.data.captions import SIDECARS, clean
from ldm.data.file_names import SUFFIXES, printable, side_pictures, split
from ldm.data.folder_scan import Listing
from ldm.data.images import FIRST, Rejected, header, read_file, view
from ldm.families.draws import Wanted
from ldm.formats.part import write_whole

Tell = Callable[[str], None]


class Captioner(Protocol):
    """What writes captions of pictures."""

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, px, that it takes a picture of these sides in."""
        ...

    def write(self, pictures: Sequence[np.ndarray], seeds: Sequence[int]) -> list[str]:
        """A caption for each picture (H,W,3) uint8."""
        ...


@dataclass(frozen=True)
class OwnCaptioner:
    """A captioner that a run has trained: it sees pictures as in training, resized to cover its square and cropped."""

    family: Any
    settings: Wanted

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """The square that it has learned from."""
        side = self.family.defaults["size"]
        return side[0], side[1]

    def write(self, pictures: Sequence[np.ndarray], seeds: Sequence[int]) -> list[str]:
        """A caption for each picture, drawn by its seed where the temperature is above 0."""
        import torch

        image = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        return list(self.family.captions(image, seeds, self.settings))


@dataclass(frozen=True)
class Picture:
    """A picture, and the text file that is or will be beside it."""

    path: Path
    text: Path
    captioned: bool


def find(paths: Sequence[Path], tell: Tell) -> list[Picture]:
    """The pictures that are named or lie below folders, each once and in order of their names; masks and other side pictures are left out.

    Raises:
        UserError: for what is not there or no picture, or where there are none.
    """
    found: dict[Path, Picture] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_file() and path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: no picture; {', '.join(SUFFIXES)} are read")
        if path.is_file():
            texts = [path.with_suffix(suffix) for suffix in SIDECARS]
            there = [text for text in texts if text.exists()]
            found.setdefault(path, Picture(path, (there or texts)[0], bool(there)))
            continue
        listing = Listing(path)
        listing.sort()
        for rejection in listing.rejected:
            tell(f"{printable(str(rejection))}: left out")
        if listing.tables_found:
            tell(f"{path}: training reads {listing.tables_found[0]} before text files; set data.captions=txt to train on these")
        names = listing.images
        side = side_pictures(names, (name for name in names if listing.text_of(name)))
        for name in names:
            beside = listing.text_of(name)
            text = path / (beside or f"{split(name)[0]}.txt")
            if name not in side:
                found.setdefault(path / name, Picture(path / name, text, beside is not None))
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: no pictures here; {', '.join(SUFFIXES)} are read")
    first: dict[Path, Path] = {}
    for one in found.values():
        if first.setdefault(one.text, one.path) != one.path:
            tell(f"{one.path}: left out, {one.text.name} belongs to {first[one.text].name}, too; give one of them another name")
    return [one for one in found.values() if first[one.text] == one.path]


def caption(
    pictures: Sequence[Picture],
    captioner: Captioner,
    seeds: Sequence[int],
    *,
    batch: int,
    done: Callable[[Picture, str], None],
    advance: Callable[[int], None],
    tell: Tell,
) -> int:
    """Write a caption for each picture, and tell `done` of it at once; how many could not be read or got no words.

    Args:
        seeds: one for each picture.
        batch: pictures at a time, which changes nothing but speed and memory.
    """
    bad = 0
    for start in range(0, len(pictures), batch):
        part, pixels = [], []
        for one, seed in zip(pictures[start : start + batch], seeds[start : start + batch], strict=True):
            try:
                data = read_file(one.path)
                head = header(data)
                pixels.append(view(data, captioner.shape(head.height, head.width)).pixels)
                if head.several:
                    tell(f"{one.path}: {FIRST}")
                part.append((one, seed))
            except (Rejected, OSError) as error:
                bad += 1
                tell(f"{one.path}: left out, {printable(str(error))}")
        said = captioner.write(pixels, [seed for _, seed in part]) if part else []
        for (one, _), words in zip(part, map(clean, said), strict=True):
            if not words:
                bad += 1
                tell(f"{one.path}: left out, the model wrote no words")
            else:
                done(one, words)
        advance(len(pictures[start : start + batch]))
    return bad


def write(picture: Picture, words: str) -> None:
    """The caption beside a picture: the whole file or none."""
    write_whole(picture.text, f"{words}\n".encode())
