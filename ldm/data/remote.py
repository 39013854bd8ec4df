"""Object stores through fsspec: s3, gs, http and others; what may pass is tried again for minutes, what is refused is told at once.

A store answers late, in part or not at all, and does so often where a thousand processes ask. So a failure has a kind. It passes: the
store is busy (429, 5xx), it is silent, the connection breaks, a body is shorter than its request. Or it stays: nothing is there (404),
access is refused (401, 403), a request is wrong.
"""

from __future__ import annotations

import email.utils
import errno
import glob
import io
import logging
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from ldm.config.errors import UserError

R = TypeVar("R")

PATIENCE_S = 300.0  # for which a request is tried again
WAIT_S, MOST_WAIT_S = 0.5, 30.0  # between two tries at first, doubling, and at most
CONNECT_S, SILENCE_S = 20.0, 30.0  # until a connection stands; without a byte
ASKED_AT_ONCE = 32  # requests for sizes
LISTED = 64  # files of one folder from which on it is listed
CHUNK = 2**24  # bytes of a request of a stream
OBJECTS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # have no folders: asked for one, they would make a bucket that a typo names
BUSY = (408, 425, 429)  # statuses that pass, beside those of 500 and more
_LASTING = (
    *(errno.ENOSYS, errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM, errno.EACCES, errno.ENOENT, errno.EISDIR, errno.ENOTDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.EROFS, errno.ELOOP, errno.EXDEV, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)
_BUSY_WORDS = (
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "InternalError",
    "OperationAborted",
)

_log = logging.getLogger(__name__)
_lock, _asked = threading.Lock(), 0


class ShortRead(OSError):
    """A body that ended before its request was answered."""


@dataclass(frozen=True)
class Failure:
    """Failed request: what is said of it, whether it may pass, and how long the store asks to wait."""

    what: str
    passes: bool
    status: int = 0  # of HTTP; 0: there was no answer
    after_s: float = 0.0

    def error(self, more: str = "") -> OSError:
        """As an error of files."""
        kind = {404: errno.ENOENT, 410: errno.ENOENT, 401: errno.EACCES, 403: errno.EACCES}.get(self.status, errno.EIO)
        return OSError(kind, self.what + more)


def under_way() -> bool:
    """Whether a request is being answered or tried again in this process; it ends by itself, within PATIENCE_S and a little."""
    return _asked > 0


@contextmanager
def _counted() -> Iterator[None]:
    global _asked
    with _lock:
        _asked += 1
    try:
        yield
    finally:
        with _lock:
            _asked -= 1


def tried(name: str, request: Callable[[], R], patience_s: float | None = None) -> R:
    """The answer to a request, made again while it fails in a way that may pass.

    Args:
        name: of what is asked for, for messages.
        patience_s: from the first try; None: PATIENCE_S.

    Raises:
        OSError: that it is refused, at once; or when patience ends, with how often it was tried.
    """
    began, wait, tries = time.monotonic(), WAIT_S, 0
    until = began + (PATIENCE_S if patience_s is None else patience_s)
    with _counted():
        while True:
            tries += 1
            try:
                return request()
            except UserError:
                raise
            except Exception as error:
                failure = failure_of(error)
                if failure is None:
                    raise
                if not failure.passes:
                    raise failure.error() from None
                pause = max(failure.after_s, wait * random.uniform(0.5, 1))  # so that a thousand processes do not come back at once
                if time.monotonic() + pause > until:
                    raise failure.error(f"; tried {tries} times in {time.monotonic() - began:.0f} s") from None
                if tries in (1, 4):
                    _log.warning("%s: %s; tried again for up to %.0f s", name, failure.what, until - time.monotonic())
                time.sleep(pause)
                wait = min(2 * wait, MOST_WAIT_S)


def failure_of(error: BaseException) -> Failure | None:
    """What kind of failure an exception of fsspec or of a package below it is; None: none of theirs, but a mistake in a program.

    The deepest cause that tells something decides: packages say "not found" of whatever they could not look at.
    """
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    for each in reversed(chain):
        status, headers, words = _answer(each)
        if status:
            passes = status in BUSY or (status >= 500 and status != 501) or any(word in words for word in _BUSY_WORDS)
            said = f"{status} {_STATUS.get(status, words or 'refused')}"
            return Failure(said, passes, status, _after(headers) if passes else 0.0)
    for each in reversed(chain):
        if (found := _silent(each)) is not None:
            return found
    if isinstance(error, (OSError, ValueError, RuntimeError)) or type(error).__module__.partition(".")[0] in _PACKAGES:
        return _plain(error)
    return None


_PACKAGES = ("aiohttp", "botocore", "aiobotocore", "s3fs", "gcsfs", "google", "requests", "fsspec")
_STATUS = {
    401: "not authorised",
    403: "access refused",
    404: "not found",
    416: "shorter than it was",
    429: "too many requests",
    500: "internal error",
    502: "bad gateway",
    503: "service unavailable",
    504: "gateway timeout",
}


def _answer(error: BaseException) -> tuple[int, Mapping[str, str], str]:
    """Status, headers and the store's word that an exception bears; status 0: none."""
    if (aiohttp := sys.modules.get("aiohttp")) is not None and isinstance(error, aiohttp.ClientResponseError):
        return int(error.status), error.headers or {}, error.message
    if (boto := sys.modules.get("botocore.exceptions")) is not None and isinstance(error, boto.ClientError):
        about, code = error.response.get("ResponseMetadata", {}), str(error.response.get("Error", {}).get("Code", ""))
        status = int(about.get("HTTPStatusCode", 0)) or (int(code) if code.isdecimal() else 400)
        return status, about.get("HTTPHeaders", {}), code
    if (gcs := sys.modules.get("gcsfs.retry")) is not None and isinstance(error, gcs.HttpError) and str(error.code).isdecimal():
        return int(error.code), {}, str(error.message)
    return 0, {}, ""


def _silent(error: BaseException) -> Failure | None:
    """A failure without an answer that may pass, or a lack of keys; None: it is neither."""
    said = str(error) or type(error).__name__
    if isinstance(error, ShortRead):
        return Failure(str(error.strerror), True)
    if isinstance(error, TimeoutError):
        return Failure("no answer in time", True)
    if isinstance(error, ConnectionError):
        return Failure(f"connection lost ({error.strerror or said})", True)
    kinds: tuple[type[BaseException], ...] = ()
    if (aiohttp := sys.modules.get("aiohttp")) is not None:
        if isinstance(error, (aiohttp.InvalidURL, aiohttp.ClientSSLError)):
            return Failure(said, False)
        kinds += (aiohttp.ClientError,)
    if (boto := sys.modules.get("botocore.exceptions")) is not None:
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            return Failure(f"{said}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE", False)
        kinds += (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)
    if (requests := sys.modules.get("requests")) is not None:
        kinds += (requests.exceptions.ConnectionError, requests.exceptions.Timeout, requests.exceptions.ChunkedEncodingError)
    if isinstance(error, kinds):
        return Failure(f"connection failed ({said.partition(' [')[0][:200]})", True)
    return None


def _plain(error: BaseException) -> Failure:
    if isinstance(error, FileNotFoundError):
        return Failure("not found", False, 404)
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return Failure(f"access refused ({error})"[:300], False, 403)
    if isinstance(error, OSError) and error.errno is not None:
        return Failure(error.strerror or str(error), error.errno not in _LASTING)
    return Failure(f"{type(error).__name__}: {error}"[:300], False)


def _after(headers: Mapping[str, str]) -> float:
    """The seconds of Retry-After, a number or a date; at most MOST_WAIT_S."""
    told = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    seconds = float(told) if told.isdecimal() else 0.0
    if told and not told.isdecimal() and (date := email.utils.parsedate_tz(told)) is not None:
        seconds = email.utils.mktime_tz(date) - time.time()
    return min(max(seconds, 0.0), MOST_WAIT_S)


def system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        UserError: if its protocol is unknown or the package for it is missing.
    """
    try:
        import fsspec
    except ImportError:
        raise UserError(f'{url} cannot be opened: fsspec is missing; python -m pip install "ldm-train[data]"') from None
    protocol = url.partition("://")[0].lower()
    try:
        found, path = fsspec.core.url_to_fs(url, **_limits(protocol))
        return found, str(path)
    except (ImportError, ValueError) as error:
        raise _unopened(url, error) from None


def _unopened(url: str, error: Exception) -> UserError:
    protocol = url.partition("://")[0].lower()
    extra = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http", "gs": "gcs", "gcs": "gcs"}.get(protocol)
    fix = f'; python -m pip install "ldm-train[{extra}]"' if extra and isinstance(error, ImportError) else ""
    return UserError(f"{url} cannot be opened: {error}{fix}")


def lacking(url: str) -> UserError | None:
    """That the protocol of a URL is unknown or the package for it is missing, without asking the store."""
    try:
        import fsspec

        fsspec.get_filesystem_class(url.partition("://")[0].lower())
    except (ImportError, ValueError) as error:
        return _unopened(url, error)
    return None


def _limits(protocol: str) -> dict[str, Any]:
    """Options by which a silent store is a failure, which fsspec and the packages below it do not have by themselves."""
    if protocol in ("http", "https"):
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S)}}
    if protocol in ("s3", "s3a"):
        silent = {"connect_timeout": CONNECT_S, "read_timeout": SILENCE_S, "retries": {"max_attempts": 1}}
        return {"config_kwargs": silent | {"max_pool_connections": 64}}
    return {}


def size(url: str, patience_s: float | None = None) -> int:
    """Bytes of a file.

    Raises:
        OSError: if it is not there or refused.
    """

    def ask() -> int:
        files, path = system(url)
        files.invalidate_cache(files._parent(path))  # what it was when it was listed is not what it is
        told = files.info(path).get("size")
        if told is None:
            raise OSError(errno.EINVAL, "the server does not tell its length, nor serve parts of it; shards need one that does")
        return int(told)

    return tried(url, ask, patience_s)


def check_ranges(url: str) -> None:
    """Ask a web server for one byte, without taking more where it sends all.

    Raises:
        OSError: if it sends more: it serves no parts of files.
    """
    if url.partition("://")[0].lower() not in ("http", "https"):
        return

    def ask() -> None:
        from fsspec.asyn import sync

        files, path = system(url)

        async def status() -> int:
            session = await files.set_session()
            async with session.get(files.encode_url(path), headers={"Range": "bytes=0-0"}) as answer:
                answer.raise_for_status()
                return int(answer.status)

        if sync(files.loop, status) == 200:
            raise OSError(errno.EINVAL, "the server knows no Range requests, by which samples are read; serve shards by one that does")

    tried(url, ask)


def read(url: str, offset: int, count: int, patience_s: float | None = None) -> bytes:
    """`count` bytes from `offset`, by one request.

    Raises:
        OSError: if it is not there, refused, or has not so many bytes.
    """

    def ask() -> bytes:
        files, path = system(url)
        data = bytes(files.cat_file(path, start=offset, end=offset + count))
        if len(data) > count:
            raise OSError(errno.EINVAL, f"the server sends {len(data)} bytes where {count} are asked for: it knows no Range requests")
        if len(data) < count:
            if (whole := files.info(path).get("size")) is not None and whole < offset + count:
                raise OSError(errno.EINVAL, f"it has {whole} bytes, and had more when it was indexed")
            raise ShortRead(errno.EIO, f"{len(data)} of {count} bytes came")
        return data

    return tried(url, ask, patience_s) if count else b""


def put(file: Path, url: str, patience_s: float | None = None) -> None:
    """Copy a local file into a store, whole or not at all.

    Raises:
        OSError: if it is refused, or the copy has another length.
    """

    def ask() -> None:
        files, path = system(url)
        if url.partition("://")[0].lower() not in OBJECTS:
            files.makedirs(files._parent(path), exist_ok=True)
        files.put_file(str(file), path)
        files.invalidate_cache(files._parent(path))
        if (there := files.info(path).get("size")) != (here := file.stat().st_size):
            raise ShortRead(errno.EIO, f"{there} of {here} bytes are there")

    tried(url, ask, patience_s)


def get(url: str, file: Path) -> None:
    """Copy a file from a store, by large requests.

    Raises:
        OSError: if it is not there or refused, or as the disk says.
    """
    with stream(url) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target, CHUNK)


def remove(url: str) -> None:
    """Remove a file, or all below a folder; what is not there is no failure.

    Raises:
        OSError: if it is refused.
    """

    def ask() -> None:
        files, path = system(url)
        files.invalidate_cache()
        files.rm(path, recursive=True)

    with suppress(FileNotFoundError):
        tried(url, ask)


class Stream(io.RawIOBase):
    """A file in a store from its beginning, by large requests; the next one is under way while one is read."""

    def __init__(self, url: str) -> None:
        self._url, self._size, self._at = url, size(url), 0
        self._chunk, self._within = b"", 0
        self._pool = ThreadPoolExecutor(1)
        self._next = self._ask()

    def _ask(self) -> Any:
        count = min(CHUNK, self._size - self._at)
        self._at += count
        return self._pool.submit(partial(read, self._url, self._at - count, count)) if count > 0 else None

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As a file's."""
        if self._within == len(self._chunk):
            if self._next is None:
                return 0
            self._chunk, self._within = self._next.result(), 0
            self._next = self._ask()
        count = min(len(buffer), len(self._chunk) - self._within)
        buffer[:count] = self._chunk[self._within : self._within + count]
        self._within += count
        return count

    def close(self) -> None:
        """Let go."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()


def stream(url: str) -> BinaryIO:
    """A file from its beginning.

    Raises:
        OSError: if it is not there or refused.
    """
    return cast("BinaryIO", io.BufferedReader(Stream(url), 2**16))


def each(work: Callable[[Any], R], of: Sequence[Any]) -> list[R]:
    """Results of requests made at the same time, in order.

    Raises:
        Exception: as the first that fails.
    """
    if len(of) < 2:
        return [work(one) for one in of]
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(of))) as pool:
        try:
            return list(pool.map(work, of))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def listed(url: str, suffix: str) -> dict[str, int]:
    """The files that a URL with a star means, or all `suffix` files below a folder, with their bytes (-1: the store does not tell).

    Raises:
        OSError: if the store refuses, or nothing is there.
    """

    def ask() -> dict[str, int]:
        files, path = system(url)
        files.invalidate_cache()
        starred = glob.has_magic(path)
        found = files.glob(path, detail=True) if starred else files.find(path, detail=True)
        names = (name for name, told in found.items() if told.get("type") != "directory" and (starred or name.endswith(suffix)))
        return {str(files.unstrip_protocol(name)): -1 if found[name].get("size") is None else int(found[name]["size"]) for name in names}

    return tried(url, ask)


def sizes(urls: Sequence[str]) -> dict[str, int]:
    """Bytes of files, asked for at the same time; many of one folder are asked for by listing it, where the store lists.

    Raises:
        UserError: naming the first that is not there or refused.
    """
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    known: dict[str, int] = {}
    for folder, inside in folders.items():
        if len(inside) >= LISTED and not folder.startswith("http"):
            told = _beside(folder)
            known |= {url: told[url] for url in inside if url in told}
    rest = [url for url in urls if url not in known]
    return known | dict(zip(rest, each(_size_of, rest), strict=True))


def _beside(folder: str) -> dict[str, int]:
    def ask() -> dict[str, int]:
        files, path = system(folder)
        files.invalidate_cache()
        return {str(files.unstrip_protocol(told["name"])): int(told.get("size") or 0) for told in files.ls(path, detail=True)}

    try:
        return tried(folder, ask)
    except OSError:  # it may be read, but not listed
        return {}


def _size_of(url: str) -> int:
    try:
        return size(url)
    except FileNotFoundError:
        raise UserError(f"data.path: {url} does not exist; correct the URL or the range in braces") from None
    except OSError as error:
        raise UserError(f"data.path: {url} cannot be read: {error.strerror or error}") from None
