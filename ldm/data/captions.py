"""Captions from text files, cells of tables, and names of files and folders, normalised."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ldm.config.counts import plural
from ldm.data.images import Rejected

SIDECARS = (".txt", ".caption")
COLUMNS = ("text", "caption", "captions", "prompt", "TEXT")
MAX_CHARACTERS = 2000  # of one caption; the rest is cut
UNSEEN = ("Cf", "Zs")  # categories of characters that show nothing: joiners, soft hyphens, blanks
MAX_SIDECAR_BYTES = 2**20


def clean(text: str) -> str:
    """Normalised caption: one line, NFC, blanks joined, cut at MAX_CHARACTERS.

    Control characters and newlines become spaces; text-direction overrides, byte-order marks and lone surrogates go.
    The joiners that emoji and some scripts need stay, but do not make a caption alone.
    """
    text = unicodedata.normalize("NFC", text[: 4 * MAX_CHARACTERS])
    kept: list[str] = []
    for character in text:
        kind = unicodedata.category(character)
        if kind in ("Cc", "Zl", "Zp"):
            kept.append(" ")
        elif kind == "Cs" or character in "\ufeff\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
            continue
        else:
            kept.append(character)
    found = " ".join("".join(kept).split())[:MAX_CHARACTERS].strip()
    return found if any(unicodedata.category(character) not in UNSEEN for character in found) else ""


def cut_at_most(captions: Iterable[str]) -> str:
    """How many captions are cut by `clean`, in words; empty: none."""
    count = sum(len(text) >= MAX_CHARACTERS - 1 for text in captions)  # a blank at the end has gone
    return f"{plural(count, 'caption is', 'captions are')} cut at {MAX_CHARACTERS:,} characters" if count else ""


def decoded(data: bytes) -> str:
    """The text of bytes in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark or without one.

    Raises:
        UnicodeDecodeError: if they are none of these.
    """
    marked = next((form for mark, form in _MARKS if data.startswith(mark)), None)
    return data.decode(marked or _unmarked(data))


_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LAYOUT = frozenset(b"\t\n\r")


def _unmarked(data: bytes) -> str:
    """The encoding of bytes without a mark: of wide characters one byte in two, or three in four, would be control codes in UTF-8."""
    if not data.strip(b"\0"):
        return "utf-8-sig"
    if len(data) % 4 == 0:
        for form, (zero, small) in {"utf-32-le": (3, 2), "utf-32-be": (0, 1)}.items():
            if not any(data[zero::4]) and max(data[small::4]) <= 0x10:
                return form
    codes = frozenset(range(32)) - (frozenset() if b"\0" in data else _LAYOUT)  # high bytes of Indian scripts are tabs and newlines
    low = [sum(byte in codes for byte in half) / max(1, len(half)) for half in (data[0::2], data[1::2])]
    if len(data) % 2 == 0 and max(low) > 0.5 > min(low):
        return "utf-16-le" if low[1] > low[0] else "utf-16-be"
    return "utf-8-sig"


def sidecar(file: Path) -> tuple[str, ...]:
    """The captions of a text file, one per line that is not blank.

    Raises:
        Rejected: if it holds nothing that can be a caption.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_SIDECAR_BYTES + 1)
    except OSError as error:
        raise Rejected("unreadable caption", f"{file.name}: {error.strerror}") from None
    if len(data) > MAX_SIDECAR_BYTES:
        raise Rejected("caption too long", f"{file.name}: over {MAX_SIDECAR_BYTES} bytes")
    return text_captions(data, file.name)


def text_captions(data: bytes, name: str) -> tuple[str, ...]:
    """The captions in a text file's bytes, one per line that is not blank, at least one.

    Raises:
        Rejected: if they hold nothing that can be a caption.
    """
    try:
        lines = re.split(r"\r\n|\r|\n", decoded(data))
    except UnicodeDecodeError:
        raise Rejected("caption not UTF-8", name) from None
    if found := tuple(line for line in map(clean, lines) if line):
        return found
    raise Rejected("empty caption", name)


MARKS = re.compile(r"<\w{1,20}:[^<>]{1,100}>|\([^()]{1,100}:\d?\.\d{1,4}\)|\{[^{}|]{1,100}\|[^{}]{1,200}\}|\b__\w{1,60}__\b")


def prompt_marks(captions: Iterable[str]) -> str:
    """What to say of captions with marks that web UIs read in prompts, and which are words here; empty where there are none."""
    found = [(said[0], caption) for caption in captions if (said := MARKS.search(caption))]
    if not found:
        return ""
    mark, caption = found[0]
    have = plural(len(found), "caption has", "captions have")
    return f"{have} marks of prompts, such as {mark} in {caption[:60]!r}; in training they are words like others"


def caption_texts(value: object) -> tuple[str, ...]:
    """The captions in one entry of a table: a text, or a list of them; what is no text is none."""
    lines = (clean(text) for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))
    return tuple(dict.fromkeys(line for line in lines if line))


def from_name(image: Path) -> tuple[str, ...]:
    """The file name as a caption: `a_red-circle_012.png` says "a red circle".

    Raises:
        Rejected: if the name is a number only.
    """
    words = clean(re.sub(r"[\s_-]*\(?\d+\)?$", "", image.stem).replace("_", " ").replace("-", " "))
    if not words:
        raise Rejected("empty caption", f"the name {image.name!r} has no words")
    return (words,)


def from_folder(name: str) -> tuple[int, str] | None:
    """What kohya's scripts read from the folders of a picture's path: `10_sks dog/x.png` is seen 10 times an epoch and shows "sks dog".

    The innermost folder that is named so counts; None where there is none.
    """
    for folder in reversed(name.split("/")[:-1]):
        if found := re.fullmatch(r"(\d{1,6})_(.+)", folder):
            return int(found[1]), clean(found[2])
    return None
