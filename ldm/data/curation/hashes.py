"""Hashes of pictures and near duplicates: SHA-256 of files, perceptual hashes (pHash), and pairs that differ in few bits."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.data.file_names import FORMATS
from ldm.data.images import Rejected, to_rgb
from ldm.data.photos import Photos

SIDE, KEPT = 32, 8  # of the small grey picture, and of the corner of its spectrum that is kept
AHEAD = 256  # pictures that are being hashed at a time


def _cosines() -> NDArray[np.float64]:
    """The DCT-II of SIDE values as a matrix (SIDE,SIDE), without its factors."""
    k, n = np.arange(SIDE)[:, None], np.arange(SIDE)[None, :]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE))


COSINES = _cosines()


def perceptual_hash(data: bytes) -> str:
    """64 bits as 16 hexadecimal digits: which low frequencies of the grey picture are above their median (pHash).

    Resizing, compression and small changes of brightness turn a few bits; other pictures differ in about 32.

    Raises:
        Rejected: if the bytes are no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("L", (4 * SIDE, 4 * SIDE))
            grey = to_rgb(image).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except Rejected:
        raise
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise Rejected("damaged image", f"{type(error).__name__}: {error}") from None
    spectrum = COSINES @ np.asarray(grey, np.float64) @ COSINES.T
    low = spectrum[:KEPT, :KEPT]
    bits = (low > np.median(low)).flatten()
    return f"{int(''.join('1' if bit else '0' for bit in bits), 2):016x}"


def rows(parts: Sequence[Photos], threads: int) -> Iterator[dict[str, Any]]:
    """A row for each picture, in their order: file_name, text, width, height, sha256, phash; a damaged one has no phash."""

    def row(part: Photos, index: int) -> dict[str, Any]:
        height, width = (int(side) for side in part.sizes()[index])
        made: dict[str, Any] = {"file_name": part.name(index), "text": part.all_captions([index])[0][0], "width": width, "height": height}
        try:
            data = part.read(index)
            made["sha256"] = hashlib.sha256(data).hexdigest()
            made["phash"] = perceptual_hash(data)
        except Rejected:
            made.setdefault("sha256", None)
            made["phash"] = None
        return made

    places = [(part, index) for part in parts for index in range(len(part))]
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(places), AHEAD):
            yield from pool.map(lambda place: row(*place), places[start : start + AHEAD])


def write(parts: Sequence[Photos], table: Path, threads: int = 2) -> int:
    """Write the rows to a parquet table, whole or not at all; returns how many."""
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    schema = arrow.schema(
        [
            ("file_name", arrow.string()),
            ("text", arrow.string()),
            ("width", arrow.int32()),
            ("height", arrow.int32()),
            ("sha256", arrow.string()),
            ("phash", arrow.string()),
        ]
    )
    table.parent.mkdir(parents=True, exist_ok=True)
    temporary, count, batch = table.with_name(f".{table.name}.partial"), 0, []
    with parquet.ParquetWriter(temporary, schema) as writer:
        for made in rows(parts, threads):
            batch.append(made)
            count += 1
            if len(batch) == 10_000:
                writer.write_table(arrow.Table.from_pylist(batch, schema=schema))
                batch = []
        if batch:
            writer.write_table(arrow.Table.from_pylist(batch, schema=schema))
    temporary.replace(table)
    return count


def near_duplicates(hashes: NDArray[np.uint64], bits: int) -> NDArray[np.bool_]:
    """Which of N hashes lie within `bits` of an earlier one that stays, (N,) bool.

    Two hashes that differ in at most d bits agree in one of d + 1 bands, so only rows that share a band are compared: within
    each band the rows are sorted, and each is compared with the next, the next but one, ... as long as their bands agree.
    """
    hashes = np.asarray(hashes, np.uint64)
    values, first = np.unique(hashes, return_index=True)
    twice = np.ones(len(hashes), bool)
    twice[first] = False
    if bits <= 0 or len(values) < 2:
        return twice
    order = np.argsort(first, kind="stable")
    values, first = values[order], first[order]
    earlier, later = _pairs(values, min(bits, 63))
    gone = np.zeros(len(values), bool)
    for i in np.lexsort((earlier, later)).tolist():
        if not gone[earlier[i]]:
            gone[later[i]] = True
    twice[first[gone]] = True
    return twice


def _pairs(values: NDArray[np.uint64], bits: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs (earlier, later) within `bits`, each once or a few times."""
    edges = np.linspace(0, 64, bits + 2).round().astype(int)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        band = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        band, here = band[order], values[order]
        active = np.arange(len(values) - 1)
        distance = 1
        while len(active := active[active < len(values) - distance]):
            active = active[band[active] == band[active + distance]]
            close = active[_ones(here[active] ^ here[active + distance]) <= bits]
            if len(close):
                found.append((order[close], order[close + distance]))
            distance += 1
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def _ones(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits are set (Warren, Hacker's Delight, figure 5-2)."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
