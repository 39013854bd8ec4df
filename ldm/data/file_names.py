"""File names of a data set: lookup as people write them, side pictures (masks, conditions), names that lead out of a folder."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # an allow-list: no other decoder ever runs (EPS would start Ghostscript)
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")  # of files in them
GLANCE = 10_000  # files that are looked at before a folder is taken for one of captioned pictures
# OneTrainer's names mean nothing else; the others are also words that a picture's own name may end with.
_OWN_MARK = re.compile(r"(.+)-(mask|cond)label\d?", re.IGNORECASE)
_MARKS = (
    *(
        "mask",
        "masks",
        "masked",
        "alpha",
        "matte",
        "trimap",
        "cond",
        "conditioning",
        "control",
        "canny",
        "depth",
        "normal",
        "pose",
        "openpose",
    ),
    *("dwpose", "seg", "segmap", "segmentation", "label", "lineart", "scribble", "sketch", "edge", "edges", "softedge", "hed", "mlsd"),
)
_MASKS = ("mask", "masks", "alpha", "matte")  # white where it counts: a trimap says more, and one that is inverted the opposite
_MARK = re.compile(rf"(.+)[-_.]({'|'.join(_MARKS)})(?:[-_.]?(\d{{1,2}}|inv|inverted))?", re.IGNORECASE)
_MARK_BEFORE = re.compile(rf"({'|'.join(_MARKS)})[-_.](.+)", re.IGNORECASE)
OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")  # @eaDir: Synology's thumbnails, which are pictures
_MASK_FOLDERS = ("mask", "masks", "alpha_masks", "mattes")
_FOLDERS = (  # _controls: ai-toolkit; conditioning_data: kohya's scripts
    *(*_MASK_FOLDERS, "_controls", "control", "controls", "control_images", "controlnet", "condition", "conditions"),
    *("conditioning", "conditioning_data", "conditioning_image", "conditioning_images", "trimap", "trimaps"),
    *("thumbnail", "thumbnails", "thumbs"),
)


def is_text(name: str) -> bool:
    """Whether a file's name is Unicode text, which other systems' names need not be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """A stranger's text for a terminal or a log: control codes and half characters are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def bare(folder: Path) -> bool:
    """Whether a folder has no picture, or pictures and nothing that could be their captions, as a glance at its files' suffixes tells."""
    pictures = others = False
    for count, name in enumerate(name for _, _, names in os.walk(folder) for name in names):
        known = split(name)[1] in SUFFIXES
        pictures, others = pictures or known, others or not known
        if (pictures and others) or count == GLANCE:
            return False
    return True


def hidden(name: str) -> bool:
    """Whether a path is one of those that systems put beside people's files: hidden ones, AppleDouble's `._x`, `__MACOSX/`, thumbnails
    and bins of network drives."""
    return any((part.startswith(".") and part not in (".", "..")) or part in OF_SYSTEMS for part in name.split("/"))


def split(name: str) -> tuple[str, str]:
    """Stem and lower-case suffix of a name, at the last dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.rpartition(".")
    return (folder + slash + stem, f".{suffix.lower()}") if dot and stem else (name, "")


class Names:
    """Lookup of names as people write them: exactly, else in another Unicode form or letter case, if only one fits.

    Args:
        names: what is there, each with what it stands for.
        bare: names may also be written without their suffix.
    """

    def __init__(self, names: Mapping[str, str], bare: bool = False) -> None:
        self._names = names
        self._rules: list[tuple[Callable[[str], str], Callable[[str], str]]] = [(_composed, _composed), (_folded, _folded)]
        self._rules += [(_bare, _folded)] if bare else []
        self._levels: dict[int, dict[str, str]] = {}  # of each rule, made when it is first needed, which is seldom

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.values())

    def find(self, name: str) -> str | None:
        """What a name stands for; None: nothing, or one of several."""
        if found := self._names.get(name):
            return found
        for number, (there, asked) in enumerate(self._rules if self._names else ()):
            if number not in self._levels:
                self._levels[number] = self._level(there)
            if found := self._levels[number].get(asked(name)):
                return found
        return None

    def _level(self, there: Callable[[str], str]) -> dict[str, str]:
        level: dict[str, str] = {}
        for name, value in self._names.items():
            key = there(name)
            level[key] = value if level.get(key, value) == value else ""  # several: none of them is meant
        return level


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()


def _bare(name: str) -> str:
    return split(_folded(name))[0]


@dataclass(frozen=True)
class SidePicture:
    """Side picture: one that another trainer keeps beside a picture, and which is no picture to learn from."""

    kind: str  # mask or condition
    of: str | None  # the picture that it belongs to; None: that is not here


def side_pictures(names: Iterable[str], captioned: Iterable[str] = ()) -> dict[str, SidePicture]:
    """Which of some pictures' names are those of side pictures.

    `x-masklabel.png` and `x-condlabel.png` (OneTrainer) always are. `x_mask.png`, `x.mask.png`, `x-depth.png`, `mask_x.png` and the
    like are where `x` is a picture too and they have no caption of their own; so are pictures in folders such as masks/, conditioning/
    and ai-toolkit's _controls/ of which an equal name lies in the folder above or in another one beside.

    Args:
        names: of pictures, with `/` between folders.
        captioned: those with a caption of their own.
    """
    listed, own = list(names), set(captioned)
    by_stem: dict[str, str] = {}
    for name in listed:
        stem = split(name)[0]
        by_stem.setdefault(stem.removesuffix(".src"), name)  # DreamBooth's x.src.jpg has its mask in x.mask.png
        by_stem[stem] = name
    found: dict[str, SidePicture] = {}
    rest = []
    for name in listed:
        folder, slash, last = split(name)[0].rpartition("/")
        if mark := _OWN_MARK.fullmatch(last):
            found[name] = SidePicture("mask" if mark[2].lower() == "mask" else "condition", by_stem.get(folder + slash + mark[1]))
        elif name not in own and (marked := _marked(last)) and (of := by_stem.get(folder + slash + marked[0])):
            found[name] = SidePicture("mask" if marked[1] in _MASKS else "condition", of)
        else:
            rest.append(name)
    inside = {name for name in rest if any(part.lower() in _FOLDERS for part in name.split("/")[:-1])}
    beside: dict[tuple[str, str], str] = {}  # the picture by its path without one of the folders, and that folder's place
    for name in rest if inside else ():
        if name not in inside:
            parts = split(name)[0].split("/")
            beside |= {("/".join(parts[:n]), "/".join(parts[n + 1 :])): name for n in range(len(parts) - 1)}
    for name in sorted(inside):
        parts = split(name)[0].split("/")
        at = next(n for n, part in enumerate(parts) if part.lower() in _FOLDERS)
        above, below = "/".join(parts[:at]), "/".join(parts[at + 1 :])
        direct = by_stem.get(f"{above}/{below}" if above else below)
        if of := direct if direct not in inside and direct else beside.get((above, below)):
            found[name] = SidePicture("mask" if parts[at].lower() in _MASK_FOLDERS else "condition", of)
    return found


def alike(names: Iterable[str], captioned: Iterable[str] = ()) -> list[str]:
    """What to say of pictures that are named as if they belonged to others: `x_gt.png` of most `x.png`, none with a caption of its own.

    No name says that they are side pictures, and so they are learned from.
    """
    listed, own = list(names), set(captioned)
    by_stem = {split(name)[0]: name for name in listed}
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in listed:
        found = _ENDING.fullmatch(split(name)[0])
        if found and name not in own and (of := by_stem.get(found[1])):
            groups.setdefault(found[2], []).append((name, of))
    most = {end: pairs for end, pairs in groups.items() if len(pairs) >= _FEW and 2 * len(pairs) > len(listed) - len(pairs)}
    return [
        f"{len(pairs):,} pictures are named like others with {end} behind it, such as {pairs[0][0]} and {pairs[0][1]};"
        " they are learned from, too: where they are masks or conditions, move them away"
        for end, pairs in most.items()
    ]


_FEW = 4
_ENDING = re.compile(r"(.+?)([-_.][^\W\d_][\w-]{0,30})")


def _marked(stem: str) -> tuple[str, str] | None:
    """The stem of the picture that a name's mark may belong to, and the mark."""
    if mark := _MARK.fullmatch(stem):
        return mark[1], f"{mark[2]}{mark[3] if mark[3] and not mark[3].isdigit() else ''}".lower()
    return (mark[2], mark[1].lower()) if (mark := _MARK_BEFORE.fullmatch(stem)) else None


def is_side_column(name: str) -> bool:
    """Whether a table's column of pictures is one of masks or conditions by its name, such as conditioning_image."""
    return any(word in _MARKS for word in re.split(r"[^a-z]+", name.lower()))


def leads_out(path: Path | str, root: Path | str) -> bool:
    """Whether a path, its links followed, lies outside a folder."""
    real, top = os.path.realpath(path), os.path.realpath(root)
    return real != top and not real.startswith(top.rstrip(os.sep) + os.sep)
