"""Small tar shards for tests, made by the standard library."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def painted(number: int, size: tuple[int, int] = (40, 36), kind: str = "JPEG") -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def packed(members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT, mtime: float = 1.5) -> bytes:
    """A tar of the members; a time with a fraction gives each a pax header of its own, as webdataset's writer does."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sample(key: str, number: int, suffix: str = "jpg", **told: object) -> list[tuple[str, bytes]]:
    kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix]
    members = [(f"{key}.{suffix}", painted(number, (40 + number % 5, 36), kind)), (f"{key}.txt", f"picture {number}".encode())]
    return [*members, (f"{key}.json", json.dumps({"key": key, "status": "success", **told}).encode())] if told else members


def shard(folder: Path, number: int, count: int, **told: object) -> Path:
    """As img2dataset names them: shard of five digits, index of four more in the key."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{number:05d}.tar"
    rows = [sample(f"{number:05d}{i:04d}", number * 1000 + i, ("jpg", "png", "webp")[i % 3], **told) for i in range(count)]
    file.write_bytes(packed(m for row in rows for m in row))
    return file
