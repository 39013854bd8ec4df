"""Tables of captions in a picture folder: metadata.jsonl, .csv, .tsv, .json, .parquet, and the JSON files of kohya's scripts."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.data import tables
from ldm.data.captions import COLUMNS, clean, decoded
from ldm.data.fields import ALIASES, Known, column_of, known
from ldm.data.file_names import Names, is_text, printable
from ldm.data.folder_views import COLUMNS as VIEWS

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json", "metadata.parquet")
KOHYA = ("meta_lat.json", "meta_clean.json", "meta_cap_dd.json", "meta_cap.json")  # each holds what the ones behind it do, and more
FILES = ("file_name", "filename", "image_file", "image_path", "file", "filepath", "path", "image")  # columns that name the picture
WEIGHT = "caption_weight"  # column: how often a caption is drawn beside the picture's others
NEAR = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
_SEPARATORS = (",", ";", "\t", "|")

Row = tuple[str, Mapping[str, object]]  # file:line, and the columns


@dataclass
class CaptionTable:
    """Metadata of a folder's tables, joined by image."""

    captions: dict[str, list[str]] = field(default_factory=dict)  # by file name below the root, in order of rows
    spare: dict[str, list[str]] = field(default_factory=dict)  # of kohya's files, which were made from .txt files that may still be there
    known: dict[str, Known] = field(default_factory=dict)  # sizes and scores by file name
    weights: dict[str, list[float]] = field(default_factory=dict)  # of the captions, where column caption_weight tells them
    views: dict[str, dict[str, tuple[str, object]]] = field(default_factory=dict)  # by view and file name: the table's folder, the cell
    rejected: list[tuple[str, str, str]] = field(default_factory=list)  # row, reason, detail
    files: list[str] = field(default_factory=list)  # the metadata files that were read
    rows: int = 0
    absent: list[str] = field(default_factory=list)  # files of rows that are not there

    @property
    def unmatched(self) -> str:
        """What to say where tables were read and no row fits a picture; empty: some do, or there are none."""
        if not self.files or any(self.captions.values()) or any(self.spare.values()):
            return ""
        names = ", ".join(self.files)
        if not (self.absent or self.rejected):
            return f"{names} was read: {plural(self.rows, 'row')}, and no text in them" if self.rows else ""
        if not self.absent:
            where, reason, detail = self.rejected[0]
            odd = plural(len(self.rejected), "row is", "rows are")
            return f"{names} was read: {odd} unusable, the first is {where}: {reason}: {printable(detail)}"
        return (
            f"{names} was read: {plural(self.rows, 'row')}, and no file of theirs is here; the first is {printable(self.absent[0])};"
            " file_name is relative to the table's folder"
        )


def is_table(name: str) -> bool:
    """Whether a file is one of those that are read as tables of captions."""
    return name.lower() in (*TABLES, *KOHYA)


def read_tables(root: Path, found: Sequence[str], images: Sequence[str]) -> CaptionTable:
    """Read tables; `file_name` is relative to the file's own folder.

    An image in several rows has several captions, and so has one whose caption is a list. Columns of sizes and scores are
    read too, by any of the names in `ldm.data.fields.ALIASES`.

    Args:
        found: the tables below `root`.
        images: the pictures below `root`, whose names rows may have in another Unicode form or letter case, or without suffix.

    Raises:
        UserError: if a file has no `file_name` or none of the caption columns, is not text, or is damaged.
    """
    table = CaptionTable()
    if not found:
        return table
    there = Names({name: name for name in images}, bare=True)
    newest: dict[str, str] = {}
    for name in found:
        folder, _, last = name.rpartition("/")
        if last.lower() not in KOHYA:
            _read(table, root, name, there)
        elif folder not in newest or KOHYA.index(last.lower()) < KOHYA.index(newest[folder].rpartition("/")[2].lower()):
            newest[folder] = name
    for name, weights in table.weights.items():
        if len(set(weights)) > 1:
            table.captions[name] = [text for text, n in zip(table.captions[name], times(weights), strict=True) for _ in range(n)]
    for name in newest.values():
        _kohya(table, root, name, _json(root / name), there, images)
    return table


def _read(table: CaptionTable, root: Path, name: str, there: Names) -> None:
    path = root / name
    suffix = path.suffix.lower()
    if suffix == ".json":
        content = _json(path)
        if isinstance(content, dict) and content and _by_picture(content, there):
            _kohya(table, root, name, content, there, ())
            return
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            return  # some other file of this name
        rows: list[Row] = [(f"{name}:{number}", row) for number, row in enumerate(content, 1)]
    elif suffix == ".parquet":
        rows = _parquet(path, name)
    else:
        rows = list(_jsonl(_text(path), name, table) if suffix == ".jsonl" else _csv(path, name, table))
    table.files.append(name)
    columns: set[str] = set().union(*(row for _, row in rows)) if rows else set()
    file, caption = file_column(columns), caption_column(columns)
    if rows and (file is None or caption is None):
        raise UserError(
            f"{path}: needs the columns file_name and one of {', '.join(COLUMNS)}; "
            f"it has {printable(', '.join(sorted(columns)))[:300] or 'none'}; rename the ones you mean"
        )
    for where, row in rows:
        found = _find(table, root, name, where, row.get(file or ""), there)
        if found is not None:
            table.rows += 1
            captions = table.captions.setdefault(found, [])
            before = len(captions)
            _add(captions, row.get(caption or ""), table, where)
            _weigh(table, where, found, row.get(WEIGHT), len(captions) - before)
            for column, view in VIEWS.items():
                if (cell := row.get(column)) not in (None, ""):
                    table.views.setdefault(view, {})[found] = (name.rpartition("/")[0], cell)
            table.known[found] = known(row).over(table.known.get(found, Known()))


def _by_picture(content: Mapping[str, Any], there: Names) -> bool:
    """Whether an object has an object, or a text, for each picture; texts alone may be those of some other file."""
    if all(isinstance(value, dict) for value in content.values()):
        return True
    return all(isinstance(value, dict | str) for value in content.values()) and any(is_text(key) and there.find(key) for key in content)


def file_column(columns: set[str]) -> str | None:
    """The column that names the picture."""
    by_lower = {column.lower(): column for column in sorted(columns, reverse=True)}
    return next((by_lower[name] for name in FILES if name in by_lower), None)


def caption_column(columns: set[str]) -> str | None:
    """The column of captions."""
    return next((c for c in (*COLUMNS, column_of("caption", columns)) if c in columns), None)


def _text(path: Path) -> str:
    try:
        return decoded(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it or leave it out") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a whole JSON file ({tables.in_a_line(error)}); write it again") from None


def _parquet(path: Path, name: str) -> list[Row]:
    import pyarrow.parquet as pq

    wanted = {alias for aliases in ALIASES.values() for alias in aliases} | {*FILES, WEIGHT, *VIEWS, *(c.lower() for c in COLUMNS)}
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            found = list(tables.rows(file, [c for c in columns if c.lower() in wanted] or columns))
    except tables.reading_errors() as error:
        raise UserError(f"{path}: not a whole parquet file ({tables.in_a_line(error)}); write it again") from None
    return [(f"{name}:{number}", row) for number, row in enumerate(found, 1)]


def _jsonl(text: str, name: str, table: CaptionTable) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            table.rejected.append((f"{name}:{number}", "bad metadata row", tables.in_a_line(error)))
            continue
        if isinstance(row, dict):
            yield f"{name}:{number}", row
        else:
            table.rejected.append((f"{name}:{number}", "bad metadata row", "not an object"))


def _csv(path: Path, name: str, table: CaptionTable) -> Iterator[Row]:
    """Rows under the first line's names, in cells apart by the separator that gives these names.

    A row of more cells than names is no row: the text behind an unquoted separator would be lost. Nor is one whose quote is not
    closed: it would take the rows behind it along.

    Raises:
        UserError: where two columns have the name that counts.
    """
    lines = io.StringIO(_text(path).replace("\0", " "), newline="")
    separator = _separator(lines.readline())
    lines.seek(0)
    spaced = re.search(rf"{re.escape(separator)} ", lines.readline()) is not None  # a, "b": the quotes stand behind a blank
    lines.seek(0)
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=spaced)
    names: list[str] | None = None
    first = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            whole = f"lines {first} to {reader.line_num}" if reader.line_num > first else f"line {first}"
            table.rejected.append((f"{name}:{first}", "bad metadata row", f"{whole}: {error}; put a text with quotes into quotes, doubled"))
            first = reader.line_num + 1
            continue
        where, first = f"{name}:{first}", reader.line_num + 1
        if names is None:
            names = [cell.strip() for cell in cells]
            for column in (file_column({*names}), caption_column({*names})):
                if column is not None and names.count(column) > 1:
                    raise UserError(f"{path}: {names.count(column)} columns are called {column}; rename those that are not meant")
        elif cells and len(cells) > len(names):
            said = f'{len(cells)} cells for {len(names)} columns; put a text with commas into "quotes"'
            table.rejected.append((where, "bad metadata row", said))
        elif cells:
            yield where, dict(zip(names, cells, strict=False))


def _separator(header: str) -> str:
    """What lies between a header's names: the first that gives columns of files and captions."""
    for separator in _SEPARATORS:
        columns = {cell.strip().strip('"') for cell in header.split(separator)}
        if file_column(columns) and caption_column(columns):
            return separator
    return ","


def _kohya(table: CaptionTable, root: Path, name: str, content: Any, there: Names, images: Sequence[str]) -> None:
    """A JSON file of kohya's scripts: by picture (its path, or its name without suffix) `caption` and `tags`, joined as these do.

    A text stands for its caption.
    """
    if not isinstance(content, dict):
        table.rejected.append((name, "bad metadata row", "not an object by picture"))
        return
    table.files.append(name)
    anywhere = Names({image.rpartition("/")[2]: image for image in images}, bare=True)
    for key, told in content.items():
        where, row = f"{name}:{printable(key)[:80]}", {"caption": told} if isinstance(told, str) else told
        if not isinstance(row, dict):
            table.rejected.append((where, "bad metadata row", "not an object"))
            continue
        found = anywhere.find(key) if "/" not in key and "\\" not in key else None
        found = found or _find(table, root, name, where, key, there)
        if found is not None:
            table.rows += 1
            texts = [value for value in (row.get("caption"), row.get("tags")) if isinstance(value, str) and value.strip()]
            _add(table.spare.setdefault(found, []), ", ".join(texts), table, where)


def _find(table: CaptionTable, root: Path, name: str, where: str, file: object, there: Names) -> str | None:
    """The picture that a row names; None where there is none."""
    if isinstance(file, int) and not isinstance(file, bool):
        file = str(file)
    if not isinstance(file, str) or not file.strip():
        table.rejected.append((where, "bad metadata row", "no file_name"))
        return None
    short = _below(root, name.rpartition("/")[0], file) if is_text(file) else None
    if short is None:
        why = "leads out of the folder" if is_text(file) else "holds half a character"
        table.rejected.append((where, "bad metadata row", f"{file[:200]!r} {why}"))
        return None
    if (found := there.find(short)) is None:
        table.rows += 1
        table.absent.append(short)
    return found


def _add(captions: list[str], given: object, table: CaptionTable, where: str) -> None:
    """Add the captions in a cell: a text, or a list of them."""
    for text in given if isinstance(given, list) else [given]:
        if isinstance(text, bytes):  # parquet's column of bytes that nobody has marked as text
            try:
                text = decoded(text)
            except UnicodeDecodeError:
                table.rejected.append((where, "caption not UTF-8", "bytes"))
                continue
        if text is None:
            continue
        if not isinstance(text, str):
            table.rejected.append((where, "caption not text", type(text).__name__))
        elif (line := clean(text)) and line not in captions:
            captions.append(line)


def _weigh(table: CaptionTable, where: str, found: str, given: object, count: int) -> None:
    """Add the weights of a row's captions: a number for each, or one for all; 1 where there is none."""
    told = given if isinstance(given, list) else [given] * count
    numbers = [_positive(value) for value in told]
    if len(numbers) != count or None in numbers:
        table.rejected.append(
            (where, "bad caption weight", f"{str(given)[:100]}: {count} positive numbers are needed, of 1 to 100 in proportion")
        )
        numbers = [1.0] * count
    table.weights.setdefault(found, []).extend(number or 1.0 for number in numbers)


def _positive(value: object) -> float | None:
    if value is None or value == "":
        return 1.0
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 < number < float("inf") else None


def times(weights: Sequence[float]) -> list[int]:
    """How often captions stand in a list from which one is drawn, so that each is drawn by its weight: 1 to 100 times, most nearly."""
    top = max(weights)
    shares = [weight / top for weight in weights]

    def counts(most: int) -> list[int]:
        return [max(1, round(share * most)) for share in shares]

    def wrong(most: int) -> float:
        return max(abs(count / most - share) for count, share in zip(counts(most), shares, strict=True))

    return counts(min(range(1, 101), key=lambda most: (round(wrong(most), 4), most)))


def _below(root: Path, folder: str, file: str) -> str | None:
    """A row's file as a name below the root; None where it leads out of that."""
    written = file.strip().replace("\\", "/")
    if posixpath.isabs(written):
        for top in (root.absolute(), root.resolve()):
            if (inside := posixpath.normpath(written)).startswith(f"{top.as_posix().rstrip('/')}/"):
                return inside[len(top.as_posix().rstrip("/")) + 1 :]
        return None
    if ".." in written.split("/") or "\0" in written:
        return None
    return posixpath.normpath(posixpath.join(folder, written))
