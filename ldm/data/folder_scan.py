"""The scan of an image folder: one walk, one look at each picture, remembered in the cache as long as no file changes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import numpy as np

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import plain
from ldm.data.at_work import worked
from ldm.data.caption_tables import NEAR, CaptionTable, is_table, read_tables
from ldm.data.captions import SIDECARS, from_folder, from_name, sidecar
from ldm.data.content import ContentHashes, cache_folder
from ldm.data.fields import Known
from ldm.data.file_names import FORMATS, OF_SYSTEMS, SUFFIXES, Names, alike, is_text, leads_out, side_pictures, split
from ldm.data.folder_views import FolderViews, Layout, find_views
from ldm.data.images import FIRST, Rejected, header, read_file
from ldm.data.index_file import DamagedIndex, IndexFile, Part, ShardRecord, part_of, write
from ldm.data.photos import Rejection, held_out, remarks
from ldm.data.tags import affixed
from ldm.diffusion.batch import View

OTHER_IMAGES = (
    *(".eps", ".heic", ".heif", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".pdf", ".psd", ".psb", ".svg", ".xcf", ".kra"),
    *(".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".icns", ".dds", ".dib", ".exr", ".hdr", ".sgi", ".pcx"),
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv"),  # films, of which frames can be taken
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),  # of cameras
)
ARCHIVES = (".tar", ".gz", ".tgz", ".xz", ".zst", ".bz2", ".zip", ".7z", ".rar")
ABOUT = ("readme", "license", "licence", "notice", "credits", "classes", "sources")  # texts of a folder that are no captions
FORMAT = 4  # of what is remembered
_THREADS = 8
_BLOCK = 512  # pictures that a thread looks at before it reports
_ONCE = 2**24  # bytes of a file that is read as a whole; a longer one is hashed piece by piece
_IDLE = ("max_bad", "max_seconds", "path")  # settings that a scan does not depend on; the path counts by where it leads

_log = logging.getLogger(__name__)


class FolderSettings(Protocol):
    """Settings that a scan depends on (protocol): those of `ldm.data.folder.FolderSource`."""

    @property
    def path(self) -> str:
        """The folder."""
        ...

    @property
    def captions(self) -> str:
        """Where they come from."""
        ...

    @property
    def views(self) -> dict[str, str]:
        """By view where it lies."""
        ...

    @property
    def layout(self) -> Layout:
        """Of pairs."""
        ...

    @property
    def caption(self) -> str:
        """Of every picture, in place of its own."""
        ...

    @property
    def prefix(self) -> str:
        """Before every caption."""
        ...

    @property
    def suffix(self) -> str:
        """Behind every caption."""
        ...

    @property
    def val_share(self) -> float:
        """Share that is held out."""
        ...

    @property
    def min_side(self) -> int:
        """In px."""
        ...

    @property
    def max_pixels(self) -> int:
        """Of one image."""
        ...

    @property
    def crop(self) -> str:
        """`random` or `centre`."""
        ...

    @property
    def masks(self) -> str:
        """`none`, `beside` or `alpha`."""
        ...

    @property
    def outside(self) -> bool:
        """Whether links that lead out are followed."""
        ...


@dataclass
class Scan:
    """What a folder holds: its usable pictures by name, of both parts, and what else is there.

    Words of a row are its name, the hash of its content (and of its mask's), the file that is its mask or nothing, and its captions.
    """

    file: IndexFile
    views: FolderViews
    words: Mapping[str, Mapping[str, View]] = field(default_factory=dict)  # boxes, points and graph that tables tell, by picture

    @property
    def rejected(self) -> list[Rejection]:
        """What is left out, and why."""
        return [Rejection(*row) for row in self.file.told["rejected"]]

    def entry(self, row: int) -> list[str]:
        """The words of a row.

        Raises:
            UserError: if what is remembered of it is damaged.
        """
        try:
            return self.file.row(row, int(np.searchsorted(self.file.starts, row, side="right")) - 1)[1]
        except DamagedIndex as error:
            raise UserError(f"{self.file.path}: what is remembered of the folder is damaged ({error}); remove it") from None


_scans: WeakValueDictionary[str, Scan] = WeakValueDictionary()  # both parts of a data set share one
_looks: ContextVar[dict[tuple[str, bool], str] | None] = ContextVar("looks", default=None)


@contextmanager
def one_look() -> Iterator[None]:
    """Each folder is listed once, so that what is built in here sees it in one state, and in half the time."""
    token = _looks.set({})
    try:
        yield
    finally:
        _looks.reset(token)


def scan(source: FolderSettings, refuse: Callable[[Listing, int, list[Rejection], CaptionTable], None]) -> Scan:
    """What lies in a folder: remembered, or looked at anew where a name, a length or a time of modification is another.

    Args:
        refuse: called with what was found before it is remembered.

    Raises:
        UserError: if there is no such folder, or as `refuse`.
    """
    real = os.path.realpath(source.path)
    said = {name: value for name, value in plain(source).items() if name not in _IDLE}
    key = hashlib.blake2b(json.dumps([FORMAT, real, said]).encode("utf-8", "replace"), digest_size=12).hexdigest()
    digests = _looks.get()
    if digests is not None and (known := _scans.get(f"{key} {digests.get((real, source.outside))}")) is not None:
        return known
    listing = Listing(Path(source.path), source.outside)
    if digests is not None:
        digests[real, source.outside] = listing.digest
    whole = f"{key} {listing.digest}"
    if (known := _scans.get(whole)) is None:
        place = cache_folder() / f"folder-{key}.bin"
        known = _remembered(place, listing) or _looked(source, listing, place, refuse)
        _scans[whole] = known
    return known


def _remembered(place: Path, listing: Listing) -> Scan | None:
    try:
        file = IndexFile(place)
    except (OSError, DamagedIndex):
        return None
    return Scan(file, FolderViews(listing.root)) if file.told.get("listing") == listing.digest else None


_UNSEEN = (  # reason and detail of what a walk finds and does not follow
    ("link leads out", "of the folder; set data.outside=true to follow it"),
    ("link leads nowhere", "what it points at is gone, or a link in a circle"),
    ("unreadable file", "neither a file nor a folder"),
    ("unreadable folder", "it may not be read"),
)
_OUT, _NOWHERE, _ODD, _LOCKED = range(len(_UNSEEN))


class _State(NamedTuple):
    st_size: int
    st_mtime_ns: int


def no_folder(root: Path) -> str:
    """What is said of a folder that is not there."""
    return f"data.path: {root} is not a folder; give the folder that holds your images"


class Listing:
    """Files below a folder, by what they are for.

    Args:
        outside: follow links that lead out of the folder; if not, they are rejected, so that a stranger's folder shows nothing else.

    Raises:
        UserError: if there is no such folder.
    """

    def __init__(self, root: Path, outside: bool = False) -> None:
        if not root.is_dir():
            raise UserError(no_folder(root))
        self.root = root
        digest = hashlib.blake2b(digest_size=16)
        self._names: list[str] = []
        self._states = array("q")  # length and time of each; -1 and the place in _UNSEEN of what is not followed
        for name, status in _walk(str(root), "", set(), outside):
            size, time_ns = (-1, status) if isinstance(status, int) else (status.st_size, status.st_mtime_ns)
            digest.update(f"{name}\0{size}\0{time_ns}\0".encode("utf-8", "surrogateescape"))
            self._names.append(name)
            self._states.extend((size, time_ns))
        self.digest = digest.hexdigest()  # of all names, lengths and times

    def sort(self) -> None:
        """Tell the files apart by their names."""
        images: list[int] = []
        self.tables_found: list[str] = []
        self.near: list[str] = []  # that look like tables, and are not read
        self.archives: list[str] = []
        self.rejected: list[Rejection] = []
        texts: dict[str, dict[str, str]] = {suffix: {} for suffix in SIDECARS}
        for number, name in enumerate(self._names):
            stem, suffix = split(name)
            if self._states[2 * number] < 0:
                self.rejected.append(Rejection(_spelt(name), *_UNSEEN[self._states[2 * number + 1]]))
            elif not is_text(name):
                self.rejected.append(Rejection(_spelt(name), "name not UTF-8"))
            elif is_table(name.rpartition("/")[2]):
                self.tables_found.append(name)
            elif suffix in SUFFIXES:
                images.append(number)
            elif suffix in OTHER_IMAGES:
                self.rejected.append(Rejection(name, "format not supported", f"{suffix}; convert it to one of {', '.join(FORMATS)}"))
            elif suffix in texts:
                texts[suffix][stem] = name
            elif suffix.startswith(NEAR):
                self.near.append(name)
            elif suffix in ARCHIVES:
                self.archives.append(name)
        images.sort(key=self._names.__getitem__)
        self.images = [self._names[number] for number in images]
        self._states = array("q", (value for number in images for value in self._states[2 * number : 2 * number + 2]))
        self._names = []
        self._texts = [Names(found) for found in texts.values()]
        self.twice = sorted(set.intersection(*(set(found) for found in texts.values())))  # stems of several text files

    def state(self, number: int) -> _State:
        """Length and time of modification of one of `images`."""
        return _State(*self._states[2 * number : 2 * number + 2])

    def tables(self, source: FolderSettings) -> CaptionTable:
        """What the tables say, where they are asked for.

        Raises:
            UserError: if one cannot be understood.
        """
        asked = source.captions in ("auto", "metadata")
        return read_tables(self.root, sorted(self.tables_found), self.images) if asked else CaptionTable()

    def views(self, source: FolderSettings, table: CaptionTable) -> FolderViews:
        """Maps and annotations among the files and in tables.

        Raises:
            UserError: for what the source names and is not there.
        """

        def captioned(name: str) -> bool:
            return bool(table.captions.get(name) or self.text_of(name))

        alike = bool(source.caption) or source.captions in ("filename", "none")
        return find_views(self.root, self.images, source.views, source.layout, table.views, None if alike else captioned)

    def texts(self) -> set[str]:
        """All text files that may hold captions; not those that are about the folder."""
        return {name for texts in self._texts for name in texts if split(name.rpartition("/")[2])[0].lower() not in ABOUT}

    def text_of(self, name: str) -> str | None:
        """The text file beside an image, in letters of any case: x.txt of x.jpg, else x.jpg.txt, which downloaders write."""
        stems = (split(name)[0], name)
        return next((found for stem in stems for texts in self._texts if (found := texts.find(stem))), None)


@dataclass
class _Block:
    """What was seen of some pictures."""

    part: Part | None  # of those that are usable; None: none is
    names: list[str]
    rejected: list[Rejection]
    views: dict[str, Mapping[str, View]]
    several: list[str]  # names of those, of their masks and of their maps that are more than one picture
    contents: np.ndarray  # uint64, of the hash of each


class _Looker:
    """Looks at pictures: their headers, captions, masks, and what else is told of them.

    Args:
        masks: the file of each picture that has one.
    """

    def __init__(self, source: FolderSettings, found: Listing, table: CaptionTable, views: FolderViews, masks: Mapping[str, str]) -> None:
        self.source, self.found, self.table, self.views, self.masks = source, found, table, views, masks
        self.hashes = ContentHashes(found.root)

    def block(self, numbers: Sequence[int]) -> _Block:
        """Of some of the listing's images."""
        rows: list[tuple[float, ...]] = []
        words: list[list[str]] = []
        names: list[str] = []
        rejected: list[Rejection] = []
        views: dict[str, Mapping[str, View]] = {}
        several: list[str] = []
        contents: list[int] = []
        for number in numbers:
            name = self.found.images[number]
            try:
                row, said, told, more = self._one(name, number)
            except Rejected as error:
                rejected.append(Rejection(name, error.reason, error.detail))
                continue
            except OSError as error:
                rejected.append(Rejection(name, "unreadable file", str(error.strerror)))
                continue
            rows.append(row)
            words.append(said)
            names.append(name)
            contents.append(int.from_bytes(hashlib.blake2b(said[1].encode(), digest_size=8).digest()))
            if told:
                views[name] = told
            several += more
        if not rows:
            return _Block(None, names, rejected, views, several, np.zeros(0, np.uint64))
        column = {name: [row[n] for row in rows] for n, name in enumerate(COLUMNS)}
        numbers_of = {name: np.array(column[name], np.float32 if name in _FLOATS else np.uint64) for name in COLUMNS}
        record = ShardRecord(".", 0, 0, "", len(rows), sum(len(said) - _CAPTIONS for said in words))
        return _Block(part_of(record, numbers_of, words), names, rejected, views, several, np.array(contents, np.uint64))

    def _one(self, name: str, number: int) -> tuple[tuple[float, ...], list[str], Mapping[str, View], list[str]]:
        source, root = self.source, self.found.root
        times = _times(name) if source.captions == "kohya" else 1
        captions = [affixed(said, source.prefix, source.suffix) for said in _captions(self.found, name, source, self.table)]
        path, state, data = root / name, self.found.state(number), None
        if state.st_size <= _ONCE and not self.hashes.known(name, state):
            data = read_file(path)  # its header and its hash are made of one reading
        head = header(path if data is None else data, source.max_pixels)
        size = head.height, head.width
        told = self.table.known.get(name, Known()).over(Known(*size))
        size = (size[0], size[1] // 2) if source.layout == "ab" else size
        views = self.views.entries(name, size)
        if min(size) < source.min_side:
            raise Rejected("too small", f"{size[1]}x{size[0]}; at least {source.min_side} px")
        content = self.hashes.of(path if data is None else data, name, state)
        if mask := self.masks.get(name, ""):
            content += self.hashes.of(root / mask, mask, (root / mask).stat())
        row = (*size, told.height, told.width, told.aesthetic, told.watermark, times)
        beside = [file for file in (mask, *(files.get(name, "") for files in self.views.maps.values())) if file and self._several(file)]
        return row, [name, content, mask, *captions], views, [name] * head.several + beside

    def _several(self, name: str) -> bool:
        try:
            return header(self.found.root / name, self.source.max_pixels).several
        except (Rejected, OSError):
            return False  # it is told of when it is read


COLUMNS = ("height", "width", "original_height", "original_width", "aesthetic", "watermark", "times")
_FLOATS = ("aesthetic", "watermark")
_CAPTIONS = 3  # words of a row before them


def _looked(
    source: FolderSettings, found: Listing, place: Path, refuse: Callable[[Listing, int, list[Rejection], CaptionTable], None]
) -> Scan:
    """Look at everything; headers are checked in threads, and files that are new here are hashed."""
    found.sort()
    table = found.tables(source)
    views = found.views(source, table)
    rejected = [*found.rejected, *(Rejection(*row) for row in table.rejected)]
    rejected += [Rejection(name, "listed but missing") for name in sorted(set(table.absent))]
    names = [name for name in found.images if name not in views.files]
    captioned = {name for name in names if table.captions.get(name) or found.text_of(name)}
    side = side_pictures(names, captioned)
    masks = {kept.of: name for name, kept in sorted(side.items(), reverse=True) if kept.kind == "mask" and kept.of}
    masks = masks if source.masks == "beside" else {}
    used = set(masks.values())
    rejected += [
        Rejection(name, "side picture", f"a {kept.kind}" + f" of {kept.of}" * bool(kept.of))
        for name, kept in side.items()
        if name not in used
    ]
    looker = _Looker(source, found, table, views, masks)
    chosen = [number for number, name in enumerate(found.images) if name not in side and name not in views.files]
    blocks = list(worked(looker.block, [chosen[n : n + _BLOCK] for n in range(0, len(chosen), _BLOCK)], _THREADS))
    looker.hashes.save([*(found.images[number] for number in chosen), *used])
    rejected += [one for block in blocks for one in block.rejected]
    usable = [name for block in blocks for name in block.names]
    several = [name for block in blocks for name in block.several]
    twice = again(usable.__getitem__, np.concatenate([np.zeros(0, np.uint64), *(block.contents for block in blocks)]))
    refuse(found, len(usable), rejected, table)
    out = held_out(usable, source.val_share)
    parts = [block.part for block in blocks if block.part is not None]
    told = {
        "listing": found.digest,
        "tables": table.files,
        "notes": [
            *alike(usable, captioned),
            *_texts_unread(source, found, table, usable),
            *remarks((FIRST, name, 1) for name in several),
            *twice,
        ],
        "rejected": [(one.name, one.reason, one.detail) for one in rejected],
        "val": np.flatnonzero(out).tolist(),
    }
    words = {name: one for block in blocks for name, one in block.views.items()}
    own = bool(views.maps or views.words)  # these are many, and belong to no row
    file = _written(place, parts, told | {"parts": _parts(source, parts, out)}, keep=not own)
    return Scan(file, views, words)


def _parts(source: FolderSettings, parts: Sequence[Part], out: np.ndarray) -> dict[str, dict[str, object]]:
    """Of the training and the held-out part what depends on all of its pictures: its fingerprint, and counts."""
    digests, counts, masked = {}, dict.fromkeys(("train", "val"), 0), dict.fromkeys(("train", "val"), 0)
    for name in ("train", "val"):
        view_options = (name, source.val_share, source.crop, source.min_side, source.max_pixels)
        digests[name] = hashlib.sha256(json.dumps(["folder", 2, *view_options, source.masks]).encode())
        digests[name].update(json.dumps(source.layout).encode() if source.layout == "ab" else b"")
    row = 0
    for part in parts:
        starts = [*part.columns["text"].tolist(), len(part.texts)]
        for n, times in enumerate(part.columns["times"].tolist()):
            picture, content, mask, *captions = json.loads(part.texts[starts[n] + 4 : starts[n + 1]])
            name, often = ("val", 1) if out[row] else ("train", times)
            digests[name].update(json.dumps([picture, content, captions]).encode() * often)
            counts[name] += len(set(captions)) * often
            masked[name] += bool(mask) * often
            row += 1
    return {name: {"fingerprint": digests[name].hexdigest(), "captions": counts[name], "masks": masked[name]} for name in digests}


def _written(place: Path, parts: Sequence[Part], told: Mapping[str, object], keep: bool) -> IndexFile:
    """The rows as a file, in the cache where it can be, else without a name."""
    gives = [partial(_same, part) for part in parts]
    if keep:
        try:
            write(place, gives, told)
            return IndexFile(place)
        except OSError as error:
            _log.info("%s cannot be written (%s); the folder is looked at anew at every start", place, error.strerror)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "scan", gives, told)
            return IndexFile(Path(folder) / "scan")
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: cannot be written ({error.strerror or error}); make room, or set TMPDIR") from None


def _same(part: Part) -> Part:
    return part


def _captions(found: Listing, name: str, source: FolderSettings, table: CaptionTable) -> tuple[str, ...]:
    if source.caption or source.captions == "none":
        return (source.caption,)
    said: tuple[str, ...] = ()
    if source.captions in ("auto", "metadata"):
        said = tuple(table.captions.get(name, ()))
    if not said and source.captions in ("auto", "txt", "kohya") and (text := found.text_of(name)):
        said = sidecar(found.root / text)
    if not said and source.captions in ("auto", "metadata"):
        said = tuple(table.spare.get(name, ()))
    if not said and source.captions == "kohya" and (folder := from_folder(name)):
        said = (folder[1],)
    if source.captions == "filename":
        said = from_name(Path(name))
    if not said:
        raise Rejected("no caption")
    return said


def _times(name: str) -> int:
    """How often a picture in folders named as kohya's scripts have them is seen in an epoch.

    Raises:
        Rejected: as these scripts leave pictures out.
    """
    said = from_folder(name)
    if said is None:
        raise Rejected("no N_words folder", "captions=kohya reads pictures in folders such as '10_sks dog'")
    if not said[0]:
        raise Rejected("repeated 0 times")
    return said[0]


def _walk(root: str, prefix: str, visited: set[tuple[int, int]], outside: bool) -> Iterator[tuple[str, os.stat_result | int]]:
    """Every file below a folder, links followed once, hidden and __MACOSX ones left out; the place in _UNSEEN of what is not followed."""
    folder = os.path.join(root, prefix)
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as found:
            entries = sorted(found, key=attrgetter("name"))
    except OSError:
        yield prefix.rstrip("/") or ".", _LOCKED
        return
    for entry in entries:
        name = entry.name
        if name.startswith(".") or name in OF_SYSTEMS:
            continue
        try:
            if entry.is_file(follow_symlinks=False):
                yield prefix + name, entry.stat()
            elif entry.is_symlink() and not outside and leads_out(entry.path, root):
                yield prefix + name, _OUT
            elif entry.is_dir():
                yield from _walk(root, f"{prefix}{name}/", visited, outside)
            elif entry.is_file():
                yield prefix + name, entry.stat()
            else:
                yield prefix + name, _NOWHERE if entry.is_symlink() and not os.path.exists(entry.path) else _ODD
        except OSError:  # a link in a circle, or a file that has just gone
            yield prefix + name, _NOWHERE


def _texts_unread(source: FolderSettings, found: Listing, table: CaptionTable, usable: Sequence[str]) -> Iterator[str]:
    """What to say of text files that are not read, since others of their pictures are, or a table, or that have no picture; and of
    pictures that share one."""
    if source.caption or source.captions not in ("auto", "txt", "kohya"):
        return
    if found.twice:
        read, other = SIDECARS
        have = plural(len(found.twice), "picture has", "pictures have")
        yield f"{have} {read} and {other} files, such as {found.twice[0]}; {read} is read, {other} is not"
    first: dict[str, str] = {}  # by text file the first picture that has it
    shared: dict[str, list[str]] = {}
    listed: list[str] = []
    for name in usable:
        if (text := found.text_of(name)) is None:
            continue
        if (other := first.setdefault(text, name)) != name:
            shared.setdefault(text, [other]).append(name)
        if source.captions == "auto" and table.captions.get(name):
            listed.append(name)
    if listed:
        have = plural(len(listed), "picture has", "pictures have")
        yield f"{have} a caption in a table and a text file, such as {listed[0]}; the table is read, the file is not"
    if shared:
        text, names = next(iter(shared.items()))
        of = ", ".join(names[:3])
        those = plural(len(shared), "text file is that", "text files are those")
        yield f"{those} of several pictures that differ by their ending alone, such as {text} of {of}"
    if spare := found.texts() - first.keys():
        taken = {text for name in found.images if (text := found.text_of(name))}  # by pictures that are left out, too
        stems = {split(text)[0] for text in taken}
        spare = {text for text in spare - taken if split(text)[0] not in stems}
    if alone := sorted(spare):
        yield f"{plural(len(alone), 'text file belongs', 'text files belong')} to no picture here, such as {alone[0]}"


def again(name: Callable[[int], str], contents: np.ndarray) -> list[str]:
    """What to say of pictures that are the same file as another, which may be in the other part.

    Args:
        name: of a picture by its number.
        contents: uint64 (N,), one for each picture; equal where the files are.
    """
    order = np.argsort(contents, kind="stable")
    same = np.flatnonzero(contents[order[1:]] == contents[order[:-1]])
    if not len(same):
        return []
    at = same[order[same + 1].argmin()]
    pair = f"{name(int(order[at + 1]))} and {name(int(order[at]))}"
    return [f"{plural(len(same), 'picture is', 'pictures are')} the same file as another, such as {pair}; each is learned from"]


def _spelt(name: str) -> str:
    """A name as text, with the bytes that are none written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
