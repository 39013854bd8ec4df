"""The index of tar shards: where each sample's bytes lie, with hashes and captions, written once and shared by all processes."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from ldm.config.errors import UserError
from ldm.data import parquet_index, remote
from ldm.data.content import cache_folder
from ldm.data.index_file import DamagedIndex, IndexFile, Part, write
from ldm.data.shard_reader import ShardRecord, read_shard, shard_part
from ldm.data.storage import Stat, find_stats, is_url

NAME = "ldm-index.bin"
OLDER = "ldm-index.parquet"  # of formats before 3; it is read where the other is not there
READERS = 4  # shards that are read at once by the threads of one process

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One sample of an index."""

    key: str
    captions: tuple[str, ...]
    offset: int  # of the picture's bytes in the shard
    size: int
    hash: int


class Index:
    """Shard index: the samples of some shards, in the shards' order and in each by offset.

    Args:
        root: folder or URL that the shards' names are relative to.
        file: what knows them, and perhaps others.
        chosen: numbers of the shards in it.
    """

    def __init__(self, root: str, file: IndexFile, chosen: Sequence[int]) -> None:
        self.root, self.file, self._chosen = root, file, np.asarray(chosen, np.int64)
        self.shards: list[ShardRecord] = [file.records[number] for number in chosen]
        self.starts = np.concatenate([[0], np.cumsum([record.samples for record in self.shards])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def path(self, shard: int) -> str:
        """Of one shard."""
        return join(self.root, self.shards[shard].name)

    def shard_of(self, rows: Any) -> Any:
        """The numbers of the shards that rows lie in, in `shards`."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def name(self, row: int) -> str:
        """Shard and key of a sample."""
        return f"{self.shards[int(self.shard_of(row))].name}/{self.entry(row).key}"

    def column(self, name: str) -> NDArray[Any]:
        """A column (N,), mapped where the shards lie one behind the other in the file, as they do where it knows no others."""
        whole, first = self.file.column(name), self.file.starts[self._chosen]
        if (first + np.diff(self.starts) == np.append(first[1:], first[-1] + self.shards[-1].samples)).all():
            return whole[int(first[0]) : int(first[0]) + len(self)]
        return np.concatenate([whole[at : at + record.samples] for at, record in zip(first.tolist(), self.shards, strict=True)])

    def entry(self, row: int) -> Entry:
        """One sample.

        Raises:
            UserError: if its row is damaged.
        """
        shard = int(self.shard_of(row))
        number = int(self._chosen[shard])
        try:
            values, (key, *captions) = self.file.row(int(self.file.starts[number] + row - self.starts[shard]), number)
            offset, size = int(values["offset"]), int(values["size"])
            if not captions or offset + size > self.shards[shard].bytes:  # it may be a stranger's, as the shards are
                raise DamagedIndex(f"sample {row} has no captions, or lies outside its shard")
            return Entry(key, tuple(captions), offset, size, int(values["hash"]))
        except (DamagedIndex, ValueError) as error:
            raise _damaged(self.file.path, self.root, error) from None


def join(root: str, name: str) -> str:
    """A shard's path or URL."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else str(Path(root) / name)


def common_root(names: Sequence[str]) -> str:
    """The folder or URL that all names lie below."""
    folders = [name.rpartition("/")[0] if is_url(name) else os.path.dirname(os.path.abspath(name)) for name in names]
    if not is_url(names[0]):
        return os.path.commonpath(folders)
    parts = [folder.split("/") for folder in folders]
    same = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), min(map(len, parts)))
    return "/".join(parts[0][:same])


def place_of(root: str) -> Path:
    """Where the index of a root lies: beside the shards, or in the cache ($LDM_CACHE, ~/.cache/ldm) where that cannot be written."""
    beside = Path(root) / NAME
    if not is_url(root) and (beside.exists() or os.access(root, os.W_OK)):
        return beside
    return cache_folder() / f"index-{_named(root)}.bin"


def _named(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def open_index(
    path: str,
    *,
    renew: bool = False,
    verify: bool = False,
    file: Path | None = None,
    outside: bool = False,
    workers: int = 1,
    uploads: bool = False,
    on_shard: Callable[[ShardRecord, int, int], None] | None = None,
) -> Index:
    """Open or build the index of the shards that `path` means; shards that are not in it yet are read and added.

    What was read of a shard is kept at once, so that a call that was stopped is taken up, and calls at the same time, on several machines
    too, share the work.

    Args:
        path: as `ldm.data.storage.find` takes it.
        renew: read shards that have changed anew; if not, they are refused.
        verify: read all shards, and refuse one whose hash is not the index's.
        file: where the index is kept; None: as `place_of` says.
        outside: follow links in a folder that lead out of it.
        workers: processes that read.
        uploads: the index will be put beside the shards (`upload`), which is tried before any is read.
        on_shard: called with each shard that was read, its number and how many there are to read.

    Raises:
        UserError: for a shard that is missing, unreadable or changed, an index that is damaged, a path without shards, or a store that
            serves no ranges, or cannot be written where that is to be.
    """
    stats = find_stats(path, ".tar", outside)
    names = list(stats)
    root = common_root(names)
    if is_url(names[0]):
        try:
            remote.check_ranges(names[0])
        except OSError as error:
            raise UserError(f"data.path: {names[0]} cannot be read: {error.strerror or error}") from None
    if uploads:
        _try_upload(root)
    shorts = [name[len(root) :].lstrip("/") if is_url(name) else os.path.relpath(os.path.abspath(name), root) for name in names]
    builder = _Builder(root, file, workers, on_shard)
    while True:
        found = builder.load()
        known = {} if found is None else {record.name: n for n, record in enumerate(found.records)}
        todo: list[tuple[str, Stat]] = []
        for name, short in zip(names, shorts, strict=True):
            now = stats[name]
            old = found.records[known[short]] if found is not None and short in known else None
            if old is None or (renew and (old.bytes, old.mtime_ns) != (now.bytes, now.mtime_ns)):
                todo.append((short, now))
            elif old.bytes != now.bytes:
                raise UserError(
                    f"{name}: {now.bytes} bytes, but {old.bytes} when it was indexed with {old.samples} samples; fetch it again if it is "
                    f"damaged, or run `ldm data index {path}` if it was meant to change"
                )
            elif verify:
                builder.compare.append((old, now))
        builder.verify()
        if not todo and found is not None:
            return Index(root, found, [known[short] for short in shorts])
        if builder.fetch(todo):
            continue
        builder.add(found, todo)


def upload(index: Index) -> str:
    """Put an index beside its shards in their store, where other machines take it from; its URL.

    Raises:
        UserError: if the shards are in no store, or it refuses.
    """
    url = _beside(index.root)
    try:
        remote.put(index.file.path, url)
    except OSError as error:
        raise UserError(f"{url}: cannot be written ({error.strerror or error}); the index stays in {index.file.path}") from None
    return url


def _beside(root: str) -> str:
    if not is_url(root):
        raise UserError(f"--upload: is for shards in a store, and {root} is a folder; the index lies beside them there already")
    return join(root, NAME)


def _try_upload(root: str) -> None:
    """Write a small file beside the shards and remove it."""
    url = _beside(root)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tried"
        file.write_bytes(b"ldm data index --upload")
        try:
            remote.put(file, f"{url}.tried")
        except OSError as error:
            raise UserError(f"--upload: {url} cannot be written ({error.strerror or error}); leave it out, or get the right to") from None
    with suppress(OSError):  # it may be written, but not removed
        remote.remove(f"{url}.tried")


def _damaged(place: Path, root: str, error: Exception) -> UserError:
    return UserError(f"{place}: the index of {root} is damaged ({error}); remove it, and it is built anew")


class _Builder:
    """Builder of one index file.

    Args:
        root: what names of shards are relative to.
        file: the index, if not where `place_of` says.
        workers: processes that read shards; 1: threads of this one.
        on_shard: as `open_index` takes it.
    """

    def __init__(self, root: str, file: Path | None, workers: int, on_shard: Callable[[ShardRecord, int, int], None] | None) -> None:
        self.root, self.place, self.workers, self.on_shard = root, file or place_of(root), workers, on_shard
        self._older = [self.place] if file else [self.place.with_suffix(".parquet"), *([] if is_url(root) else [Path(root) / OLDER])]
        if file and parquet_index.is_one(file) and not os.access(file.parent, os.W_OK):
            self.place = cache_folder() / f"index-{_named(str(file.absolute()))}.bin"
        self.pieces = self.place.with_name(f".{self.place.name}.parts")
        self.compare: list[tuple[ShardRecord, Stat]] = []  # shards that are to be as they were
        self._fetched = not is_url(root) or file is not None  # whether the store's own was looked at

    def load(self) -> IndexFile | None:
        """The index as it is now; None: there is none. One of an older format is written anew."""
        place = self.place
        try:
            if not place.exists() or parquet_index.is_one(place):
                place = next((older for older in self._older if older.exists()), place)
                if not place.exists() or not self._converted(place):
                    return None
            return IndexFile(self.place)
        except OSError as error:
            raise UserError(f"{place}: the index cannot be read ({error.strerror or error})") from None
        except DamagedIndex as error:
            raise _damaged(place, self.root, error) from None

    def fetch(self, wanted: Sequence[tuple[str, Stat]]) -> bool:
        """Take the index that lies beside the shards in their store, where it knows one of those that are wanted; whether that was so."""
        if self._fetched:
            return False
        self._fetched = True
        url, copy = join(self.root, NAME), self.place.with_name(f".{self.place.name}.{uuid4().hex}")
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with remote.stream(url) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 2**22)
            known = {record.name: record.bytes for record in IndexFile(copy).records}
            if useful := any(known.get(short) == now.bytes for short, now in wanted):
                copy.replace(self.place)
                _log.info("%s: the index beside the shards, kept in %s", url, self.place)
            return useful
        except FileNotFoundError:
            return False
        except DamagedIndex as error:
            raise UserError(f"{url}: the index beside the shards is damaged ({error}); remove it, and it is built anew") from None
        except OSError as error:
            _log.warning("%s: cannot be read (%s); the shards are read instead", url, error.strerror or error)
            return False
        finally:
            with suppress(OSError):
                copy.unlink(missing_ok=True)

    def _converted(self, older: Path) -> bool:
        """Write an index of an older format anew; whether it had any shard."""
        pieces: list[Path] = []
        for number, part in enumerate(parquet_index.parts(older)):
            pieces.append(self.pieces / f"older{number}.{uuid4().hex}")
            self._write(pieces[-1], [partial(_same, part)])
        if pieces:
            _log.info("%s: of an older format, written anew as %s", older, self.place)
            self._write(self.place, [partial(_of_piece, piece) for piece in pieces])
        self._remove(pieces)
        return bool(pieces)

    def verify(self) -> None:
        """Read the shards of `compare`, which must be as they were."""
        tasks = [(partial(_summed, self.root, old.name, now), old) for old, now in self.compare]
        for number, (record, old) in enumerate(self._done(tasks), 1):
            if old.sha256 != record.sha256:
                raise UserError(
                    f"{join(self.root, record.name)}: its bytes are not those that were indexed ({record.samples} samples now, "
                    f"{old.samples} then); fetch it again, or run `ldm data index` without --verify if it was meant to change"
                )
            if self.on_shard is not None:
                self.on_shard(record, number, len(tasks))
        self.compare = []

    def add(self, found: IndexFile | None, todo: Sequence[tuple[str, Stat]]) -> None:
        """Read shards that the index lacks, and write it with them."""
        _log.info("%s: reading %d shards once; the index is kept in %s", self.root, len(todo), self.place)
        files = {short: self.pieces / _named(f"{short}\n{now.bytes}\n{now.mtime_ns}") for short, now in todo}
        turn = uuid4().int % max(1, len(todo))  # calls at the same time begin at different shards
        tasks = [(partial(_piece, self.root, short, now, files[short]), short) for short, now in (*todo[turn:], *todo[:turn])]
        for number, (record, _) in enumerate(self._done(tasks), 1):
            if self.on_shard is not None and record is not None:
                self.on_shard(record, number, len(todo))
        gives: dict[str, Callable[[], Part]] = {short: partial(_of_piece, files[short]) for short, _ in todo}
        if found is not None:
            gives = {record.name: partial(found.part, n) for n, record in enumerate(found.records)} | gives
        try:
            self._write(self.place, [gives[name] for name in sorted(gives)])
        except (FileNotFoundError, DamagedIndex):  # another call was faster, and has removed its pieces
            return
        self._remove(files.values())

    def _write(self, place: Path, parts: Sequence[Callable[[], Part]]) -> None:
        try:
            write(place, parts)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unwritable(place, error) from None

    def _remove(self, files: Iterable[Path]) -> None:
        for file in files:
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.pieces.rmdir()

    def _done(self, tasks: Sequence[tuple[Callable[[], Any], Any]]) -> Iterator[tuple[Any, Any]]:
        """Results as they come, each with what it is of."""
        if not tasks:
            return
        pool: Executor = ThreadPoolExecutor(READERS)
        if self.workers > 1:
            pool = ProcessPoolExecutor(min(self.workers, len(tasks)), multiprocessing.get_context("spawn"))
        try:
            running = {pool.submit(work): of for work, of in tasks}
            for future in as_completed(list(running)):
                yield future.result(), running.pop(future)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _unwritable(place: Path, error: OSError) -> UserError:
    return UserError(f"{place}: the index cannot be written ({error.strerror or error}); make room, or set LDM_CACHE to another folder")


def _same(part: Part) -> Part:
    return part


def _summed(root: str, short: str, now: Stat) -> ShardRecord:
    return read_shard(join(root, short), short, now)[0]


def _of_piece(file: Path) -> Part:
    return IndexFile(file).part(0)


def _piece(root: str, short: str, now: Stat, file: Path) -> ShardRecord:
    """Read a shard into an index of its own, unless that is there already."""
    try:
        return IndexFile(file).records[0]
    except (OSError, DamagedIndex):
        pass
    record, columns = read_shard(join(root, short), short, now)
    part = shard_part(record, columns)
    while True:
        try:
            write(file, [partial(_same, part)])
            return record
        except FileNotFoundError:  # another call is done, and has removed the folder
            continue
        except OSError as error:
            raise _unwritable(file.parent, error) from None
