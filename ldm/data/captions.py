"""Captions of picture folders: sidecar text files, metadata tables or file names, normalised."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from ldm.config.errors import UserError
from ldm.data import tables
from ldm.data.fields import ALIASES, Known, column_of, known
from ldm.data.images import Rejected

SIDECARS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNS = ("text", "caption", "captions", "prompt", "TEXT")
MAX_CHARACTERS = 2000  # of one caption; the rest is cut
MAX_SIDECAR_BYTES = 2**20


def clean(text: str) -> str:
    """Normalised caption: one line, NFC, blanks joined, cut at MAX_CHARACTERS.

    Control characters and newlines become spaces; text-direction overrides, byte-order marks and lone surrogates go.
    The joiners that emoji and some scripts need stay.
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
    return " ".join("".join(kept).split())[:MAX_CHARACTERS].strip()


def _text(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def sidecar(image: Path) -> tuple[str, ...]:
    """The captions of the text file beside an image, one per line that is not blank; none if there is no such file.

    Raises:
        Rejected: if the file is there but holds nothing that can be a caption.
    """
    for suffix in SIDECARS:
        file = image.with_suffix(suffix)
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_SIDECAR_BYTES + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Rejected("unreadable caption", f"{file.name}: {error.strerror}") from None
        if len(data) > MAX_SIDECAR_BYTES:
            raise Rejected("caption too long", f"{file.name}: over {MAX_SIDECAR_BYTES} bytes")
        return text_captions(data, file.name)
    return ()


def text_captions(data: bytes, name: str) -> tuple[str, ...]:
    """The captions in a text file's bytes, one per line that is not blank, at least one.

    Raises:
        Rejected: if they hold nothing that can be a caption.
    """
    try:
        lines = re.split(r"\r\n|\r|\n", _text(data))
    except UnicodeDecodeError:
        raise Rejected("caption not UTF-8", name) from None
    if found := tuple(line for line in map(clean, lines) if line):
        return found
    raise Rejected("empty caption", name)


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


@dataclass
class CaptionTable:
    """Metadata of a folder's tables, joined by image."""

    captions: dict[str, list[str]] = field(default_factory=dict)  # by file name below the root, in order of rows
    known: dict[str, Known] = field(default_factory=dict)  # sizes and scores by file name
    rejected: list[tuple[str, str, str]] = field(default_factory=list)  # row, reason, detail
    files: list[str] = field(default_factory=list)  # the metadata files that were read


def read_tables(root: Path, found: list[Path]) -> CaptionTable:
    """Read metadata.jsonl, .csv and .parquet files; `file_name` is relative to the file's own folder.

    An image in several rows has several captions, and so has one whose caption is a list. Columns of sizes and scores are
    read too, by any of the names in `ldm.data.fields.ALIASES`.

    Raises:
        UserError: if a file has no `file_name` or none of the caption columns, is not UTF-8, or is damaged parquet.
    """
    table = CaptionTable()
    for path in found:
        name = path.relative_to(root).as_posix()
        table.files.append(name)
        rows = _parquet(path, name) if path.suffix == ".parquet" else _lines(path, name, table)
        columns: set[str] = set().union(*(row for _, row in rows)) if rows else set()
        column = next((c for c in (*COLUMNS, column_of("caption", columns)) if c in columns), None)
        if rows and ("file_name" not in columns or column is None):
            raise UserError(
                f"{path}: needs the columns file_name and one of {', '.join(COLUMNS)}; "
                f"it has {', '.join(sorted(columns)) or 'none'}; rename the ones you mean"
            )
        for where, row in rows:
            if file := _take(table, root, path.parent, where, row.get("file_name"), row.get(column or "")):
                table.known[file] = known(row).over(table.known.get(file, Known()))
    return table


def _lines(path: Path, name: str, table: CaptionTable) -> list[tuple[str, dict[str, object]]]:
    try:
        text = _text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return _jsonl(text, name, table) if path.suffix == ".jsonl" else _csv(text, name, table)


def _parquet(path: Path, name: str) -> list[tuple[str, dict[str, object]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = {alias for aliases in ALIASES.values() for alias in aliases} | {"file_name", *(c.lower() for c in COLUMNS)}
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            found = list(tables.rows(file, [c for c in columns if c.lower() in wanted] or columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file ({str(error)[:200]}); write it again") from None
    return [(f"{name}:{number}", row) for number, row in enumerate(found, 1)]


def _jsonl(text: str, name: str, table: CaptionTable) -> list[tuple[str, dict[str, object]]]:
    rows: list[tuple[str, dict[str, object]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            table.rejected.append((f"{name}:{number}", "bad metadata row", str(error)[:200]))
            continue
        if isinstance(row, dict):
            rows.append((f"{name}:{number}", row))
        else:
            table.rejected.append((f"{name}:{number}", "bad metadata row", "not an object"))
    return rows


def _csv(text: str, name: str, table: CaptionTable) -> list[tuple[str, dict[str, object]]]:
    rows: list[tuple[str, dict[str, object]]] = []
    reader = csv.DictReader(io.StringIO(text.replace("\0", " "), newline=""))
    try:
        for row in reader:
            rows.append((f"{name}:{reader.line_num}", {k: v for k, v in row.items() if isinstance(k, str)}))
    except csv.Error as error:
        table.rejected.append((f"{name}:{reader.line_num}", "bad metadata row", str(error)))
    return rows


def _take(table: CaptionTable, root: Path, folder: Path, where: str, file: object, caption: object) -> str | None:
    if not isinstance(file, str) or not file.strip():
        table.rejected.append((where, "bad metadata row", "no file_name"))
        return None
    relative = Path(file.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts:
        table.rejected.append((where, "bad metadata row", f"{file!r} leads out of the folder"))
        return None
    name = (folder / relative).relative_to(root).as_posix()
    captions = table.captions.setdefault(name, [])
    for text in caption if isinstance(caption, list) else [caption]:
        if text is None:
            continue
        if not isinstance(text, str):
            table.rejected.append((where, "caption not text", f"{type(text).__name__} for {name}"))
            continue
        if (line := clean(text)) and line not in captions:
            captions.append(line)
    return name
